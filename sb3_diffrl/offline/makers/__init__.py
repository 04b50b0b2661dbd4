"""Dataset makers: Minari datasets that are made on the user's machine, one call each."""

from difflib import get_close_matches
from pathlib import Path

import minari

from sb3_diffrl.offline.makers.locomotion import PLANS, TIERS, make_locomotion
from sb3_diffrl.offline.makers.pointmaze import MAZES, make_pointmaze

__all__ = ["DATASET_IDS", "make_dataset"]

_MAZE_IDS = {f"sb3-diffrl/pointmaze/{name}-v0": name for name in MAZES}
_LOCOMOTION_IDS = {f"sb3-diffrl/{name}/{tier}-v0": (name, tier) for name in PLANS for tier in TIERS}
DATASET_IDS: tuple[str, ...] = (*_MAZE_IDS, *_LOCOMOTION_IDS)


def make_dataset(
    dataset_id: str,
    *,
    n_steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
    overwrite: bool = False,
    cache: Path | None = None,
    progress_bar: bool = True,
) -> minari.MinariDataset:
    """Make one of ``DATASET_IDS`` and put it where Minari finds it.

    Locomotion datasets other than ``random`` need a training run, tens of minutes on one core, which serves all tiers of an
    environment. It lives in a cache folder; if it is interrupted, the same call goes on where it stopped.

    :param dataset_id: which dataset
    :param n_steps: its size; by default that of the documentation's table
    :param seed: seed of everything: the same seed on the same machine and versions gives the same data
    :param quick: make a small stand-in in well under a minute, for tests and demonstrations. Its id says so (``...-quick-v0``), and
        locomotion policies are then hardly trained.
    :param overwrite: replace a dataset of this id
    :param cache: folder of the training runs; by default a hidden one beside Minari's datasets
    :param progress_bar: whether to show one
    :return: the dataset, as on disk
    :raises ValueError: if the id is none of ``DATASET_IDS``; the message names the nearest
    :raises FileExistsError: if there is a dataset of this id and ``overwrite`` is false, before anything is done
    :raises ImportError: if Gymnasium-Robotics is missing, for PointMaze
    :raises LevelNotReachedError: if training did not reach its levels
    """
    if dataset_id not in DATASET_IDS:
        nearest = get_close_matches(dataset_id, DATASET_IDS, n=3, cutoff=0.0)
        raise ValueError(f"No maker for {dataset_id!r}. Nearest: {', '.join(nearest)}. All: `sb3-diffrl dataset list`")
    if n_steps is not None and n_steps < 1:
        raise ValueError(f"`n_steps` must be positive, it is {n_steps}.")
    target = dataset_id.replace("-v0", "-quick-v0") if quick else dataset_id
    if dataset_id in _MAZE_IDS:
        return make_pointmaze(
            _MAZE_IDS[dataset_id],
            target,
            n_steps=n_steps,
            seed=seed,
            quick=quick,
            overwrite=overwrite,
            progress_bar=progress_bar,
        )
    name, tier = _LOCOMOTION_IDS[dataset_id]
    return make_locomotion(
        name,
        tier,
        target,
        n_steps=n_steps,
        seed=seed,
        quick=quick,
        overwrite=overwrite,
        cache=cache,
        progress_bar=progress_bar,
    )
