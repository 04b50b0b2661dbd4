"""The command ``sb3-diffrl``: train, enjoy, evaluate, record, tune, plot, dataset, list."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

__all__ = ["main", "make_parser"]

#: What a shell reports for a program that Ctrl-C ended.
INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """Parser of the whole command.

    :raises ImportError: if what every command needs is not installed, with what gives it
    """
    try:
        import yaml  # noqa: F401
    except ImportError as error:
        raise ImportError('The command needs RL Zoo: pip install "sb3_diffrl[zoo]"') from error
    from sb3_diffrl import __version__
    from sb3_diffrl.cli import datasets, listing, playing, plotting, training
    from sb3_diffrl.cli.arguments import Parser, Subparsers

    parser = Parser(
        prog="sb3-diffrl",
        description="Train, tune, evaluate, film and plot agents whose policies are samplers; make and record datasets.",
        epilog="'sb3-diffrl COMMAND --help' tells the rest.",
    )
    parser.add_argument("--version", action="version", version=f"sb3_diffrl {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands: Subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (training, playing, plotting, datasets, listing):
        module.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    :param arguments: in place of the command line's
    :return: exit code: 0, 1 after an error, 2 for a wrong command line, 130 after Ctrl-C, 143 after SIGTERM
    """
    if threading.current_thread() is not threading.main_thread():
        return _run(arguments)
    # Python would end on the spot, and leave behind what is half-written.
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(arguments: Sequence[str] | None) -> int:
    traceback = False
    try:
        args = make_parser().parse_args(arguments)
        traceback = args.traceback
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does; nothing more may be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if traceback or not _speaks_for_itself(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _speaks_for_itself(error: Exception) -> bool:
    """Whether an error is the user's to mend, and not one of the program."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    if isinstance(error, AssertionError) and error.args:  # Stable-Baselines3's way to refuse a space
        return True
    from gymnasium.error import DependencyNotInstalled

    return isinstance(error, DependencyNotInstalled)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    print("\nTerminated.", file=sys.stderr)
    raise SystemExit(128 + number)
