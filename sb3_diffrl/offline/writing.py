"""Writing Minari datasets: nothing half-written can be taken for a whole."""

import errno
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.serialization import serialize_space
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_diffrl.offline.episodes import check_episode, leaves
from sb3_diffrl.offline.infos import InfoColumns
from sb3_diffrl.offline.spaces import stack

DataFormat = Literal["hdf5", "arrow"]
# Minari takes each batch of rows that pyarrow gives it for an episode, and this is a batch's default size.
ARROW_ROWS = 131072
# Beside an episode's own size: HDF5 may end the whole process when it finds the disk full.
ROOM = 2**20


class DatasetWriter:
    """Writes a Minari dataset episode by episode; ``publish()`` puts it in its place all at once.

    Until then the episodes lie in a hidden folder beside the datasets, which Minari does not list and which is removed when the
    ``with`` block is left. Episodes go through Minari's own storage. ``minari.DataCollector`` writes the same files, but needs jax.

    :param dataset_id: ``namespace/env/name-v0``
    :param observation_space: of one observation
    :param action_space: of one action
    :param env_spec: of the env which the episodes come from, see ``recoverable_spec()``; ``None`` where it cannot be rebuilt
    :param data_format: Minari's storage; ``"arrow"`` needs pyarrow
    :param overwrite: replace a dataset of this id, once the new one is whole
    :raises FileExistsError: if there is a dataset of this id and ``overwrite`` is false
    :raises ValueError: if the id is malformed or Minari cannot store the spaces
    :raises OSError: here and in what follows, if the disk is full or the folder cannot be written, with the reason and the folder
    """

    def __init__(
        self,
        dataset_id: str,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        env_spec: EnvSpec | None = None,
        data_format: DataFormat = "hdf5",
        overwrite: bool = False,
    ) -> None:
        check_new_id(dataset_id, overwrite)
        for name, space in (("observation", observation_space), ("action", action_space)):
            try:
                serialize_space(space)
            except NotImplementedError as error:
                raise ValueError(f"Minari cannot store the {name} space {space}: {error}.") from None
        self.dataset_id, self.overwrite = dataset_id, overwrite
        self.n_steps = self.n_episodes = 0
        self._infos = InfoColumns()
        self._episode_metadata: list[dict[str, float]] = []
        with _saying_where():
            self._folder = tempfile.TemporaryDirectory(prefix=".recording-", dir=get_dataset_path())
            self._storage = MinariStorage.new(
                Path(self._folder.name) / "data",
                observation_space=observation_space,
                action_space=action_space,
                env_spec=env_spec,
                data_format=data_format,
                # JPEG would change the observations that a policy saw.
                jpeg_encoding=False,
            )

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.cleanup()

    def add_episode(
        self,
        observations: Any,
        actions: Any,
        rewards: Sequence[float] | np.ndarray,
        terminations: Sequence[bool] | np.ndarray,
        truncations: Sequence[bool] | np.ndarray,
        infos: Sequence[Mapping[str, Any]] | None = None,
        seed: int | None = None,
    ) -> None:
        """Add one episode of ``n_steps`` steps.

        :param observations: a list of ``n_steps + 1`` observations, or the same stacked along the first axis of each array
        :param actions: ``n_steps`` actions, in the same way
        :param rewards: ``(n_steps,)``
        :param terminations: ``(n_steps,)``
        :param truncations: ``(n_steps,)``; neither flag may be set at the end of an episode that was cut
        :param infos: ``n_steps + 1`` of them, the first from the reset; numbers and arrays of numbers are kept. The keys are those
            of the first episode; whole numbers become float64; where a step lacks one it holds NaN or false
        :param seed: which the env was reset with
        :raises ValueError: if the lengths do not agree, the episode goes on after its end, or a number is NaN or infinite
        """
        # Minari types these as lists, and takes arrays.
        flags: dict[str, Any] = {
            "rewards": np.asarray(rewards, np.float64),
            "terminations": np.asarray(terminations, bool),
            "truncations": np.asarray(truncations, bool),
        }
        episode = EpisodeBuffer(
            id=self.n_episodes,
            seed=seed,
            observations=stack(self._storage.observation_space, observations),
            actions=stack(self._storage.action_space, actions),
            infos=None if infos is None else self._infos.stack(infos),
            **flags,
        )
        check_episode(f"Episode {self.n_episodes}", episode)
        steps = len(episode.rewards)
        if infos is not None and len(infos) != steps + 1:
            raise ValueError(f"Episode {self.n_episodes} has {steps} rewards and {len(infos)} infos, in place of {steps + 1}.")
        if self._storage.FORMAT == "arrow" and steps >= ARROW_ROWS:
            raise ValueError(
                f"Episode {self.n_episodes} has {steps} steps: Minari reads at most {ARROW_ROWS - 1} from arrow. Use hdf5."
            )
        with _saying_where():
            parts = (episode.observations, episode.actions, episode.infos, *flags.values())
            _check_room(Path(self._folder.name), sum(np.asarray(leaf).nbytes for leaf in leaves(parts)))
            self._storage.update_episodes([episode])
        self._episode_metadata.append(minari.EpisodeMetadataCallback()(flags))
        self.n_episodes += 1
        self.n_steps += steps

    def publish(self, metadata: Mapping[str, Any] | None = None) -> minari.MinariDataset:
        """Put the dataset in its place; the writer is then done.

        :param metadata: further entries of the dataset's metadata, JSON and, for ``author``, a set
        :raises FileExistsError: if a dataset of this id has appeared meanwhile and ``overwrite`` is false
        :raises ValueError: if no episode was added
        """
        if self.n_episodes == 0:
            raise ValueError(f"No episode was added to {self.dataset_id}.")
        check_new_id(self.dataset_id, self.overwrite)
        own = {"dataset_id": self.dataset_id, "minari_version": minari.__version__}
        target, new = get_dataset_path(self.dataset_id), Path(self._folder.name) / "new"
        with _saying_where():
            _check_room(new.parent, 1000 * self.n_episodes)
            self._storage.update_episode_metadata(self._episode_metadata)
            self._storage.update_metadata({**(metadata or {}), **own})
            namespace = parse_dataset_id(self.dataset_id)[0]
            if namespace is not None and namespace not in list_local_namespaces():
                with suppress(ValueError):  # another process was faster
                    create_namespace(namespace)
            new.mkdir()
            (new.parent / "data").rename(new / "data")
            for path in (*new.rglob("*"), new):
                _flush(path)
            try:
                if self.overwrite and target.exists():
                    target.rename(target.with_name(f".{target.name}.{secrets.token_hex(4)}.former"))
                new.rename(target)
                _flush(target.parent)
            finally:
                settle(target)
        self._folder.cleanup()
        return minari.MinariDataset(target / "data")


def _check_room(folder: Path, n_bytes: int) -> None:
    # Twice, for what the formats add
    if shutil.disk_usage(folder).free < 2 * n_bytes + ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _saying_where() -> Iterator[None]:
    # h5py raises a RuntimeError for some of the system's errors, with their number in the text.
    try:
        yield
    except (OSError, RuntimeError) as error:
        found = re.search(r"errno = (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else errno.EIO)
        reason = os.strerror(number) if found else getattr(error, "strerror", None) or str(error)
        raise OSError(
            number,
            f"{reason}. No dataset was written, and a former one is as it was; make room, or set `MINARI_DATASETS_PATH` to another "
            "folder",
            str(get_dataset_path()),
        ) from error


def settle(target: Path) -> None:
    """Finish what a process did that died while it replaced a dataset: the former comes back, unless the new one is there.

    :param target: the dataset's folder
    """
    for former in list(target.parent.glob(f".{target.name}.*.former")):
        if not target.exists():
            with suppress(OSError):  # another process was faster, or the folder is read-only
                former.rename(target)
        elif former.is_symlink():
            former.unlink(missing_ok=True)
        else:
            shutil.rmtree(former, ignore_errors=True)


def _flush(path: Path) -> None:
    # To the disk; only POSIX opens folders.
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_new_id(dataset_id: str, overwrite: bool) -> None:
    """Check that a dataset of this id may be written.

    :raises ValueError: if the id is malformed
    :raises FileExistsError: if there is one and ``overwrite`` is false
    """
    check_id(dataset_id)
    path = get_dataset_path(dataset_id)
    settle(path)
    if path.exists() and not (path / "data").exists():
        raise FileExistsError(f"{path} exists and is no dataset: choose another id than {dataset_id!r}.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"There is a dataset {dataset_id!r} already, at {path}. Choose another id or version, or replace it with "
            "`overwrite=True`."
        )


def check_id(dataset_id: str) -> None:
    """Check an id's form.

    :raises ValueError: if it is not ``namespace/name-v0``
    """
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):  # it raises a TypeError where the version is missing
        raise ValueError(
            f"{dataset_id!r} is no dataset id. Ids have the form namespace/name-v0, of letters, digits, - and _, the namespace "
            "with two characters or more."
        ) from None


def recoverable_spec(env: gym.Env[Any, Any]) -> EnvSpec | None:
    """The specification from which an env can be rebuilt, as far as it has one.

    ``Monitor`` and ``render_mode`` are left out of it: they only watch. An entry point given as a class is replaced by its name.

    :return: ``None``, with a warning, where the env cannot be rebuilt from text
    """
    spec = deepcopy(env.spec)
    if spec is None:
        reason = "it is not registered with `gymnasium.register`"
    else:
        spec.additional_wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.name != "Monitor")
        spec.kwargs.pop("render_mode", None)
        entry = spec.entry_point
        if isinstance(entry, type) and "." not in entry.__qualname__:
            spec.entry_point = f"{entry.__module__}:{entry.__qualname__}"
        unknown = [wrapper.name for wrapper in spec.additional_wrappers if wrapper.kwargs is None]
        try:
            spec.to_json()
        except (TypeError, ValueError) as error:
            reason = str(error)
        else:
            if not unknown:
                return spec
            reason = f"the wrappers {unknown} do not record their arguments (inherit from `gymnasium.utils.RecordConstructorArgs`)"
    warnings.warn(f"{env} cannot be rebuilt from the dataset: {reason}.", stacklevel=2)
    return None
