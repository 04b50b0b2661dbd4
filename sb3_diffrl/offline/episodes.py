"""What makes an episode whole."""

from typing import Any

import numpy as np
from minari import EpisodeData
from minari.data_collector import EpisodeBuffer


def check_episode(where: str, episode: EpisodeData | EpisodeBuffer) -> None:
    """Check that an episode holds together.

    :param where: what it is, for the message
    :param episode: with stacked arrays
    :raises ValueError: if its rewards or flags are no rows of numbers, it has no steps, its lengths do not agree, it goes on after
        its end, or a number is NaN or infinite; the message names the step
    """
    _check_rows(where, episode)
    steps = len(episode.rewards)
    if steps == 0:
        raise ValueError(f"{where} has no steps.")
    for name in ("observations", "actions", "terminations", "truncations"):
        expected = steps + (name == "observations")
        for leaf in leaves(getattr(episode, name)):
            if len(leaf) != expected:
                raise ValueError(f"{where} has {steps} rewards and {len(leaf)} {name}, in place of {expected}.")
    ends = np.flatnonzero(np.asarray(episode.terminations, bool) | np.asarray(episode.truncations, bool))
    if len(ends) > 0 and ends[0] < steps - 1:
        raise ValueError(f"{where} goes on after its end in step {ends[0]}: split it in two.")
    for name in ("observations", "actions", "rewards"):
        for leaf in leaves(getattr(episode, name)):
            fault = first_fault(leaf)
            if fault is not None:
                at = f" at index {list(fault[1:])}" if len(fault) > 1 else ""
                raise ValueError(
                    f"{where}, step {fault[0]}: {name} has the value {leaf[fault]}{at}, which is not finite in single precision."
                )


def _check_rows(where: str, episode: EpisodeData | EpisodeBuffer) -> None:
    for name in ("rewards", "terminations", "truncations"):
        row = np.asarray(getattr(episode, name))
        if row.ndim != 1 or row.dtype.kind not in "biuf":
            raise ValueError(f"{where}: {name} are of shape {row.shape} and type {row.dtype}, not a row of numbers.")


def leaves(tree: Any) -> list[Any]:
    """The arrays in a nest of dictionaries and tuples."""
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    if isinstance(tree, tuple):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]


def first_fault(values: Any, rows_at_once: int = 65536) -> tuple[int, ...] | None:
    """Index of the first number which is not finite in single precision, in which networks compute; ``None`` if all are.

    :param values: ``(n, ...)``; what is not floating point has none
    :param rows_at_once: bounds the memory
    """
    if not isinstance(values, np.ndarray) or not np.issubdtype(values.dtype, np.floating):
        return None
    for start in range(0, len(values), rows_at_once):
        with np.errstate(over="ignore"):
            is_finite = np.isfinite(values[start : start + rows_at_once].astype(np.float32, copy=False))
        if not is_finite.all():
            row, *rest = (int(i) for i in np.argwhere(~is_finite)[0])
            return (start + row, *rest)
    return None
