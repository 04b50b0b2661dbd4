"""``dataset make|record|info|list``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sb3_diffrl.cli.arguments import Subparsers, add_compute, add_wrappers
from sb3_diffrl.cli.playing import add_run, open_run

MAKE_EXAMPLES = """examples:
  sb3-diffrl dataset make sb3-diffrl/pointmaze/umaze-v0             a controller in a maze: minutes
  sb3-diffrl dataset make sb3-diffrl/hopper/medium-v0               trains the agent first: hours
  sb3-diffrl dataset make sb3-diffrl/pointmaze/umaze-v0 --quick     a stand-in: seconds"""

RECORD_EXAMPLES = """examples:
  sb3-diffrl dataset record my-data/pendulum/nclql-v0 logs/nclql/Pendulum-v1_1 -n 100
  sb3-diffrl dataset record my-data/pendulum/nclql-v0 --algo nclql --env Pendulum-v1 --n-steps 10000 --deterministic
  sb3-diffrl train --algo diffusion_bc --dataset my-data/pendulum/nclql-v0"""


def add_commands(commands: Subparsers) -> None:
    """Add the command."""
    form = argparse.RawDescriptionHelpFormatter
    dataset = commands.add_parser("dataset", help="make, record and look at Minari datasets", description="Minari datasets.")
    kinds: Subparsers = dataset.add_subparsers(title="commands", metavar="COMMAND", required=True)

    make = kinds.add_parser(
        "make",
        help="make one of the package's datasets on this machine",
        description="Make one of the package's datasets on this machine.",
        epilog=MAKE_EXAMPLES,
        formatter_class=form,
    )
    make.add_argument("id", help="e.g. sb3-diffrl/pointmaze/umaze-v0; 'dataset list' shows them")
    make.add_argument("--n-steps", type=int, help="size of the dataset (default: that of its kind)")
    make.add_argument("--seed", type=int, default=0, help="seed of envs and agents (default: 0)")
    make.add_argument(
        "--quick", action="store_true", help="a small stand-in for tests and demonstrations, under an id that says so"
    )
    make.add_argument("--overwrite", action="store_true", help="replace a dataset of this id")
    make.add_argument("--cache", type=Path, help="folder of the locomotion training runs (default: beside the datasets)")
    make.set_defaults(run=run_make)

    record = kinds.add_parser(
        "record",
        help="record a trained agent as a dataset",
        description="Record a trained agent's episodes as a dataset.",
        epilog=RECORD_EXAMPLES,
        formatter_class=form,
    )
    record.add_argument("id", help="of the new dataset: namespace/env/name-v0")
    add_run(record)
    size = record.add_mutually_exclusive_group(required=True)
    size.add_argument("-n", "--n-episodes", type=int, help="whole episodes to record")
    size.add_argument("--n-steps", type=int, help="or env steps, the last episode cut")
    record.add_argument("--seed", type=int, default=0, help="seed of env and actions (default: 0)")
    record.add_argument("--deterministic", action="store_true", help="deterministic actions, in place of drawn ones")
    record.add_argument("--overwrite", action="store_true", help="replace a dataset of this id")
    add_wrappers(record)
    add_compute(record)
    record.set_defaults(run=run_record)

    info = kinds.add_parser("info", help="what a dataset holds", description="What a dataset on disk holds.")
    info.add_argument("id", help="e.g. sb3-diffrl/pointmaze/umaze-v0; 'dataset list' shows those on disk")
    info.set_defaults(run=run_info)

    text = "datasets on disk, and those that can be made"
    listed = kinds.add_parser("list", help=text, description=f"List {text}.")
    listed.set_defaults(run=run_list)


def run_make(args: argparse.Namespace) -> int:
    """``dataset make``."""
    from sb3_diffrl.offline.makers import make_dataset
    from sb3_diffrl.offline.makers.training import LevelNotReachedError

    try:
        dataset = make_dataset(
            args.id, n_steps=args.n_steps, seed=args.seed, quick=args.quick, overwrite=args.overwrite, cache=args.cache
        )
    except LevelNotReachedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{_kept(args)}", file=sys.stderr)
        raise
    print(f"{dataset.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, in {dataset.storage.data_path}")
    return 0


def _kept(args: argparse.Namespace) -> str:
    """What an interrupted ``dataset make`` has left behind."""
    from sb3_diffrl.offline.makers.locomotion import default_cache

    if "/pointmaze/" in args.id or "/random-" in args.id:
        return "No dataset was written: the same command begins anew."
    folder = args.cache or default_cache()
    return f"No dataset was written: the same command goes on from the last checkpoint of its training in {folder}"


def run_record(args: argparse.Namespace) -> int:
    """``dataset record``."""
    from minari.storage import get_dataset_path
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_diffrl.offline import record_dataset

    run = open_run(args)
    env = run.make_env(args.wrapper, 1, args.seed, trust=args.trust)
    try:
        model = run.load(run.model_path(args.best, args.checkpoint), env, args.device, args.seed, args.trust)
        if unwrap_vec_normalize(env) is not None:
            model.set_env(env)
        inner = env.get_attr("env")[0]  # inside Monitor
        dataset = record_dataset(
            model,
            inner,
            args.id,
            n_episodes=args.n_episodes,
            n_steps=args.n_steps,
            seed=args.seed,
            deterministic=args.deterministic,
            overwrite=args.overwrite,
            progress_bar=True,
            algorithm_name=type(model).__name__,
        )
    finally:
        env.close()
    print(f"{dataset.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, in {get_dataset_path(dataset.id)}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """``dataset info``."""
    import numpy as np

    from sb3_diffrl.offline import OfflineDataset

    dataset = OfflineDataset.load(args.id)
    source = dataset.sources[0]
    returns = dataset.episode_returns
    lines: dict[str, Any] = {
        "id": args.id,
        "episodes": source.total_episodes,
        "steps": dataset.n_steps,
        "observations": dataset.observation_space,
        "actions": dataset.action_space,
        "returns": f"mean {np.mean(returns):.2f}, from {np.min(returns):.2f} to {np.max(returns):.2f}",
        "env": None if dataset.env_spec is None else dataset.env_spec.id,
        "on disk": source.storage.data_path,
    }
    known = source.storage.metadata
    lines.update(
        {
            key: known[key]
            for key in ("algorithm_name", "description", "ref_min_score", "ref_max_score", "provenance")
            if key in known
        }
    )
    for name, value in lines.items():
        print(f"{name:14s} {value}")
    return 0


def run_list(_: argparse.Namespace) -> int:
    """``dataset list``."""
    import minari

    from sb3_diffrl.offline.makers import DATASET_IDS

    local = minari.list_local_datasets()
    print("On disk:" if local else "On disk: none.")
    for name, known in sorted(local.items()):
        print(f"  {name}  {known.get('total_episodes', '?')} episodes, {known.get('total_steps', '?')} steps")
    print("To be made on this machine (sb3-diffrl dataset make ID):")
    for name in DATASET_IDS:
        if name not in local:
            print(f"  {name}")
    return 0
