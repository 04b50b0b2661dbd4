"""A stranger's run folder is opened without running what it holds; one's own is, without ``--trust``, all that it was."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffrl import NCLQL
from sb3_diffrl.cli import main
from sb3_diffrl.configs import UnsafeConfigError, load_yaml
from tests.cli_tools import TINY, say, train_online
from tests.envs import RandomEnv, box_env
from tests.mutations import MARK_VARIABLE, Planted
from tests.zoo_process import gymnasium_put_back  # noqa: F401

SHORT = ["-n", 1, "-w", "TimeLimit:max_episode_steps=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that normalises."""
    return train_online(tmp_path_factory.mktemp("logs"), "--params", "normalize:true")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There once code was run."""
    monkeypatch.setenv(MARK_VARIABLE, str(tmp_path / "mark"))
    return tmp_path / "mark"


def change(path: Path, **values: object) -> None:
    path.write_text(yaml.safe_dump({**load_yaml(path), **values}))


def test_ones_own_statistics_are_read_without_trust(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = say(capsys, "evaluate", run, *SHORT)
    folder = run / "Pendulum-v1"
    described = folder / "vecnormalize.json"
    aside = described.rename(described.with_suffix(".aside"))
    try:
        assert "--trust" in say(capsys, "evaluate", run, *SHORT, code=1)
        assert say(capsys, "evaluate", run, *SHORT, "--trust") == printed  # RL Zoo's pickle holds the same
    finally:
        aside.rename(described)


def test_the_pickle_needs_nothing_of_this_package(run: Path) -> None:
    content = (run / "Pendulum-v1" / "vecnormalize.pkl").read_bytes()
    assert type(pickle.loads(content)) is VecNormalize
    assert b"sb3_diffrl" not in content


def test_a_resumed_run_goes_on_with_its_statistics(copy: Path) -> None:
    described = copy / "Pendulum-v1" / "vecnormalize.json"
    before = json.loads(described.read_text())
    change(copy / "Pendulum-v1" / "run.yml", n_timesteps=180)
    assert main(["train", "--resume", str(copy), *TINY]) == 0
    after = json.loads(described.read_text())
    assert after["observations"]["count"] > before["observations"]["count"] >= 120
    assert NCLQL.load(copy / "Pendulum-v1.zip").num_timesteps == 180


@pytest.mark.parametrize("keys", [None, ["a"]])
def test_statistics_are_the_same_from_both_files(tmp_path: Path, keys: list[str] | None) -> None:
    from sb3_diffrl.zoo.statistics import JsonNormalize, load_statistics

    def two() -> RandomEnv:
        observations = spaces.Dict({"a": spaces.Box(-1, 1, (2, 3)), "b": spaces.Box(-1, 1, (1,))})
        return RandomEnv(observations, spaces.Box(-1, 1, (1,)))

    normalize = JsonNormalize(DummyVecEnv([two]), norm_obs_keys=keys, clip_obs=3, gamma=0.9)
    normalize.reset()
    for _ in range(5):
        normalize.step(np.ones((1, 1), np.float32))
    normalize.save(str(tmp_path / "vecnormalize.pkl"))
    read = load_statistics(tmp_path, DummyVecEnv([two]), trust=False)
    (tmp_path / "vecnormalize.json").unlink()
    unpickled = load_statistics(tmp_path, DummyVecEnv([two]), trust=True)
    obs = two().reset()[0]
    for other in (read, unpickled):
        expected, found = normalize.normalize_obs(obs), other.normalize_obs(obs)
        assert isinstance(expected, dict)
        assert isinstance(found, dict)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
        assert other.normalize_reward(np.array(0.3)) == normalize.normalize_reward(np.array(0.3))
    assert read.obs_rms.keys() == set(keys or ["a", "b"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\x00", '{"training": 1}', "[" * 100_000, '{"norm_obs_keys": 3}', "1" * 5000, "observations"]
)
def test_damaged_statistics_are_named(copy: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    described = copy / "Pendulum-v1" / "vecnormalize.json"
    if text == "observations":  # of another env
        values = json.loads(described.read_text())
        values["observations"]["mean"] = values["observations"]["var"] = [1.0]
        text = json.dumps(values)
    described.write_text(text)
    printed = say(capsys, "evaluate", copy, *SHORT, code=1)
    assert f"{described} does not hold VecNormalize's statistics of this env" in printed


def test_a_planted_pickle_of_statistics_is_not_run(copy: Path, capsys: pytest.CaptureFixture[str], mark: Path) -> None:
    params = copy / "Pendulum-v1"
    (params / "vecnormalize.json").unlink()
    (params / "vecnormalize.pkl").write_bytes(pickle.dumps(Planted()))
    for words in (["evaluate", copy, *SHORT], ["train", "--resume", copy, *TINY]):
        change(params / "run.yml", n_timesteps=180)
        assert "--trust" in say(capsys, *words, code=1)
    change(params / "config.yml", normalize=False)  # RL Zoo reads it all the same
    resume = ["train", "--resume", str(copy), *TINY]
    assert "--trust" in say(capsys, *resume, code=1)
    assert not mark.exists()
    with pytest.raises(AttributeError):  # it is no VecNormalize
        main([*resume, "--trust"])
    assert mark.exists()


def test_statistics_in_the_current_folder_are_nobodys(copy: Path, monkeypatch: pytest.MonkeyPatch, mark: Path) -> None:
    (copy / "Pendulum-v1" / "vecnormalize.pkl").write_bytes(pickle.dumps(Planted()))
    (copy / "Pendulum-v1" / "vecnormalize.json").unlink()
    monkeypatch.chdir(copy)
    train_online(copy / "logs", n=60)
    assert not mark.exists()


def test_models_of_other_packages_need_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = ["train", "--algo", "sac", "--env", "Pendulum-v1", "-n", 120, "--eval-freq", -1, "-f", tmp_path, *TINY[:5]]
    words = [*trained, "--params", "policy_kwargs:dict(net_arch=[8])", "learning_starts:100"]
    folder = tmp_path / "sac" / "Pendulum-v1_1"
    assert f"sb3-diffrl evaluate {folder} --trust" in say(capsys, *words)
    change(folder / "Pendulum-v1" / "run.yml", n_timesteps=180)
    for words in (["evaluate", folder, *SHORT], ["train", "--resume", folder, *TINY]):
        assert "If you trust it: --trust" in say(capsys, *words, code=1)
        say(capsys, *words, "--trust")


def test_wrappers_within_wrappers_are_not_called(copy: Path, capsys: pytest.CaptureFixture[str], mark: Path) -> None:
    inner = ["builtins.type", {"subprocess.check_call": {"args": ["touch", str(mark)]}}]
    wrapper = {"sb3_diffrl.zoo.wrappers.inside_monitor": {"wrappers": inner}}
    for entry in ([wrapper], wrapper, [{"stable_baselines3.common.monitor.Monitor": {"filename": str(mark)}}]):
        change(copy / "Pendulum-v1" / "config.yml", env_wrapper=entry)
        for words in (["evaluate", copy, *SHORT], ["train", "--from", copy, "-f", copy / "logs", *TINY]):
            assert "--trust" in say(capsys, *words, code=1)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("args", "[]"),
        ("args", ""),
        ("args", "{env: Pendulum-v1}"),
        ("args", "{algo: nclql}"),
        ("args", "{algo: [1], env: Pendulum-v1}"),
        ("args", "{algo: absent, env: Pendulum-v1}"),
        ("args", "{algo: nclql, env: Pendulum-v1, env_kwargs: [1]}"),
        ("config", "[1]"),
        ("config", "{dataset: [1]}"),
        ("config", "{env_kwargs: 3}"),
    ],
)
def test_a_run_that_is_none_is_named(copy: Path, file: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "Pendulum-v1" / f"{file}.yml").write_text(text)
    for words in (["evaluate", copy, *SHORT], ["train", "--from", copy, "-f", copy / "logs", "-n", 5, *TINY]):
        printed = say(capsys, *words, code=1)
        assert printed.count("error: ") == 1
    (copy / "Pendulum-v1" / "run.yml").write_text("{seed: x}")
    say(capsys, "train", "--from", copy, "-f", copy / "logs", *TINY, code=1)


def test_missing_statistics_and_a_pickle_alone_are_told_apart(tmp_path: Path) -> None:
    from sb3_diffrl.zoo.statistics import load_statistics

    venv = DummyVecEnv([box_env])
    with pytest.raises(FileNotFoundError, match=r"vecnormalize\.json"):
        load_statistics(tmp_path, venv, trust=True)
    (tmp_path / "vecnormalize.pkl").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UnsafeConfigError, match="is a pickle"):
        load_statistics(tmp_path, venv, trust=False)
