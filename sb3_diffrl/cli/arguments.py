"""Arguments that several commands share, and a parser that suggests names."""

import argparse
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from sb3_diffrl.configs import UnsafeConfigError, nearest, parse_entry, parse_python


class Parser(argparse.ArgumentParser):
    """``argparse``'s, that suggests the nearest name for a wrong one."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(known)}.{nearest(str(value), known)}")

    def error(self, message: str) -> NoReturn:
        """Print the message, with the nearest option for an unknown one, and exit with code 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            words = message.removeprefix(prefix).split()
            known = [option for parser in self._all() for option in parser._option_string_actions]
            message += "." + nearest(next((word for word in words if word.startswith("-")), words[0]), known)
        super().error(message)

    def _all(self) -> list[argparse.ArgumentParser]:
        found: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [inner for parser in action.choices.values() if isinstance(parser, Parser) for inner in parser._all()]
        return found


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class Entries(argparse.Action):
    """Collects ``name:value`` words in a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Add to what earlier occurrences gave."""
        try:
            entries = dict(parse_entry(word) for word in values)
        except ValueError as error:
            parser.error(str(error))
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **entries})


def parse_wrapper(text: str) -> str | dict[str, dict[str, Any]]:
    """A wrapper of the command line, ``Name`` or ``Name:argument=value,argument=value``, as RL Zoo's ``env_wrapper`` has it.

    >>> parse_wrapper("gymnasium.wrappers.TimeLimit:max_episode_steps=100")
    {'gymnasium.wrappers.TimeLimit': {'max_episode_steps': 100}}

    :param text: a name without dots is one of ``gymnasium.wrappers``
    :raises argparse.ArgumentTypeError: if it is not understood
    """
    name, colon, rest = text.partition(":")
    if "." not in name:
        name = _full_name(name)
    if not colon:
        return name
    try:
        arguments = parse_python(f"dict({rest})")
    except UnsafeConfigError:
        # Strings without quotes: a shell takes quotes away.
        try:
            arguments = dict(parse_entry(word) for word in rest.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return {name: arguments}


def _full_name(name: str) -> str:
    import gymnasium.wrappers

    if hasattr(gymnasium.wrappers, name):
        return f"gymnasium.wrappers.{name}"
    raise argparse.ArgumentTypeError(f"there is no gymnasium.wrappers.{name}.{nearest(name, gymnasium.wrappers.__all__)}")


def parse_device(text: str) -> str:
    """A device of PyTorch, or ``auto``.

    :raises argparse.ArgumentTypeError: if PyTorch has no such kind
    """
    if text not in ("auto", "cpu"):
        import torch as th

        try:
            th.device(text)
        except RuntimeError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no device of PyTorch.{nearest(text, ('auto', 'cpu', 'cuda', 'cuda:0', 'mps'))}"
            ) from None
    return text


def add_logs(parser: argparse.ArgumentParser) -> None:
    """``--logs``."""
    parser.add_argument("-f", "--logs", type=Path, default=Path("logs"), metavar="FOLDER", help="folder of runs (default: logs)")


def add_wrappers(parser: argparse.ArgumentParser) -> None:
    """``--wrapper``, ``--trust``."""
    parser.add_argument(
        "-w",
        "--wrapper",
        action="append",
        type=parse_wrapper,
        metavar="NAME[:ARG=VALUE,...]",
        help="Gymnasium wrapper around the env, e.g. TimeLimit:max_episode_steps=100; repeat for a stack, innermost first",
    )
    parser.add_argument("--trust", action="store_true", help="run code that files name or hold: configurations, pickles")


def add_compute(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--num-threads``."""
    parser.add_argument("--device", type=parse_device, default="auto", help="where to compute: auto, cpu, cuda ... (default: auto)")
    parser.add_argument("--num-threads", type=int, default=-1, help="threads of PyTorch; small networks are fastest with 1")
