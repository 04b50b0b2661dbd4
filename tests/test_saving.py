"""Models, policies and replay buffers round-trip as JSON and tensors alone; what could run code is refused by name."""

import io
import json
import pickle
import zipfile
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

from sb3_diffrl import LQL, NCLQL, DiffusionBC
from sb3_diffrl.common import CosineSchedule
from sb3_diffrl.lql.langevin import LangevinSampler
from sb3_diffrl.lql.policies import LangevinPolicy
from sb3_diffrl.offline import OfflineDataset
from sb3_diffrl.saving import ModelFileError, versions
from sb3_diffrl.saving.archive import ENTRY
from sb3_diffrl.saving.encoding import NotAllowedError, decode, encode
from sb3_diffrl.timesteps import timestep_sampler_by_name
from sb3_diffrl.timesteps.factory import RULES

from .envs import RandomEnv, box_env

TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 5, "batch_size": 8, "device": "cpu", "seed": 0}


def round_trip(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -0.1, "text", [1, [2]], {"a": {"b": 1}}, (1, (2, "x")), {1, 2}, {1: "one", (2, 3): "pair"}, {"$": 1}),
        *(float("inf"), 2**200, OrderedDict([("b", 1), ("a", 2)]), deque([{"r": 1.0}], maxlen=7), Path("a/b")),
        *(np.float32(0.1), np.int64(7), np.bool_(True), np.dtype("float16"), np.float32, bool),
        *(TrainFreq(3, TrainFrequencyUnit.EPISODE), GoalSelectionStrategy.FUTURE),
        *(th.nn.Mish, th.nn.ReLU, th.optim.AdamW, FlattenExtractor, NatureCNN, ReplayBuffer, HerReplayBuffer, LangevinPolicy),
        *(LangevinSampler(n_levels=3), spaces.Dict([("z", spaces.Discrete(3, start=-1)), ("a", spaces.MultiBinary([2, 3]))])),
        *(spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Text(4, charset="ab")]), spaces.Discrete(5)),
        *(
            spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
            spaces.Box(0, 255, (4, 4, 3), np.uint8),
            spaces.Box(-1, 1, (2,), np.float16),
        ),
    ],
    ids=repr,
)
def test_what_is_allowed_comes_back_the_same(value: Any) -> None:
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


@pytest.mark.parametrize("dtype", ["b1", "u1", "i4", "i8", "f2", "f4", "f8", "c16", "U3", ">f4"])
def test_arrays_come_back_with_their_type_and_shape(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = round_trip(array)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    assert back.flags.writeable
    assert round_trip(np.float64(np.nan)) != round_trip(np.float64(np.nan))
    assert th.equal(round_trip(th.arange(3)), th.arange(3))


def test_a_spaces_random_state_comes_back() -> None:
    space = spaces.Box(-1, 1, (3,))
    space.seed(1)
    space.sample()
    np.testing.assert_array_equal(round_trip(space).sample(), space.sample())


@pytest.mark.parametrize(
    "schedule",
    [ConstantSchedule(0.1), LinearSchedule(1.0, 0.1, 0.5), FloatSchedule(LinearSchedule(1.0, 0.0, 1.0)), CosineSchedule(0.3)],
    ids=repr,
)
def test_schedules_come_back(schedule: Any) -> None:
    back = round_trip(schedule)
    assert [back(progress) for progress in (1.0, 0.6, 0.0)] == [schedule(progress) for progress in (1.0, 0.6, 0.0)]


@pytest.mark.parametrize("noise", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise_comes_back(noise: type[NormalActionNoise]) -> None:
    both = [VectorizedActionNoise(noise(np.zeros(2), 0.3 * np.ones(2)), 3) for _ in range(1)]
    both.append(round_trip(both[0]))
    draws = []
    for each in both:
        np.random.seed(0)  # noqa: NPY002
        draws.append(each())
    np.testing.assert_array_equal(draws[0], draws[1])


@pytest.mark.parametrize("weighting", ["", "+min_snr", "+p2"])
@pytest.mark.parametrize("rule", RULES)
def test_timestep_samplers_come_back_with_their_settings(rule: str, weighting: str) -> None:
    sampler = timestep_sampler_by_name(rule + weighting)
    if hasattr(sampler, "uniform_floor"):
        sampler.uniform_floor = 0.25  # type: ignore[assignment]
    back = round_trip(sampler)
    assert type(back) is type(sampler)
    settings = {name: value for name, value in vars(sampler).items() if not name.startswith("_")}
    assert {name: getattr(back, name) for name in settings} == settings


def custom_schedule(progress: float) -> float:
    return 1e-3 * progress


class CustomExtractor(FlattenExtractor):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (custom_schedule, "custom_schedule"),
        (lambda progress: progress, "<lambda>"),
        (CustomExtractor, "CustomExtractor"),
        ({"a": [CustomExtractor]}, "a: .*CustomExtractor"),
        (FloatSchedule(custom_schedule), "value_schedule: .*custom_schedule"),
        (np.array([{}]), "array of object"),
        (print, "print"),
        (np.random.default_rng(0), "Generator"),
        (ModelFileError, "ModelFileError"),
        (th.nn.Linear(1, 1), "Linear"),
    ],
)
def test_what_is_not_allowed_is_named(value: Any, named: str) -> None:
    with pytest.raises(NotAllowedError, match=named):
        encode(value)


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "subprocess.Popen", "builtins.eval", "sb3_diffrl.cli.main", "sb3_diffrl.zoo.cli.main"),
        *("sb3_diffrl.lql.lql.NonFiniteError", "sb3_diffrl.offline.writing.DatasetWriter", "sb3_diffrl.lql.lql.th.nn.Module"),
        *("torch.nn.Linear", ""),
    ],
)
@pytest.mark.parametrize("kind", ["class", "object", "enum"])
def test_a_file_names_no_other_class(kind: str, name: str) -> None:
    with pytest.raises(NotAllowedError, match="not allowed"):
        decode({"$": kind, "class": name, "arguments": {}, "name": "x"})


def trained(algorithm: type[LQL] = NCLQL, **kwargs: Any) -> LQL:
    return algorithm("MlpPolicy", box_env(), **{**TINY, **kwargs}).learn(20)


def same(first: BaseAlgorithm, second: BaseAlgorithm) -> None:
    for mine, theirs in zip(first.policy.state_dict().values(), second.policy.state_dict().values(), strict=True):
        assert th.equal(mine, theirs)
    obs = np.ones((3, 5), np.float32)
    np.testing.assert_array_equal(first.predict(obs, deterministic=True)[0], second.predict(obs, deterministic=True)[0])


ORDINARY: dict[str, dict[str, Any]] = {
    "default": {},
    "schedule": {"learning_rate": CosineSchedule(1e-3)},
    "linear": {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0)},
    "noise": {"action_noise": NormalActionNoise(np.zeros(3), np.ones(3))},
    "episodes": {"train_freq": (1, "episode"), "gradient_steps": -1},
    "n_steps": {"n_steps": 3},
    "policy": {"policy_kwargs": {"net_arch": {"qf": [8], "pi": []}, "activation_fn": th.nn.ReLU, "optimizer_class": th.optim.SGD}},
    "optimiser": {"policy_kwargs": {"net_arch": [8], "optimizer_kwargs": {"betas": (0.8, 0.9)}, "n_critics": 3}},
    "extractor": {"policy_kwargs": {"net_arch": [8], "features_extractor_class": FlattenExtractor}},
}


@pytest.mark.parametrize("kwargs", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_models_need_no_trust(kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(**kwargs)
    model.save(tmp_path / "model")
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr("cloudpickle.loads", None)
    loaded = NCLQL.load(tmp_path / "model", env=model.get_env(), device="cpu")
    same(model, loaded)
    before, after = (
        {name: value for name, value in vars(each).items() if isinstance(value, (int, float, str, tuple, list))}
        for each in (model, loaded)
    )
    assert {name: after[name] for name in before if not name.startswith("_last")} == {
        name: value for name, value in before.items() if not name.startswith("_last")
    }
    assert loaded.num_timesteps == 20
    assert list(loaded.ep_info_buffer or []) == list(model.ep_info_buffer or [])
    loaded.learn(10, reset_num_timesteps=False)


@pytest.mark.parametrize(
    "space",
    [
        *(spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary([2, 2]), spaces.Box(-1, 1, (2, 3))),
        spaces.Box(0, 255, (36, 36, 3), np.uint8),
        spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(-1, 1, (2, 2))}),
    ],
    ids=str,
)
def test_models_and_buffers_of_every_space_come_back(space: spaces.Space[Any], tmp_path: Path) -> None:
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    env = RandomEnv(space, spaces.Box(-1, 1, (2,)))
    model = NCLQL(policy, env, **TINY, buffer_size=20).learn(10)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = NCLQL.load(tmp_path / "model", env=model.get_env(), device="cpu", force_reset=False)
    loaded.load_replay_buffer(tmp_path / "buffer")
    for name, weights in model.policy.state_dict().items():
        assert th.equal(weights, loaded.policy.state_dict()[name])
    assert model.replay_buffer is not None
    assert loaded.replay_buffer is not None
    assert loaded.replay_buffer.size() == 10
    np.testing.assert_equal(loaded.replay_buffer.observations, model.replay_buffer.observations)
    np.testing.assert_array_equal(loaded.replay_buffer.actions, model.replay_buffer.actions)
    loaded.learn(5, reset_num_timesteps=False)


def test_what_runs_code_is_refused_by_name_and_loads_when_trusted(tmp_path: Path) -> None:
    model = trained(learning_rate=custom_schedule, policy_kwargs={"net_arch": [8], "features_extractor_class": CustomExtractor})
    model.save(tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"CustomExtractor in 'policy_kwargs', which could run any code.*`trusted=True`"):
        NCLQL.load(tmp_path / "model", device="cpu")
    given: dict[str, Any] = {"policy_kwargs": model.policy_kwargs}
    with pytest.raises(ModelFileError, match="custom_schedule in 'learning_rate'"):
        NCLQL.load(tmp_path / "model", custom_objects=given, device="cpu")
    given |= {"learning_rate": 1e-3}
    same(model, NCLQL.load(tmp_path / "model", custom_objects=given, device="cpu"))
    loaded = NCLQL.load(tmp_path / "model", device="cpu", trusted=True)
    same(model, loaded)
    assert loaded.lr_schedule(0.5) == 5e-4


def test_stable_baselines3_reads_the_file_as_its_own(tmp_path: Path) -> None:
    model = trained()
    model.save(tmp_path / "model")
    same(model, BaseAlgorithm.load.__func__(NCLQL, tmp_path / "model", device="cpu"))  # type: ignore[attr-defined]


def test_a_file_without_our_entry_says_so(tmp_path: Path) -> None:
    model = trained()
    BaseAlgorithm.save(model, tmp_path / "model")
    with pytest.raises(ModelFileError, match=rf"no entry {ENTRY}.*trusted=True"):
        NCLQL.load(tmp_path / "model")
    same(model, NCLQL.load(tmp_path / "model", trusted=True, device="cpu"))


def test_streams_are_saved_and_loaded(tmp_path: Path) -> None:
    model, buffer = trained(), io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    same(model, NCLQL.load(buffer, device="cpu"))
    with open(tmp_path / "model.zip", "wb") as file:
        model.save(file)
    same(model, NCLQL.load(tmp_path / "model", device="cpu"))


def test_versions_are_stored_compared_and_noted(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trained().save(tmp_path / "model")
    NCLQL.load(tmp_path / "model", device="cpu")
    assert not [warning for warning in recwarn if "other versions" in str(warning.message)]
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(entries[ENTRY])
    assert document["versions"] == versions()
    document["versions"]["torch"] = "1.0.0"
    document["versions"]["python"] = "3.1"
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        entries[ENTRY] = json.dumps(document).encode()
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.warns(UserWarning, match=r"other versions: python 3\.1, here .*; torch 1\.0\.0, here .*It was loaded") as warned:
        NCLQL.load(tmp_path / "old.zip", device="cpu")
    assert warned[0].filename == __file__


def test_wrong_env_is_an_error_of_the_caller(tmp_path: Path) -> None:
    trained().save(tmp_path / "model")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        NCLQL.load(tmp_path / "model", env=box_env(4, 3))
    with pytest.raises(FileNotFoundError):
        NCLQL.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "foo"}, "device string: foo"),
        ({"n_levels": 0}, r"What `load\(\)` was given does not fit: 'n_levels' is 0"),
        ({"custom_objects": {"tau": "x"}}, r"What `load\(\)` was given does not fit: 'tau' is 'x'"),
        ({"custom_objects": {"policy_kwargs": {"net_arch": [9]}}}, r"was given \(policy_kwargs\) do not make a NCLQL together"),
    ],
)
def test_what_the_caller_gives_is_the_callers_mistake(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    trained().save(tmp_path / "model")
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        NCLQL.load(tmp_path / "model", **{"device": "cpu", **given})
    assert not isinstance(caught.value, ModelFileError)


def test_a_file_of_another_algorithm_names_it(tmp_path: Path) -> None:
    trained().save(tmp_path / "model")
    for other in (LQL, DiffusionBC):
        with pytest.raises(
            ModelFileError, match=rf"was saved by NCLQL and does not make a {other.__name__}: load it by `NCLQL.load"
        ):
            other.load(tmp_path / "model", device="cpu")


# ---------------------------------------------------------------------- policies


def test_policies_round_trip(tmp_path: Path) -> None:
    model = trained()
    model.policy.save(tmp_path / "policy")
    loaded = LangevinPolicy.load(tmp_path / "policy", device="cpu")
    obs = np.ones((3, 5), np.float32)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_policies_with_classes_of_your_own_need_trust(tmp_path: Path) -> None:
    model = trained(policy_kwargs={"net_arch": [8], "features_extractor_class": CustomExtractor})
    model.policy.save(tmp_path / "policy")
    with pytest.raises(ModelFileError, match=r"CustomExtractor in 'features_extractor_class'.*trusted=True"):
        LangevinPolicy.load(tmp_path / "policy")
    assert LangevinPolicy.load(tmp_path / "policy", trusted=True).features_extractor_class is CustomExtractor


def tiny_dataset() -> OfflineDataset:
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(22, 3)).astype(np.float32), rng.uniform(-1, 1, (20, 2)).astype(np.float32)
    ends = np.arange(1, 21) % 10 == 0
    box = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 1, (2,))
    return OfflineDataset(*arrays, np.zeros(20, np.float32), np.zeros(20, bool), ends, np.arange(0, 21, 10), *box)


@pytest.mark.parametrize("sampler", ["uniform", timestep_sampler_by_name("adaptive+min_snr")], ids=["name", "object"])
def test_offline_models_and_policies_round_trip(sampler: Any, tmp_path: Path) -> None:
    model = DiffusionBC(
        "MlpPolicy", dataset=tiny_dataset(), timestep_sampler=sampler, policy_kwargs={"net_arch": [8]}, device="cpu"
    )
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    obs = np.ones((4, 3), np.float32)
    expected = model.predict(obs, deterministic=True)[0]
    for loaded in (DiffusionBC.load(tmp_path / "model", device="cpu"), type(model.policy).load(tmp_path / "policy", device="cpu")):
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)


# ---------------------------------------------------------------------- replay buffers


def assert_same_state(first: Any, second: Any) -> None:
    assert vars(first).keys() == vars(second).keys()
    for name, value in vars(first).items():
        if name not in ("env", "infos"):
            np.testing.assert_equal(vars(second)[name], value)


@pytest.mark.parametrize("kwargs", [{}, {"n_steps": 3}, {"buffer_size": 12}], ids=["plain", "n_steps", "wrapped"])
def test_replay_buffers_come_back(kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**{"buffer_size": 100, **kwargs})
    model.save_replay_buffer(tmp_path / "buffer")
    former = model.replay_buffer
    model.load_replay_buffer(tmp_path / "buffer")
    assert type(model.replay_buffer) is (NStepReplayBuffer if "n_steps" in kwargs else ReplayBuffer)
    assert_same_state(former, model.replay_buffer)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pkl"]


@pytest.mark.parametrize("copy_info_dict", [False, True])
def test_hindsight_buffers_come_back(copy_info_dict: bool, tmp_path: Path) -> None:
    kwargs = {"copy_info_dict": copy_info_dict}
    env = BitFlippingEnv(n_bits=3, continuous=True)
    model = NCLQL(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=kwargs, **{**TINY, "buffer_size": 50}
    ).learn(20)
    model.save_replay_buffer(tmp_path / "buffer")
    former = model.replay_buffer
    model.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    assert_same_state(former, model.replay_buffer)
    np.testing.assert_equal(former.infos.tolist(), model.replay_buffer.infos.tolist())  # type: ignore[union-attr]
    model.learn(10, reset_num_timesteps=False)


class OwnBuffer(ReplayBuffer):
    pass


def test_pickled_buffers_need_trust(tmp_path: Path) -> None:
    model = NCLQL("MlpPolicy", RandomEnv(spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))), replay_buffer_class=OwnBuffer, **TINY)
    model.save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ModelFileError, match=r"pickled one, which could run any code.*trusted=True"):
        model.load_replay_buffer(tmp_path / "buffer")
    model.load_replay_buffer(tmp_path / "buffer", trusted=True)
    assert type(model.replay_buffer) is OwnBuffer


def rewrite(path: Path, change: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        entries: dict[str, bytes | str] = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(entries["replay_buffer.json"])
    change(document["attributes"], entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (entries | {"replay_buffer.json": json.dumps(document)}).items():
            archive.writestr(name, content)


def array_entry(header: dict[str, Any], name: str) -> str:
    return f"{[array[0] for array in header['arrays']].index(name)}.npy"


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def wide(header: dict[str, Any], entries: dict[str, Any]) -> None:
    for name in ("observations", "next_observations"):
        entries[array_entry(header, name)] = npy(np.zeros((100, 1, 7), np.float32))


def many_rows(header: dict[str, Any], entries: dict[str, Any]) -> None:
    header["state"]["buffer_size"] = 3_000_000
    header["arrays"], header["state"]["rewards"] = [["observations", ""]], 0
    entries["0.npy"] = npy(np.zeros((3_000_000, 1, 0), np.float32))


DAMAGED: dict[str, Any] = {
    "other width": wide,
    "float64 rewards": lambda header, entries: entries.update({array_entry(header, "rewards"): npy(np.zeros((100, 1)))}),
    "narrow actions": lambda header, entries: entries.update({array_entry(header, "actions"): npy(np.zeros((100, 1, 1), "f4"))}),
    "no timeouts": lambda header, _: header["arrays"].pop(),
    "rewards are a number": lambda header, _: header["arrays"].remove(["rewards", ""]) or header["state"].update(rewards=0),
    "rows without data": many_rows,
    "more than is there": lambda header, entries: entries.update({array_entry(header, "dones"): npy(np.zeros((100, 1)))[:-8]}),
    "one more": lambda header, _: header["state"].update(sample=1),
    "position": lambda header, _: header["state"].update(pos=100),
    "dimension": lambda header, _: header["state"].update(action_dim=300),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_buffer_whose_parts_do_not_fit_is_refused(change: Any, tmp_path: Path) -> None:
    model = trained(buffer_size=100)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    rewrite(tmp_path / "buffer.pkl", change)
    with pytest.raises(ModelFileError, match=r"do not belong together|as large as it says"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")


@pytest.mark.parametrize(
    ("obs_dim", "action_dim", "n_envs", "named"),
    [(1, 3, 1, "observation_space"), (500, 3, 1, "observation_space"), (5, 1, 1, "action_space"), (5, 3, 2, "n_envs")],
)
def test_a_buffer_of_another_env_is_the_callers_mistake(
    obs_dim: int, action_dim: int, n_envs: int, named: str, tmp_path: Path
) -> None:
    model = trained()
    other = NCLQL("MlpPolicy", DummyVecEnv([lambda: box_env(obs_dim, action_dim)] * n_envs), **TINY, buffer_size=20)
    other.save_replay_buffer(tmp_path / "buffer")
    kept = model.replay_buffer
    with pytest.raises(ValueError, match=rf"does not belong to this model: its `{named}` is .* Load the buffer that") as caught:
        model.load_replay_buffer(tmp_path / "buffer")
    assert not isinstance(caught.value, ModelFileError)
    assert model.replay_buffer is kept
