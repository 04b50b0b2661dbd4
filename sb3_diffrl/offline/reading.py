"""Reading Minari datasets: found or a clear error, and every episode checked."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import minari
import numpy as np
from gymnasium import spaces
from minari.dataset.minari_storage import is_image_space
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_diffrl.offline.episodes import check_episode
from sb3_diffrl.offline.inspecting import check_episodes, check_metadata, memory_limit, read_opened, size_on_disk
from sb3_diffrl.offline.spaces import check_same_spaces
from sb3_diffrl.offline.writing import check_id, settle

DatasetSource: TypeAlias = str | minari.MinariDataset


def open_datasets(dataset: DatasetSource | Sequence[DatasetSource]) -> tuple[minari.MinariDataset, ...]:
    """Open one dataset or several, without reading their episodes.

    :param dataset: an id, a dataset, or a list of either
    :raises FileNotFoundError: if an id is not on disk, with the command that makes or downloads it
    :raises ValueError: if a dataset is damaged or empty, or if several have different spaces
    """
    several = [dataset] if isinstance(dataset, (str, minari.MinariDataset)) else list(dataset)
    if not several:
        raise ValueError("The list of datasets is empty.")
    opened = tuple(_open(source) if isinstance(source, str) else source for source in several)
    for source in opened:
        if not isinstance(source, minari.MinariDataset):
            raise TypeError(f"A dataset is an id, a MinariDataset or a list of either, not {source!r}.")
        if source.total_episodes == 0 or source.total_steps == 0:
            raise ValueError(f"Dataset {source.id!r} is empty ({source.storage.data_path}): make it again.")
        check_same_spaces(
            f"dataset {opened[0].id!r}",
            (opened[0].observation_space, opened[0].action_space),
            f"dataset {source.id!r}",
            (source.observation_space, source.action_space),
        )
    return opened


def check_size(sources: Sequence[minari.MinariDataset], n_bytes: int) -> None:
    """Check that datasets are not much larger in memory than on disk: what a damaged or hostile one says is not believed.

    :param n_bytes: what they will take
    :raises ValueError: if they are
    """
    on_disk = sum(size_on_disk(Path(source.storage.data_path)) for source in sources)
    if not 0 <= n_bytes <= memory_limit(on_disk):
        raise ValueError(
            f"Dataset {sources[0].id!r} would take {n_bytes / 2**30:.3g} GiB of memory, and has {on_disk / 2**30:.3g} GiB on disk: "
            "it is damaged, or has discrete observations with too many values to be one-hot vectors."
        )


def _open(dataset_id: str) -> minari.MinariDataset:
    check_id(dataset_id)
    path = get_dataset_path(dataset_id)
    settle(path)
    if not (path / "data").exists():
        make = "sb3-diffrl dataset make" if dataset_id.startswith("sb3-diffrl/") else "minari download"
        similar = difflib.get_close_matches(dataset_id, _local_ids(), cutoff=0.8)
        hint = f" On disk is {' and '.join(map(repr, similar))}." if similar else ""
        raise FileNotFoundError(
            f"Dataset {dataset_id!r} is not on disk (looked in {path}). Get it with `{make} {dataset_id}`.{hint}"
        )
    try:
        check_metadata(path / "data")
        dataset = minari.MinariDataset(path / "data")
        _ = dataset.total_steps, dataset.total_episodes  # read from the metadata, whatever those hold
        return dataset
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(_damaged(dataset_id, path / "data", error)) from error


def _local_ids() -> list[str]:
    root = get_dataset_path()
    ids = [path.parent.parent.relative_to(root).as_posix() for path in root.rglob("data/metadata.json")]
    return [dataset_id for dataset_id in ids if not dataset_id.startswith(".")]  # the hidden ones are not finished


def _damaged(dataset_id: str, data_path: Path, error: object) -> str:
    file = next(data_path.glob("*.hdf5"), data_path)
    reason = str(error) or type(error).__name__
    return f"Dataset {dataset_id!r} is damaged: {file} cannot be read ({reason}). Delete {data_path.parent} and make it again."


def read_episodes(source: minari.MinariDataset, first: int = 0) -> Iterator[minari.EpisodeData]:
    """Read a dataset's episodes in order, each checked.

    The last step of each has a flag: an episode that was cut without one is marked as truncated.

    :param source: dataset
    :param first: position of the first episode to read
    :raises ValueError: if the data cannot be read or lead to other files, or an episode does not hold together or holds a NaN or
        infinite number; the message names dataset, episode and step
    """
    with closing(check_episodes(source, source.episode_indices[first:])) as checks:
        yield from _read_checked(source, first, checks)


def _read_checked(
    source: minari.MinariDataset, first: int, checks: Iterator[dict[str, Any] | None]
) -> Iterator[minari.EpisodeData]:
    n_steps = 0
    is_plain = _is_plain(source.observation_space) and _is_plain(source.action_space)
    indices = source.episode_indices[first:]
    episodes = _lazily(source, indices)
    for index in indices:
        try:
            opened = next(checks)
            # Minari opens everything anew, which takes as long as reading it.
            episode = next(episodes) if opened is None or not is_plain else minari.EpisodeData(int(index), **_parts(opened))
        except Exception as error:
            reason = "it ends early" if isinstance(error, StopIteration) else error
            raise ValueError(f"Episode {index}: " + _damaged(source.id, source.storage.data_path, reason)) from error
        n_steps += len(episode.rewards)
        if n_steps > source.total_steps:
            raise ValueError(_damaged(source.id, source.storage.data_path, f"more than {source.total_steps} steps"))
        check_episode(f"Dataset {source.id!r}, episode {index}", episode)
        truncations = np.array(episode.truncations, bool)
        truncations[-1] |= not episode.terminations[-1]
        yield dataclasses.replace(episode, truncations=truncations)
    if first == 0 and n_steps != source.total_steps:
        raise ValueError(_damaged(source.id, source.storage.data_path, f"{n_steps} steps in place of {source.total_steps}"))


def _is_plain(space: spaces.Space[Any]) -> bool:
    # Whether Minari's hdf5 holds the space's samples as they are: images may be JPEGs
    if isinstance(space, spaces.Dict):
        return all(map(_is_plain, space.spaces.values()))
    if isinstance(space, spaces.Box):
        return not is_image_space(space)
    return isinstance(space, (spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete))


def _parts(opened: dict[str, Any]) -> dict[str, Any]:
    parts = {name: read_opened(opened[name]) for name in ("observations", "actions", "rewards", "terminations", "truncations")}
    for name, part in parts.items():
        if not isinstance(part, dict) and np.ndim(part) == 0:
            raise ValueError(f"{name} is no array")
    return parts | {"infos": read_opened(opened["infos"]) if "infos" in opened else None}


def _lazily(source: minari.MinariDataset, indices: np.ndarray) -> Iterator[minari.EpisodeData]:
    # Some storages open their files before they are asked for the first episode, where an error would not be seen.
    yield from source.iterate_episodes(indices)


def infos_at(episode: minari.EpisodeData, row: int) -> dict[str, Any]:
    """The recorded infos that belong to one observation of an episode; empty where none were recorded."""

    def pick(tree: Any) -> Any:
        return {key: pick(part) for key, part in tree.items()} if isinstance(tree, dict) else tree[row]

    return pick(episode.infos or {})  # type: ignore[no-any-return]
