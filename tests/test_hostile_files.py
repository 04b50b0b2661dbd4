"""Files from anywhere: a clear error or the right model; nothing is run, nothing is written, memory stays bounded."""

import ctypes
import io
import json
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise

from sb3_diffrl import LQL, NCLQL, DiffusionBC, OfflineDataset
from sb3_diffrl.common import NonFiniteError
from sb3_diffrl.offline.writing import DatasetWriter
from sb3_diffrl.saving import ModelFileError
from sb3_diffrl.saving.archive import ENTRY
from sb3_diffrl.saving.encoding import encode
from sb3_diffrl.timesteps.adaptive import AdaptiveTimestepSampler

from . import fuzzing
from .envs import box_env
from .hostile_datasets import ARROW, HARMLESS, HDF5, SECRET, good_dataset
from .mutations import MARK_VARIABLE, MUTATIONS, Planted, pack, unpack
from .test_saving import tiny_dataset

SEEDS = 11


@pytest.fixture(scope="module")
def files() -> dict[str, tuple[type[Any], bytes, dict[str, th.Tensor]]]:
    models: list[Any] = [
        NCLQL(
            "MlpPolicy", box_env(), buffer_size=100, policy_kwargs={"net_arch": [8]}, learning_starts=5, batch_size=8, device="cpu"
        ).learn(10),
        DiffusionBC("MlpPolicy", dataset=tiny_dataset(), policy_kwargs={"net_arch": [8]}, device="cpu", seed=0).learn(3),
    ]
    found = {}
    for model in models:
        buffer = io.BytesIO()
        model.save(buffer)
        found[type(model).__name__] = (type(model), buffer.getvalue(), model.policy.state_dict())
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("algorithm", ["NCLQL", "DiffusionBC"])
def test_a_mutated_file_is_an_error_or_the_right_model(
    algorithm: str, mutation: str, files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, content, weights = files[algorithm]
    monkeypatch.setenv(MARK_VARIABLE, str(tmp_path / "mark"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.zip"
    messages = []
    data = tiny_dataset()
    before = restart_peak()
    for seed in range(4 * SEEDS if mutation in ("replace_value", "flip_json") else SEEDS):
        path.write_bytes(MUTATIONS[mutation](content, np.random.default_rng([seed, zlib.crc32(mutation.encode())])))
        given = {"env": box_env()} if cls is NCLQL else {"dataset": data}
        try:
            loaded = cls.load(path, device="cpu", **given)
        except ModelFileError as error:
            messages.append(str(error))
        else:
            assert {name: value.shape for name, value in loaded.policy.state_dict().items()} == {
                name: value.shape for name, value in weights.items()
            }
            loaded.predict(np.zeros(loaded.observation_space.shape, np.float32))
            with suppress(NonFiniteError):  # which is promised, too: a large learning rate is a number
                loaded.learn(2, reset_num_timesteps=False)
        assert [file.name for file in tmp_path.iterdir()] == ["model.zip"], f"seed {seed} ran something, or wrote a file"
    if mutation not in ("flip_json", "replace_value", "drop_entry", "traverse", "plant_pickle", "flip_bits"):
        assert len(messages) == SEEDS
    assert all(len(message) > 30 for message in messages)
    # The bombs would take gigabytes.
    assert peak() - before < 500e6


def restart_peak() -> int:
    """Begin to measure the largest memory anew.

    :return: bytes in memory now
    """
    # Freed memory that the process keeps would hide what takes it again.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Most bytes in memory at once since ``restart_peak()``."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def test_the_peak_of_memory_is_seen_after_a_larger_one() -> None:
    # Otherwise the limit above could not fail.
    np.ones(2**25)
    pieces = [np.ones(2**14) for _ in range(2**11)]  # which stay in the heap when they are freed
    pieces.clear()
    before = restart_peak()
    np.ones(2**24)
    assert peak() - before > 100e6


def with_attributes(content: bytes, **changed: Any) -> io.BytesIO:
    entries = unpack(content)
    document = json.loads(entries[ENTRY])
    document["attributes"] |= changed
    return io.BytesIO(pack({**entries, ENTRY: json.dumps(document).encode()}))


IMPOSSIBLE: dict[str, list[Any]] = {
    "action_space": [0.5, True, -1, None, {"$": "Discrete", "n": 3, "start": 0}],
    "observation_space": [0.5, None],
    "verbose": [{"$": "tuple", "items": [1]}, "x"],
    "policy_class": [None, {"$": "class", "class": "torch.nn.ReLU"}],
    "policy_kwargs": [3, [], {"net_arch": "x"}, {"n_critics": 10**9}, {"activation_fn": "relu"}],
    "learning_rate": ["x", None, -1.0, float("nan"), {"$": "class", "class": "torch.nn.ReLU"}],
    "tau": ["x", None, 2.0, float("nan")],
    "gamma": [[], 1e308],
    "train_freq": [2**40, 0, None, {"$": "tuple", "items": [2**40, "step"]}, {"$": "tuple", "items": [1]}],
    "gradient_steps": [None, 1.5, 2**40, -7],
    "learning_starts": ["x", None, -5],
    "batch_size": [0, 10**12, None],
    "buffer_size": [10**9, "x", 0],
    "n_envs": [10**9, 0, None],
    "n_levels": [4 * 10**6, 0, "x"],
    "n_particles": [10**9, None],
    "n_langevin_steps": [10**9, 10**5],
    "action_noise": [3, {"$": "class", "class": "torch.nn.ReLU"}],
    "on_nonfinite": ["other", None],
    "_random_state": [[], {"seed": 0}, "x"],
    "ep_info_buffer": [None, [], {"$": "deque", "items": [{"x": 1}], "maxlen": 3}],
    "_last_obs": [3, encode(np.zeros((1, 500), np.float32))],
    "num_timesteps": ["x", None, -1, 1e308],
    "seed": ["x", -1, 0.5],
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_attribute_that_cannot_be_is_refused_by_name(name: str, files: dict[str, Any]) -> None:
    cls, content, _ = files["NCLQL"]
    before = restart_peak()
    for value in IMPOSSIBLE[name]:
        for given in ({}, {"env": box_env()}):
            if name == "_last_obs" and given:
                continue  # it is forgotten with another env
            with pytest.raises(ModelFileError, match=f"(?i)'{name}'|does not make|'net_arch'|'n_critics'|'activation_fn'"):
                cls.load(with_attributes(content, **{name: value}), device="cpu", **given)
    assert peak() - before < 200e6


def test_noise_for_very_many_envs_is_not_made(files: dict[str, Any]) -> None:
    cls, content, _ = files["NCLQL"]
    vectorised = encode(VectorizedActionNoise(NormalActionNoise(np.zeros(3), np.ones(3)), 1))
    vectorised["arguments"]["n_envs"] = 4 * 10**6
    before = restart_peak()
    with pytest.raises(ModelFileError, match="'n_envs' is 4000000, it should be from 1 to 10,000"):
        cls.load(with_attributes(content, action_noise=vectorised), device="cpu")
    for width in (2, 4):
        other = NormalActionNoise(np.zeros(width), np.ones(width))
        with pytest.raises(ModelFileError, match="'action_noise' does not belong in this model"):
            cls.load(with_attributes(content, action_noise=encode(other)), device="cpu")
    assert peak() - before < 200e6


def test_a_policy_of_very_many_levels_is_not_made(tmp_path: Path) -> None:
    policy = NCLQL("MlpPolicy", box_env(), buffer_size=10, policy_kwargs={"net_arch": [8]}, device="cpu").policy
    policy.save(tmp_path / "policy")
    saved = th.load(tmp_path / "policy", weights_only=True)
    arguments = json.loads(saved["arguments"])
    arguments["attributes"]["sampler"]["arguments"]["n_levels"] = 3 * 10**6
    th.save({**saved, "arguments": json.dumps(arguments)}, tmp_path / "policy")
    before = restart_peak()
    with pytest.raises(ModelFileError, match="'n_levels' is 3000000"):
        type(policy).load(tmp_path / "policy", device="cpu")
    assert peak() - before < 200e6


def test_what_a_trusted_file_holds_is_taken(tmp_path: Path) -> None:
    model = NCLQL("MlpPolicy", box_env(), buffer_size=10, policy_kwargs={"net_arch": [8]}, device="cpu")
    model.n_particles = 10**6
    model.save(tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"'n_particles' is 1000000, .* `trusted=True` takes it as it is"):
        NCLQL.load(tmp_path / "model", device="cpu")
    assert NCLQL.load(tmp_path / "model", device="cpu", trusted=True).n_particles == 10**6
    assert NCLQL.load(tmp_path / "model", device="cpu", custom_objects={"n_particles": 2}).n_particles == 2


def test_settings_of_an_optimiser_are_the_models_own(files: dict[str, Any]) -> None:
    cls, content, _ = files["NCLQL"]
    entries = unpack(content)
    saved = th.load(io.BytesIO(entries["critic.optimizer.pth"]), weights_only=True)
    saved["param_groups"][0] |= {"betas": (0.9, float("nan")), "eps": "x", "lr": -1.0, "fused": None, "maximize": True}
    buffer = io.BytesIO()
    th.save(saved, buffer)
    model = cls.load(io.BytesIO(pack({**entries, "critic.optimizer.pth": buffer.getvalue()})), env=box_env(), device="cpu")
    group = model.critic.optimizer.param_groups[0]
    assert [group[name] for name in ("betas", "eps", "fused", "maximize")] == [(0.9, 0.999), 1e-8, True, False]
    assert th.equal(model.critic.optimizer.state_dict()["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


def test_optimisers_within_networks_are_compared_as_well() -> None:
    model = DiffusionBC(
        "MlpPolicy",
        dataset=tiny_dataset(),
        timestep_sampler=AdaptiveTimestepSampler(update_frequency=2),
        policy_kwargs={"net_arch": [8]},
        batch_size=4,
        device="cpu",
    ).learn(20)
    parameters: dict[str, Any] = model.get_parameters()
    name = next(name for name in parameters["policy"] if name.endswith("_extra_state"))
    model.set_parameters(parameters)
    for state in parameters["policy"][name]["optimizer"]["state"].values():
        state["exp_avg"] = th.zeros(1)
    with pytest.raises(RuntimeError, match=r"exp_avg of the optimiser in .* is of shape \(1,\)"):
        model.set_parameters(parameters)
    parameters["policy"][name] = {**parameters["policy"][name], "n_sweeps": "x"}
    with pytest.raises(RuntimeError, match=r"n_sweeps of .* is str, it should be int"):
        model.set_parameters(parameters)


def test_variables_of_other_classes_are_not_put_anywhere(files: dict[str, Any]) -> None:
    cls, content, _ = files["NCLQL"]
    buffer = io.BytesIO()
    th.save({"policy.critic.layers.0.weight": th.zeros(1)}, buffer)
    with pytest.raises(ModelFileError, match=r"holds variables of a class of your own.*trusted=True"):
        cls.load(io.BytesIO(pack({**unpack(content), "pytorch_variables.pth": buffer.getvalue()})), device="cpu")


def test_the_planted_pickle_works_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the tests above could not fail.
    monkeypatch.setenv(MARK_VARIABLE, str(tmp_path / "mark"))
    model = NCLQL("MlpPolicy", box_env(), buffer_size=100, policy_kwargs={"net_arch": [8]}, device="cpu")
    model.tensorboard_log = Planted()  # type: ignore[assignment]
    model.save(tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"mutations\.Planted in 'tensorboard_log'"):
        NCLQL.load(tmp_path / "model", device="cpu")
    assert not (tmp_path / "mark").exists()
    NCLQL.load(tmp_path / "model", device="cpu", trusted=True)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["env", "learn", "policy", "__class__", "replay_buffer", "device"])
def test_a_file_gives_no_attribute_that_acts(name: str, files: dict[str, Any], tmp_path: Path) -> None:
    _, content, _ = files["NCLQL"]
    entries = unpack(content)
    document = json.loads(entries[ENTRY])
    document["attributes"][name] = "this:Env-v0"
    (tmp_path / "model.zip").write_bytes(pack({**entries, ENTRY: json.dumps(document).encode()}))
    with pytest.raises(ModelFileError, match=f"it holds '{name}', which no saved model does"):
        NCLQL.load(tmp_path / "model", device="cpu")


def test_hostile_policies_and_buffers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK_VARIABLE, str(tmp_path / "mark"))
    model = LQL("MlpPolicy", box_env(), buffer_size=100, policy_kwargs={"net_arch": [8]}, device="cpu")
    for planted in ({"state_dict": Planted(), "data": {}}, Planted()):
        th.save(planted, tmp_path / "policy")
        with pytest.raises(ModelFileError):
            type(model.policy).load(tmp_path / "policy")
    for name, write in (("policy", model.policy.save), ("buffer.pkl", model.save_replay_buffer)):
        write(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            (tmp_path / name).write_bytes(MUTATIONS[("flip_bits", "truncate")[seed % 2]](content, rng))
            with suppress(ModelFileError):
                if name == "policy":
                    type(model.policy).load(tmp_path / name)
                else:
                    model.load_replay_buffer(tmp_path / name)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("algorithm", [LQL, NCLQL])
def test_compiled_code_takes_no_other_widths_than_torch(algorithm: type[LQL], backend: str) -> None:
    policy = algorithm(
        "MlpPolicy", box_env(), buffer_size=10, policy_kwargs={"net_arch": [8], "backend": backend}, device="cpu"
    ).policy
    if backend == "native" and not policy.critic.can_compile:
        pytest.skip("no compiler")
    for width in (0, 2, 4, 6, 500):
        features = th.zeros(4, width)
        with pytest.raises(RuntimeError):
            policy.sample_actions(features)
        with pytest.raises(RuntimeError):
            policy.critic.q_values(features, th.zeros(4, 3))
    with pytest.raises(RuntimeError):
        policy.critic.q_values(th.zeros(4, 5), th.zeros(4, 2))


# ---------------------------------------------------------------------- datasets


def hostile_dataset(spec: EnvSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    with DatasetWriter("test/hostile-v0", spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), env_spec=spec) as writer:
        writer.add_episode(np.zeros((11, 3)), np.zeros((10, 1)), np.zeros(10), np.zeros(10, bool), np.arange(1, 11) == 10)
        writer.publish()
    return "test/hostile-v0"


def spec(entry_point: str, env_id: str = "Hostile-v0", **kwargs: Any) -> EnvSpec:
    return EnvSpec(env_id, entry_point, kwargs=kwargs)


MARKING: dict[str, Any] = {"args": ["touch", "mark"]}


def with_wrapper(entry_point: str, **kwargs: Any) -> EnvSpec:
    made = gym.spec("Pendulum-v1")
    return EnvSpec(
        made.id, made.entry_point, additional_wrappers=(WrapperSpec(entry_point.partition(":")[2], entry_point, kwargs),)
    )


@pytest.mark.parametrize(
    "hostile",
    [
        spec("subprocess:Popen", **MARKING),
        spec("subprocess:Popen", "Pendulum-v1", **MARKING),
        with_wrapper("functools:partial"),
        with_wrapper("gymnasium.wrappers.rendering:RecordVideo", video_folder="mark"),
        with_wrapper("stable_baselines3.common.monitor:Monitor", filename="mark"),
        with_wrapper("gymnasium.wrappers.common:warnings"),
    ],
    ids=["function", "registered id", "wrapper", "video", "monitor", "module"],
)
def test_a_datasets_environment_runs_nothing(hostile: EnvSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_id = hostile_dataset(hostile, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = DiffusionBC("MlpPolicy", dataset=dataset_id, policy_kwargs={"net_arch": [8]}, batch_size=4, device="cpu")
    with pytest.warns(UserWarning, match="cannot be rebuilt"):
        model.learn(1)
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        model.dataset.recover_environment()
    assert not list(tmp_path.glob("mark*"))


def test_minari_itself_would_have_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the test above could not fail.
    dataset_id = hostile_dataset(spec("os:mkdir", path=str(tmp_path / "mark")), tmp_path, monkeypatch)
    with pytest.raises(Exception):  # noqa: B017, PT011
        minari.load_dataset(dataset_id).recover_environment()
    assert (tmp_path / "mark").exists()


def test_wrappers_of_gymnasium_are_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = with_wrapper("gymnasium.wrappers.transform_observation:FlattenObservation")
    env = OfflineDataset.load(hostile_dataset(wrapped, tmp_path, monkeypatch)).recover_environment()
    assert isinstance(env, gym.wrappers.FlattenObservation)


def test_a_dataset_that_claims_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_id = hostile_dataset(None, tmp_path, monkeypatch)
    path = next((tmp_path / "minari").rglob("metadata.json"))
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "total_steps": 10**13}))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"would take .* GiB of memory"):
        OfflineDataset.load(dataset_id)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("name", [*HDF5, *ARROW])
def test_a_crafted_dataset_is_refused_within_bounds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ARROW:
        pytest.importorskip("pyarrow")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")  # put back afterwards
    monkeypatch.setenv(MARK_VARIABLE, str(tmp_path / "mark"))
    monkeypatch.chdir(tmp_path)
    for seed in range(6 if name == "metadata" else 2):
        root = tmp_path / str(seed)
        root.mkdir()
        {**HDF5, **ARROW}[name](good_dataset(root, "hdf5" if name in HDF5 else "arrow"), np.random.default_rng(seed))
        if name in HARMLESS:
            assert not OfflineDataset.load("fuzz/good-v0").observations.any()
        else:
            with pytest.raises(ValueError, match=r"Dataset 'fuzz/good-v0' (is damaged.*make it again|would take)"):
                OfflineDataset.load("fuzz/good-v0")
        assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["external_link", "external_episode", "external_storage", "virtual_dataset"])
def test_minari_itself_reads_other_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the test above could not fail.
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")
    HDF5[name](good_dataset(tmp_path), np.random.default_rng(3))  # the observations, where it is one array
    episodes = list(minari.load_dataset("fuzz/good-v0").iterate_episodes())
    assert any((episode.observations == SECRET).all() for episode in episodes)


def test_a_dataset_may_be_a_link_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")
    folder = good_dataset(tmp_path / "here").parent
    folder.rename(tmp_path / "there")
    folder.symlink_to(tmp_path / "there")
    assert OfflineDataset.load("fuzz/good-v0").n_steps == 6


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("rewards", ["a", "b", "c"], "rewards are of shape .* not a row of numbers"),
        ("terminations", np.zeros((3, 2)), r"terminations are of shape \(3, 2\)"),
        ("observations", np.array([[b"1", b"2"]] * 4), "Unexpected observation type"),
        ("actions", np.zeros((3, 2)), "Unexpected observation shape"),
        ("rewards", 1.0, "damaged"),
        ("rewards", h5py.Empty("f8"), "damaged"),
    ],
    ids=str,
)
def test_arrays_that_are_not_what_they_should_be_are_named(
    name: str, values: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")
    with h5py.File(good_dataset(tmp_path) / "main_data.hdf5", "a") as file:
        del file[f"episode_1/{name}"]
        file[f"episode_1/{name}"] = values
    with pytest.raises(ValueError, match=rf"(?i)dataset 'fuzz/good-v0'.*{message}|episode 1.*{message}"):
        OfflineDataset.load("fuzz/good-v0")


def test_parquet_is_read_if_the_user_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pyarrow ends the process on some damaged files of parquet.
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")
    good_dataset(tmp_path, "parquet")
    with pytest.raises(ValueError, match=r"parquet.*if you know where it comes from, open it by"):
        OfflineDataset.load("fuzz/good-v0")
    assert OfflineDataset.load(minari.load_dataset("fuzz/good-v0")).n_steps == 6


def test_texts_and_compressed_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")
    with h5py.File(good_dataset(tmp_path) / "main_data.hdf5", "a") as file:
        infos = file["episode_0/infos"]
        infos["texts"] = ["one", "two", "three", "four"]
        infos["short"] = np.array([b"a", b"b", b"c", b"d"])
        infos.create_dataset("lists", (4,), h5py.vlen_dtype(np.uint8))
        infos.create_dataset("zipped", data=np.zeros((4, 1000)), compression="gzip")
    assert OfflineDataset.load("fuzz/good-v0").n_steps == 6


@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_fuzzed_inputs_are_read_or_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # benchmarks/faults.py does the same by the thousand.
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")
    if target in ("datasets, arrow", "datasets, crafted"):
        pytest.importorskip("pyarrow")
    counts = fuzzing.TARGETS[target](25)
    assert counts["inputs"] == counts["read"] + counts["refused"] == 25
    assert counts["refused"] > 5
    assert counts["ran_or_wrote"] == 0


@pytest.mark.parametrize("value", [[], {}, "x"])
@pytest.mark.parametrize("name", ["total_steps", "total_episodes", "dataset_id"])
def test_metadata_of_other_types_are_damage(name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_id = hostile_dataset(None, tmp_path, monkeypatch)
    path = next((tmp_path / "minari").rglob("metadata.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    if (name, value) != ("dataset_id", "x"):
        with pytest.raises(ValueError, match="damaged"):
            OfflineDataset.load(dataset_id)
