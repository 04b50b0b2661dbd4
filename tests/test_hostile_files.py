"""Files from anywhere: a clear error or the right model; nothing is run, nothing is written, memory stays bounded."""

import io
import json
import resource
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

from sb3_diffrl import LQL, NCLQL, DiffusionBC, OfflineDataset
from sb3_diffrl.offline.writing import DatasetWriter
from sb3_diffrl.saving import ModelFileError
from sb3_diffrl.saving.archive import ENTRY

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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(SEEDS):
        path.write_bytes(MUTATIONS[mutation](content, np.random.default_rng([seed, zlib.crc32(mutation.encode())])))
        try:
            loaded = cls.load(path, device="cpu")
        except ModelFileError as error:
            messages.append(str(error))
        else:
            assert {name: value.shape for name, value in loaded.policy.state_dict().items()} == {
                name: value.shape for name, value in weights.items()
            }
        assert [file.name for file in tmp_path.iterdir()] == ["model.zip"], f"seed {seed} ran something, or wrote a file"
    if mutation not in ("flip_json", "replace_value", "drop_entry", "traverse", "plant_pickle", "flip_bits"):
        assert len(messages) == SEEDS
    assert all(len(message) > 30 for message in messages)
    # In kB; the bombs would take gigabytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000


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
