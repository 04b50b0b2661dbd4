"""``enjoy``, ``evaluate`` and ``record``."""

import argparse
import json
import os
import sys
import warnings
from ctypes.util import find_library
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_diffrl.cli.arguments import Parser, Subparsers, add_compute, add_logs, add_wrappers

if TYPE_CHECKING:
    from sb3_diffrl.zoo.runs import Run

EXAMPLES = """examples:
  sb3-diffrl {name} logs/nclql/Pendulum-v1_1
  sb3-diffrl {name} --algo nclql --env Pendulum-v1 --best
  sb3-diffrl {name} logs/nclql/Pendulum-v1_1 --wrapper TimeLimit:max_episode_steps=100 --wrapper RecordEpisodeStatistics"""


def add_commands(commands: Subparsers) -> None:
    """Add the three commands."""
    evaluate = _add(commands, "evaluate", "mean return of a trained agent", 10)
    evaluate.add_argument("--n-envs", type=int, default=1, help="envs at a time (default: 1)")
    evaluate.add_argument("-o", "--output", type=Path, metavar="FILE", help="write returns and lengths there, as JSON")
    evaluate.set_defaults(run=run_evaluate)

    enjoy = _add(commands, "enjoy", "watch a trained agent, on the screen or in a video", 3)
    enjoy.add_argument("--video", type=Path, metavar="FOLDER", help="film it instead; works without a screen")
    enjoy.add_argument("--no-render", action="store_true", help="neither screen nor video")
    enjoy.set_defaults(run=run_enjoy)

    record = _add(commands, "record", "film a trained agent", 1)
    record.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where videos go (default: <run>/videos)")
    record.set_defaults(run=run_record)


def _add(commands: Subparsers, name: str, text: str, n_episodes: int) -> Parser:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}. The env is as in training (arguments, wrappers, VecNormalize's statistics).",
        epilog=EXAMPLES.format(name=name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("-n", "--n-episodes", type=int, default=n_episodes, help=f"episodes (default: {n_episodes})")
    parser.add_argument("--seed", type=int, default=0, help="seed of env and actions (default: 0)")
    parser.add_argument("--stochastic", action="store_true", help="draw actions, in place of the deterministic ones")
    add_wrappers(parser)
    add_compute(parser)
    return parser


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run, by its folder or by algorithm and task, and which of its models."""
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN", help="folder of a run, e.g. logs/nclql/Pendulum-v1_1")
    parser.add_argument("--algo", metavar="NAME", help="instead: the latest run of this algorithm")
    parser.add_argument("--env", metavar="ID", help="... on this env")
    parser.add_argument("--dataset", metavar="ID", help="... or on this dataset")
    parser.add_argument("--exp-id", type=int, default=0, metavar="N", help="number of the run in place of the latest")
    parser.add_argument("--best", action="store_true", help="the best evaluated model, in place of the last")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint at a step")
    add_logs(parser)


def open_run(args: argparse.Namespace) -> "Run":
    """The run that ``add_run()``'s arguments name.

    :raises ValueError: if they name none
    """
    import sb3_diffrl.zoo  # noqa: F401
    from sb3_diffrl.zoo.runs import Run, find_run

    if args.folder is not None:
        return Run.open(args.folder)
    task = args.dataset or args.env
    if args.algo is None or task is None:
        raise ValueError("Name a run: its folder, or --algo with --env or --dataset.")
    return Run.open(find_run(args.logs, args.algo, task, args.exp_id))


def _play(args: argparse.Namespace, wrappers: list[Any], render_mode: str | None = None) -> tuple[list[float], list[int], "Run"]:
    import torch as th
    from stable_baselines3.common.evaluation import evaluate_policy

    run = open_run(args)
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)
    env = run.make_env(wrappers, getattr(args, "n_envs", 1), args.seed, render_mode, args.trust)
    try:
        model = run.load(run.model_path(args.best, args.checkpoint), env, args.device, args.seed, args.trust)
        seen = 0

        def show(local: dict[str, Any], _: dict[str, Any]) -> None:
            nonlocal seen
            while seen < len(local["episode_rewards"]):
                value, length = local["episode_rewards"][seen], local["episode_lengths"][seen]
                seen += 1
                print(f"episode {seen}: return {value:.2f}, {length} steps", flush=True)

        returns, lengths = evaluate_policy(
            model, env, args.n_episodes, not args.stochastic, callback=show, return_episode_rewards=True, warn=False
        )
    finally:
        env.close()
    assert isinstance(returns, list)
    assert isinstance(lengths, list)
    show({"episode_rewards": returns, "episode_lengths": lengths}, {})  # SB3 calls it before an episode counts: the last is left
    return [float(value) for value in returns], [int(length) for length in lengths], run


def _report(returns: list[float], lengths: list[int], run: "Run") -> dict[str, Any]:
    import numpy as np

    from sb3_diffrl.offline import normalized_score

    result: dict[str, Any] = {
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)),
        "returns": returns,
        "lengths": lengths,
    }
    mean, std = result["mean_return"], result["std_return"]
    print(f"return {mean:.2f} +- {std:.2f} over {len(returns)} episodes, {np.mean(lengths):.0f} steps each")
    if run.dataset is not None:
        try:
            result["normalized_score"] = float(normalized_score(run.dataset, result["mean_return"]))
            print(f"normalised score {result['normalized_score']:.3f} (0 random, 1 expert)")
        except ValueError:
            pass  # no references for this dataset
    return result


def run_evaluate(args: argparse.Namespace) -> int:
    """``evaluate``."""
    result = _report(*_play(args, args.wrapper or []))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def run_enjoy(args: argparse.Namespace) -> int:
    """``enjoy``."""
    if args.video is not None:
        return _film(args, args.video)
    if not args.no_render and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError("There is no screen: film it (--video FOLDER), or only look at the returns (--no-render).")
    _report(*_play(args, args.wrapper or [], None if args.no_render else "human"))
    return 0


def run_record(args: argparse.Namespace) -> int:
    """``record``."""
    return _film(args, args.output or open_run(args).folder / "videos")


def _film(args: argparse.Namespace, folder: Path) -> int:
    # MuJoCo looks for a screen unless told otherwise; EGL needs none.
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    # RecordVideo warns of any earlier video in the folder; ours have names of their own.
    warnings.filterwarnings("ignore", message=".*Overwriting existing videos")
    try:
        import moviepy  # noqa: F401
    except ImportError:
        raise ImportError('Videos need moviepy: pip install "sb3_diffrl[zoo]"') from None
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*.mp4"))
    prefix = _free_prefix(folder)
    recorder = {
        "gymnasium.wrappers.RecordVideo": {
            "video_folder": str(folder),
            "name_prefix": prefix,
            "episode_trigger": lambda episode: episode < args.n_episodes,
            "disable_logger": True,
        }
    }
    try:
        _report(*_play(args, [*(args.wrapper or []), recorder], "rgb_array"))
    except (AttributeError, ImportError, RuntimeError) as error:
        # What PyOpenGL raises without its library is no message.
        if (missing := _missing_renderer()) is None:
            raise
        raise OSError(missing) from error
    for path in sorted(set(folder.glob("*.mp4")) - before):
        print(path)
    return 0


def _missing_renderer() -> str | None:
    """What to install if the library is missing by which MuJoCo is to render."""
    chosen = os.environ.get("MUJOCO_GL", "")
    libraries = {"egl": ("EGL", "libegl1 libgl1-mesa-dri", "osmesa"), "osmesa": ("OSMesa", "libosmesa6", "egl")}
    if chosen not in libraries or find_library(libraries[chosen][0]):
        return None
    name, packages, other = libraries[chosen]
    return f"MuJoCo renders by {name}, which is not installed: apt-get install {packages} (or MUJOCO_GL={other})."


def _free_prefix(folder: Path) -> str:
    number = 1
    while list(folder.glob(f"video{number}-*.mp4")):
        number += 1
    return f"video{number}"
