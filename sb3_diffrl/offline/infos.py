"""Step infos as columns of arrays."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Where an info lies in a nest of dictionaries, and infos by that; None for what is no number.
InfoPath = tuple[str, ...]
FlatInfo = dict[InfoPath, np.ndarray | None]


class InfoColumns:
    """Turns step infos, which may differ from step to step, into columns of arrays, which may not.

    Environments give other infos at a reset than at a step (HalfCheetah's reset has no velocity), which Minari cannot store.
    """

    def __init__(self) -> None:
        self._columns: dict[InfoPath, tuple[np.dtype[Any], tuple[int, ...]]] | None = None
        self._dropped: set[InfoPath] = set()

    def stack(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Columns of one episode, nested as the infos are.

        :param infos: ``n`` infos
        :return: arrays ``(n, ...)``, and lists of ``n`` scalars
        """
        rows = [_flat_info(info) for info in infos]
        if self._columns is None:
            self._columns = _columns(rows)
        nested: dict[str, Any] = {}
        for path, (dtype, shape) in self._columns.items():
            group = nested
            for key in path[:-1]:
                group = group.setdefault(key, {})
            values = np.full((len(rows), *shape), np.nan if dtype.kind == "f" else 0, dtype)
            for i, row in enumerate(rows):
                value = row.get(path)
                if value is not None and value.shape == shape:
                    values[i] = value
                elif path in row:
                    self._warn(path)
            # Minari's arrow storage cannot read back an array of scalars.
            group[path[-1]] = values if shape else list(values)
        for path in {path for row in rows for path in row} - set(self._columns):
            self._warn(path)
        return nested

    def _warn(self, path: InfoPath) -> None:
        if path not in self._dropped:
            self._dropped.add(path)
            warnings.warn(
                f"Info {'/'.join(path)!r} is left out where it is not a number, or an array of the shape that it has in the first "
                "episode.",
                stacklevel=2,
            )


def _columns(rows: Sequence[FlatInfo]) -> dict[InfoPath, tuple[np.dtype[Any], tuple[int, ...]]]:
    # Type and shape of each info that is numeric in one row at least
    columns: dict[InfoPath, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for row in rows:
        for path, value in row.items():
            if value is not None:
                dtype = np.promote_types(value.dtype, columns[path][0]) if path in columns else value.dtype
                columns[path] = dtype, value.shape
    return columns


def _flat_info(info: Mapping[str, Any], prefix: InfoPath = ()) -> FlatInfo:
    flat: FlatInfo = {}
    for key, value in info.items():
        if isinstance(value, Mapping):
            flat |= _flat_info(value, (*prefix, str(key)))
        else:
            try:
                array = np.asarray(value)
            except ValueError:  # ragged
                array = np.asarray(None)
            # A count in one episode may be a fraction in the next.
            array = array.astype(np.float64) if array.dtype.kind in "iu" else array
            flat[(*prefix, str(key))] = array if array.dtype.kind in "bf" else None
    return flat
