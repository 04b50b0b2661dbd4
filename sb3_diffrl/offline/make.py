"""Make a dataset: ``python -m sb3_diffrl.offline.make sb3-diffrl/pointmaze/umaze-v0``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minari.storage import get_dataset_path

from sb3_diffrl.offline.makers import DATASET_IDS, make_dataset
from sb3_diffrl.offline.makers.training import LevelNotReachedError


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    :param arguments: in place of the command line's
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_diffrl.offline.make", description="Make a Minari dataset on this machine; --list names them."
    )
    parser.add_argument("dataset_id", nargs="?", help="for instance sb3-diffrl/pointmaze/umaze-v0")
    parser.add_argument("--n-steps", type=int, help="size of the dataset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a small stand-in for tests and demonstrations, under an id that says so"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of this id")
    parser.add_argument("--cache", type=Path, help="folder of the locomotion training runs")
    parser.add_argument("--list", action="store_true", help="list the datasets that can be made")
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(DATASET_IDS))
        return
    if args.dataset_id is None:
        parser.error("name a dataset; --list shows them")
    try:
        dataset = make_dataset(
            args.dataset_id,
            n_steps=args.n_steps,
            seed=args.seed,
            quick=args.quick,
            overwrite=args.overwrite,
            cache=args.cache,
        )
    except (ValueError, FileExistsError, ImportError, LevelNotReachedError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{dataset.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, in {get_dataset_path(dataset.id)}")


if __name__ == "__main__":
    main()
