"""Writing Minari datasets: nothing half-written can be taken for a whole."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
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

from sb3_diffrl.offline.spaces import first_fault, leaves, stack

DataFormat = Literal["hdf5", "arrow"]
# Where an info lies in a nest of dictionaries, and infos by that; None for what is no number.
InfoPath = tuple[str, ...]
FlatInfo = dict[InfoPath, np.ndarray | None]


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
            of the first episode; where a step lacks one it holds NaN, 0 or false
        :param seed: which the env was reset with
        :raises ValueError: if the lengths do not agree or a number is NaN or infinite
        """
        rewards = np.asarray(rewards, np.float64)
        steps = len(rewards)
        data = {
            "observations": (self._storage.observation_space, observations, steps + 1),
            "actions": (self._storage.action_space, actions, steps),
        }
        stacked = {name: stack(space, values) if isinstance(values, list) else values for name, (space, values, _) in data.items()}
        if steps == 0:
            raise ValueError(f"Episode {self.n_episodes} has no steps.")
        lengths = {name: len(leaf) for name, tree in stacked.items() for leaf in leaves(tree)}
        lengths |= {"terminations": len(terminations), "truncations": len(truncations)}
        if infos is not None:
            lengths["infos"] = len(infos)
        for name, length in lengths.items():
            expected = steps + (name in ("observations", "infos"))
            if length != expected:
                raise ValueError(f"Episode {self.n_episodes} has {steps} rewards and {length} {name}: {expected} are needed.")
        for name, tree in (*stacked.items(), ("rewards", rewards)):
            for leaf in leaves(tree):
                fault = first_fault(leaf)
                if fault is not None:
                    raise ValueError(
                        f"Episode {self.n_episodes}, step {fault[0]}: {name} has the value {leaf[fault]}, which is not finite."
                    )
        # Minari types these as lists, and takes arrays.
        flags: dict[str, Any] = {
            "rewards": rewards,
            "terminations": np.asarray(terminations, bool),
            "truncations": np.asarray(truncations, bool),
        }
        episode = EpisodeBuffer(
            id=self.n_episodes,
            seed=seed,
            observations=stacked["observations"],
            actions=stacked["actions"],
            infos=None if infos is None else self._infos.stack(infos),
            **flags,
        )
        self._storage.update_episodes([episode])
        self._episode_metadata.append(minari.EpisodeMetadataCallback()({"rewards": rewards}))
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
        self._storage.update_episode_metadata(self._episode_metadata)
        own = {"dataset_id": self.dataset_id, "minari_version": minari.__version__}
        self._storage.update_metadata({**own, **(metadata or {})})

        check_new_id(self.dataset_id, self.overwrite)
        namespace = parse_dataset_id(self.dataset_id)[0]
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        target, new = get_dataset_path(self.dataset_id), Path(self._folder.name) / "new"
        new.mkdir()
        (Path(self._folder.name) / "data").rename(new / "data")
        if target.exists():
            target.rename(Path(self._folder.name) / "old")
        new.rename(target)
        self._folder.cleanup()
        return minari.MinariDataset(target / "data")


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
        :return: arrays ``(n, ...)``
        """
        rows = [_flat_info(info) for info in infos]
        if self._columns is None:
            self._columns = _columns(rows)
        nested: dict[str, Any] = {}
        for path, (dtype, shape) in self._columns.items():
            group = nested
            for key in path[:-1]:
                group = group.setdefault(key, {})
            group[path[-1]] = values = np.full((len(rows), *shape), np.nan if dtype.kind == "f" else 0, dtype)
            for i, row in enumerate(rows):
                value = row.get(path)
                if value is not None and value.shape == shape:
                    values[i] = value
                elif path in row:
                    self._warn(path)
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
            flat[(*prefix, str(key))] = array if array.dtype.kind in "biuf" else None
    return flat


def check_new_id(dataset_id: str, overwrite: bool) -> None:
    """Check that a dataset of this id may be written.

    :raises ValueError: if the id is malformed
    :raises FileExistsError: if there is one and ``overwrite`` is false
    """
    check_id(dataset_id)
    path = get_dataset_path(dataset_id)
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
            f"{dataset_id!r} is no dataset id. Ids have the form namespace/name-v0, of letters, digits, - and _, the namespace with "
            "two characters or more."
        ) from None


def recoverable_spec(env: gym.Env[Any, Any]) -> EnvSpec | None:
    """The specification from which an env can be rebuilt, as far as it has one.

    ``Monitor`` is left out of it: it only watches. An entry point given as a class is replaced by its name.

    :return: ``None``, with a warning, where the env cannot be rebuilt from text
    """
    spec = deepcopy(env.spec)
    if spec is None:
        reason = "it is not registered with `gymnasium.register`"
    else:
        spec.additional_wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.name != "Monitor")
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
