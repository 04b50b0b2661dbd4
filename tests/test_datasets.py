"""Datasets: what is recorded is what is loaded, and bad data is named before it is learned from."""

import itertools
import json
import re
import tracemalloc
import warnings
from pathlib import Path
from typing import Any, Literal

import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from minari.dataset.minari_storage import MinariStorage
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.recording import record_dataset
from sb3_diffrl.offline.spaces import Normalizer, ObservationFlattener, check_same_spaces, same_space
from sb3_diffrl.offline.writing import DataFormat, DatasetWriter

from .envs import RandomEnv
from .minari_data import ACTION_SPACE, OBS_SPACE, Tape, hdf5_file, opened, write_episodes

pytestmark = pytest.mark.usefixtures("datasets_in_tmp_path")

FORMATS: list[DataFormat] = ["hdf5", "arrow"]
GOAL = spaces.Dict(
    {
        "observation": spaces.Box(-1, 1, (3,), np.float64),
        "achieved_goal": spaces.Box(-9, 9, (2,)),
        "desired_goal": spaces.Box(-9, 9, (2,)),
    }
)
SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (3, 2), np.float64),
    "discrete": spaces.Discrete(4, start=2),
    "goal": GOAL,
    "dict": spaces.Dict({"z": spaces.Box(0, 1, (2,)), "a": spaces.Discrete(3), "many": spaces.MultiBinary(4)}),
    "tuple": spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Dict({"x": spaces.Box(-1, 1, ()), "y": spaces.Discrete(2)})]),
}


class RandomLengths(RandomEnv):
    """Episodes of random length, which terminate or are truncated."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = super().reset(seed=seed, options=options)
        self.length = int(self.np_random.integers(1, 9))
        return result

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, _, over, info = super().step(action)
        terminates = self.length % 2 == 0
        return obs, float(self.np_random.normal()), over and terminates, over and not terminates, info


def flat(space: spaces.Space[Any], observation: Any) -> np.ndarray:
    """One observation by Gymnasium's rules, which know nothing of goals."""
    if space is GOAL:
        return np.concatenate([observation[key] for key in ("observation", "achieved_goal", "desired_goal")])
    return np.asarray(spaces.flatten(space, observation))


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt")
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("action_space", [spaces.Box(-2, 1, (2,)), spaces.Discrete(3)], ids=["box", "discrete"])
def test_what_the_env_gave_is_what_is_loaded(name: str, action_space: spaces.Space[Any], data_format: DataFormat) -> None:
    env = Tape(RandomLengths(SPACES[name], action_space))
    record_dataset(None, env, "test/round-v0", n_steps=30, seed=3, data_format=data_format)
    dataset = OfflineDataset.load("test/round-v0")

    assert dataset.n_steps == 30
    assert dataset.n_episodes == len(env.results) > 3
    assert (dataset.observation_space, dataset.action_space) == (env.observation_space, env.action_space)
    expected = [flat(SPACES[name], observation) for episode in env.observations for observation in episode]
    np.testing.assert_array_equal(dataset.observations, np.array(expected, np.float32))
    actions = [spaces.flatten(action_space, action) for episode in env.actions for action in episode]
    np.testing.assert_array_equal(dataset.actions, np.array(actions, np.float32))
    results = [result for episode in env.results for result in episode]
    np.testing.assert_array_equal(dataset.rewards, np.array([result[0] for result in results], np.float32))
    np.testing.assert_array_equal(dataset.terminations, [result[1] for result in results])
    ends = np.isin(np.arange(30), dataset.episode_starts[1:] - 1)
    np.testing.assert_array_equal(dataset.truncations, ends & ~dataset.terminations)


def test_rows_lead_to_the_observation_after_each_step() -> None:
    write_episodes("test/rows-v0", [3, 1, 2])
    dataset = OfflineDataset.load("test/rows-v0")
    np.testing.assert_array_equal(dataset.episode_starts, [0, 3, 4, 6])
    now, after = (dataset.observations[dataset.observation_rows + k] for k in (0, 1))
    np.testing.assert_array_equal(now, [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)])
    np.testing.assert_array_equal(after, np.add(now, (0, 1)))
    np.testing.assert_allclose(dataset.actions[:, 0], now[:, 1] / 10)
    assert [array.dtype for array in (dataset.observations, dataset.actions, dataset.rewards)] == [np.float32] * 3


@pytest.mark.parametrize("data_format", FORMATS)
def test_an_episode_that_was_cut_is_truncated_and_never_terminal(data_format: DataFormat) -> None:
    write_episodes("test/cut-v0", [2, 2, 2], ["terminated", "truncated", "open"], data_format)
    dataset = OfflineDataset.load("test/cut-v0")
    np.testing.assert_array_equal(dataset.terminations, [0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(dataset.truncations, [0, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(dataset.episode_returns, [2, 20, 200])
    np.testing.assert_allclose(dataset.returns_to_go(0.5), [1.5, 1, 15, 10, 150, 100])


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_returns_to_go_are_the_sums_written_out(discount: float) -> None:
    rng = np.random.default_rng(0)
    lengths = [1, 2, 7, 64, 65, 1, 130]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rewards = rng.normal(size=starts[-1]).astype(np.float32)
    n = len(rewards)
    none = np.zeros(n, bool)
    dataset = OfflineDataset(
        np.zeros((n + len(lengths), 1), np.float32),
        np.zeros((n, 1), np.float32),
        rewards,
        none,
        none,
        starts,
        OBS_SPACE,
        ACTION_SPACE,
    )
    expected = np.empty(n)
    for start, end in itertools.pairwise(starts):
        total = 0.0
        for i in reversed(range(start, end)):
            total = expected[i] = rewards[i] + discount * total
    np.testing.assert_allclose(dataset.returns_to_go(discount), expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_is_its_datasets_one_after_the_other() -> None:
    write_episodes("test/one-v0", [2, 3])
    other = write_episodes("test/two-v0", [4, 1], first=10)
    dataset = OfflineDataset.load(["test/one-v0", other])
    assert dataset.ids == ("test/one-v0", "test/two-v0")
    np.testing.assert_array_equal(dataset.episode_starts, [0, 2, 5, 9, 10])
    np.testing.assert_array_equal(dataset.observations[dataset.observation_rows, 0], [0, 0, 1, 1, 1, 10, 10, 10, 10, 11])
    assert OfflineDataset.load(dataset) is dataset


def test_a_part_of_a_dataset_can_be_loaded() -> None:
    whole = write_episodes("test/part-v0", [2, 5, 3])
    dataset = OfflineDataset.load(whole.filter_episodes(lambda episode: len(episode) != 5))
    np.testing.assert_array_equal(dataset.observations[dataset.observation_rows, 0], [0, 0, 2, 2, 2])


def test_loading_holds_hardly_more_than_the_arrays() -> None:
    rng = np.random.default_rng(0)
    n, length, dim = 40, 200, 17
    with DatasetWriter("test/memory-v0", spaces.Box(-np.inf, np.inf, (dim,), np.float64), ACTION_SPACE) as writer:
        for _ in range(n):
            flags = np.zeros(length, bool)
            writer.add_episode(rng.normal(size=(length + 1, dim)), rng.uniform(size=(length, 1)), np.ones(length), flags, flags)
        writer.publish()
    OfflineDataset.load("test/memory-v0")  # what is imported on the way is not counted
    tracemalloc.start()
    dataset = OfflineDataset.load("test/memory-v0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    arrays = (dataset.observations, dataset.actions, dataset.rewards, dataset.terminations, dataset.truncations)
    assert peak < 1.4 * sum(array.nbytes for array in arrays)


# Windows


@pytest.mark.parametrize("pad", ["none", "last"])
@pytest.mark.parametrize(("horizon", "stride"), [(1, 1), (2, 1), (3, 2), (4, 1), (2, 5)])
def test_windows_are_all_those_that_fit_in_an_episode(horizon: int, stride: int, pad: Literal["none", "last"]) -> None:
    lengths = [1, 9, 2, 5]
    write_episodes("test/windows-v0", lengths)
    dataset = OfflineDataset.load("test/windows-v0")
    expected = []
    for e, length in enumerate(lengths):
        for t in range(length):
            times = [t + k * stride for k in range(horizon)]
            if pad == "last" or times[-1] <= length:
                expected.append([(e, min(time, length)) for time in times])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        windows = dataset.windows(horizon, stride, pad)
    assert len(windows) == len(expected)
    np.testing.assert_array_equal(windows.observations(np.arange(len(windows))), expected)
    np.testing.assert_array_equal(dataset.observations[dataset.observation_rows[windows.starts]], np.array(expected)[:, 0])
    pick = np.array([2, 0, 2])
    np.testing.assert_array_equal(windows.observations(pick), np.array(expected)[pick])


def test_episodes_too_short_for_a_window_are_counted() -> None:
    write_episodes("test/short-v0", [1, 9, 2, 5])
    dataset = OfflineDataset.load("test/short-v0")
    with pytest.warns(UserWarning, match="2 of 4 episodes are left out"):
        windows = dataset.windows(4)
    assert windows.n_dropped == 2
    with pytest.raises(ValueError, match="takes 10 steps: the longest has 9"):
        dataset.windows(3, stride=5)
    with pytest.raises(ValueError, match="positive"):
        dataset.windows(0)


# Vectors


def test_a_normaliser_standardises_and_leaves_constants_their_scale() -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(10_000, 3)).astype(np.float32) * [1, 1e-3, 0] + [0, 100, 0.1]
    data = data.astype(np.float32)
    normalizer = Normalizer(3).fit(data, rows_at_once=999)
    out = normalizer.normalize(th.as_tensor(data))
    np.testing.assert_allclose(out.double().mean(dim=0), 0, atol=1e-2)
    np.testing.assert_allclose(out[:, :2].double().std(dim=0), 1, rtol=1e-2)
    assert normalizer.std[2] == 1
    np.testing.assert_allclose(normalizer.denormalize(out), data, rtol=1e-6)
    other = Normalizer(3)
    other.load_state_dict(normalizer.state_dict())
    assert th.equal(other.normalize(th.ones(3)), normalizer.normalize(th.ones(3)))


@pytest.mark.parametrize("name", SPACES)
def test_one_observation_and_a_batch_are_flattened_alike(name: str) -> None:
    space = SPACES[name]
    flatten = ObservationFlattener(space)
    env = DummyVecEnv([lambda: RandomEnv(space, ACTION_SPACE)] * 3) if name != "tuple" else None
    one = space.sample()
    np.testing.assert_allclose(flatten(one, batched=False), flat(space, one)[None], rtol=1e-6)
    assert not flatten.is_batched(one)
    assert flatten.dim == flatten(one, batched=False).shape[1]
    if env is not None:  # SB3's vectorised envs take no nested spaces
        batch = env.reset()
        assert flatten.is_batched(batch)
        assert flatten(batch, batched=True).shape == (3, flatten.dim)
        assert flatten(batch, batched=True).dtype == np.float32


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), "images"),
        (spaces.Dict({"camera": spaces.Box(0, 255, (8, 8), np.uint8)}), "images"),
        (spaces.Text(5), "cannot be flattened"),
        (spaces.Sequence(spaces.Discrete(2)), "cannot be flattened"),
    ],
)
def test_spaces_without_a_vector_are_refused(space: spaces.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObservationFlattener(space)


def test_a_discrete_value_outside_its_space_is_refused() -> None:
    with pytest.raises(ValueError, match="outside its space"):
        ObservationFlattener(spaces.Discrete(3, start=1))(np.array([0, 1]), batched=True)


def test_spaces_differ_by_more_than_precision() -> None:
    box = spaces.Box(-1, 1, (2,), np.float32)
    assert same_space(box, spaces.Box(-1, 1, (2,), np.float64))
    others: list[spaces.Space[Any]] = [
        spaces.Box(-1, 1, (3,)),
        spaces.Box(-1, 2, (2,)),
        spaces.Box(-1, 1, (2,), np.int8),
        spaces.Discrete(2),
    ]
    for other in others:
        assert not same_space(box, other)
        with pytest.raises(ValueError, match=re.escape(str(other))):
            check_same_spaces("the model", (ACTION_SPACE, box), "the env", (ACTION_SPACE, other))
    nested = [spaces.Dict({"a": spaces.Tuple([space, box])}) for space in (box, others[1])]
    assert same_space(nested[0], nested[0])
    assert not same_space(*nested)


# Bad input


@pytest.mark.parametrize(
    ("dataset_id", "command"),
    [
        ("sb3-diffrl/pointmaze/umaze-v0", "sb3-diffrl dataset make sb3-diffrl/pointmaze/umaze-v0"),
        ("D4RL/door/human-v2", "minari download D4RL/door/human-v2"),
    ],
)
def test_an_absent_id_names_the_command_that_gets_it(dataset_id: str, command: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"`{command}`")):
        OfflineDataset.load(dataset_id)


def test_an_absent_id_names_its_like_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / ".minari" / "datasets"))
    write_episodes("test/walker-v1", [2])
    with pytest.raises(FileNotFoundError, match="On disk is 'test/walker-v1'"):
        OfflineDataset.load("test/walker-v0")


@pytest.mark.parametrize("dataset_id", ["test/x", "", "test/x y-v0", "-v0", "../x-v0"])
def test_a_malformed_id_is_told_its_form(dataset_id: str) -> None:
    with pytest.raises(ValueError, match="namespace/name-v0"):
        OfflineDataset.load(dataset_id)


def test_what_is_no_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="list of datasets is empty"):
        OfflineDataset.load([])
    number: Any = 3
    with pytest.raises(TypeError, match="an id, a MinariDataset or a list"):
        OfflineDataset.load([number])


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    storage = MinariStorage.new(tmp_path / "data", OBS_SPACE, ACTION_SPACE)
    storage.update_metadata({"dataset_id": "test/empty-v0", "minari_version": minari.__version__})
    with pytest.raises(ValueError, match="'test/empty-v0' is empty"):
        OfflineDataset.load(minari.MinariDataset(storage))
    nothing = write_episodes("test/some-v0", [2]).filter_episodes(lambda _: False)
    with pytest.raises(ValueError, match="'test/some-v0' is empty"):
        OfflineDataset.load(nothing)


def test_datasets_of_different_spaces_do_not_mix() -> None:
    write_episodes("test/one-v0", [2])
    with DatasetWriter("test/two-v0", OBS_SPACE, spaces.Box(-1, 1, (1,))) as writer:
        writer.add_episode(np.zeros((2, 2)), np.zeros((1, 1)), [0], [True], [False])
        writer.publish()
    with pytest.raises(ValueError, match="action space of dataset 'test/two-v0' is not that of dataset 'test/one-v0'"):
        OfflineDataset.load(["test/one-v0", "test/two-v0"])


@pytest.mark.parametrize(
    ("key", "index", "value"),
    [("observations", (2, 1), np.nan), ("observations", (3, 0), 1e300), ("actions", (2, 0), -np.inf), ("rewards", 1, np.nan)],
)
def test_a_number_that_is_not_finite_is_found(key: str, index: Any, value: float) -> None:
    dataset = write_episodes("test/fault-v0", [4, 3])
    with opened(dataset) as file:
        file[f"episode_1/{key}"][index] = value
    step = index[0] if isinstance(index, tuple) else index
    with pytest.raises(ValueError, match=f"'test/fault-v0', episode 1, step {step}: {key} has the value {re.escape(str(value))}"):
        OfflineDataset.load("test/fault-v0")


def test_a_fault_in_a_dictionary_is_found() -> None:
    fault = GOAL.sample()
    with DatasetWriter("test/goal-v0", GOAL, ACTION_SPACE) as writer:
        writer.add_episode([GOAL.sample(), fault], [np.zeros(1)], [0], [False], [True])
        dataset = writer.publish()
    with opened(dataset) as file:
        file["episode_0/observations/desired_goal"][1, 0] = np.inf
    with pytest.raises(ValueError, match=r"episode 0, step 1: observations has the value inf at index \[0\]"):
        OfflineDataset.load("test/goal-v0")


def test_a_truncated_file_is_named() -> None:
    dataset = write_episodes("test/half-v0", [50] * 10)
    file = hdf5_file(dataset)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"'test/half-v0' is damaged: {re.escape(str(file))}"):
        OfflineDataset.load("test/half-v0")


def test_corrupted_bytes_are_told_with_the_file() -> None:
    dataset = write_episodes("test/bytes-v0", [50] * 4)
    file = hdf5_file(dataset)
    data = bytearray(file.read_bytes())
    data[2048:20_000] = b"\xff" * (20_000 - 2048)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        OfflineDataset.load("test/bytes-v0")


@pytest.mark.parametrize(
    "fault", ["no file", "no metadata", "garbled metadata", "a missing episode", "wrong count", "newer Minari"]
)
def test_a_damaged_dataset_is_named(fault: str) -> None:
    dataset = write_episodes("test/damaged-v0", [3, 3])
    folder = Path(dataset.storage.data_path)
    metadata = json.loads((folder / "metadata.json").read_text())
    if fault == "no file":
        hdf5_file(dataset).unlink()
    elif fault == "no metadata":
        (folder / "metadata.json").unlink()
    elif fault == "garbled metadata":
        (folder / "metadata.json").write_text("{")
    elif fault == "a missing episode":
        with opened(dataset) as file:
            del file["episode_1"]
    else:
        change = {"total_steps": 7} if fault == "wrong count" else {"minari_version": "9.9.9"}
        (folder / "metadata.json").write_text(json.dumps({**metadata, **change}))
    with pytest.raises(ValueError, match="'test/damaged-v0' is damaged"):
        OfflineDataset.load("test/damaged-v0")


def test_a_truncated_arrow_file_is_named() -> None:
    dataset = write_episodes("test/arrow-v0", [5, 5], data_format="arrow")
    file = next(Path(dataset.storage.data_path, "1").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="'test/arrow-v0' is damaged"):
        OfflineDataset.load("test/arrow-v0")


@pytest.mark.parametrize("key", ["terminations", "truncations"])
def test_an_episode_that_goes_on_after_its_end_is_refused(key: str) -> None:
    dataset = write_episodes("test/on-v0", [4, 4])
    with opened(dataset) as file:
        file[f"episode_1/{key}"][1] = True
    with pytest.raises(ValueError, match="episode 1 goes on after its end in step 1"):
        OfflineDataset.load("test/on-v0")


@pytest.mark.parametrize("key", ["observations", "actions", "truncations"])
def test_arrays_of_other_lengths_are_refused(key: str) -> None:
    dataset = write_episodes("test/lengths-v0", [4])
    with opened(dataset) as file:
        values = file[f"episode_0/{key}"][:-1]
        del file[f"episode_0/{key}"]
        file[f"episode_0/{key}"] = values
    with pytest.raises(ValueError, match=f"episode 0 has 4 rewards and {len(values)} {key}"):
        OfflineDataset.load("test/lengths-v0")
