"""Agents evaluated in stacks of Gymnasium wrappers: from the command line, from YAML, from code."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium import wrappers
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_diffrl import NCLQL, DiffusionBC, make_dataset
from sb3_diffrl.cli.arguments import parse_wrapper
from tests.cli_tools import DATASET, say, train_offline, train_online
from tests.zoo_process import gymnasium_put_back  # noqa: F401

ROOT = Path(__file__).parent.parent
SHORT = "TimeLimit:max_episode_steps=6"
# Those that an agent must have been trained with
OTHER = ["NormalizeObservation", "FrameStackObservation:stack_size=2|FlattenObservation", "TimeAwareObservation"]
OTHER += ["RescaleAction:min_action=-1.0,max_action=1.0", "FlattenObservation", "RescaleObservation:min_obs=-1,max_obs=1"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("wrappers")
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    make_dataset("sb3-diffrl/pointmaze/umaze-v0", quick=True, n_steps=400, progress_bar=False)
    yield folder
    del os.environ["MINARI_DATASETS_PATH"]
    if before is not None:
        os.environ["MINARI_DATASETS_PATH"] = before


@pytest.fixture(scope="module")
def online(logs: Path) -> Path:
    return train_online(logs, "--eval-freq", -1, n=60)


@pytest.fixture(scope="module")
def offline(logs: Path) -> Path:
    return train_offline(logs, "diffusion_bc")


def stack(text: str) -> list[str]:
    return [word for name in text.split("|") for word in ("-w", name)]


def test_wrappers_of_the_command_line() -> None:
    assert parse_wrapper("TimeAwareObservation") == "gymnasium.wrappers.TimeAwareObservation"
    assert parse_wrapper("my.Wrapper:a=1,b='x',c=[1, 2]") == {"my.Wrapper": {"a": 1, "b": "x", "c": [1, 2]}}
    assert parse_wrapper("RecordVideo:video_folder=/some/where") == {
        "gymnasium.wrappers.RecordVideo": {"video_folder": "/some/where"}
    }


@pytest.mark.parametrize("name", ["RecordEpisodeStatistics", "NormalizeReward"])
@pytest.mark.parametrize("kind", ["online", "offline"])
def test_a_wrapper_around_a_trained_agent(
    kind: str, name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run = request.getfixturevalue(kind)
    printed = say(capsys, "evaluate", run, "-n", 2, *stack(f"{SHORT}|{name}"))
    assert "over 2 episodes, 6 steps each" in printed
    # The other way round, too: what ends episodes may be outermost.
    assert "over 2 episodes, 6 steps each" in say(capsys, "evaluate", run, "-n", 2, *stack(f"{name}|{SHORT}"))


@pytest.mark.parametrize("kind", ["online", "offline"])
def test_record_video_by_hand(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    run = request.getfixturevalue(kind)
    say(capsys, "evaluate", run, "-n", 1, *stack(f"{SHORT}|RecordVideo:video_folder={tmp_path}"))
    assert (tmp_path / "rl-video-episode-0.mp4").stat().st_size > 500


@pytest.mark.parametrize("names", OTHER)
def test_wrappers_that_change_spaces_belong_in_training(
    names: str, online: Path, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_online(logs, "--eval-freq", -1, *stack(names), n=60)
    assert "over 1 episodes, 6 steps" in say(capsys, "evaluate", run, "-n", 1, "-w", SHORT)
    if names not in ("FlattenObservation",):  # which changes nothing on vectors
        message = say(capsys, "evaluate", online, "-n", 1, *stack(names), code=1)
        assert "train --wrapper" in message


@pytest.mark.parametrize("names", OTHER)
def test_an_offline_agent_sees_what_its_dataset_holds(names: str, offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", offline, "-n", 1, *stack(f"{SHORT}|{names}")]
    if names.startswith("RescaleAction"):  # to what the maze has
        assert "6 steps each" in say(capsys, *words)
        return
    message = say(capsys, *words, code=1)
    # Two of these do not take observations of several parts.
    few = ("NormalizeObservation", "RescaleObservation")
    assert ("does not take the wrappers" if names.startswith(few) else "sees what the dataset holds") in message
    assert "train --wrapper" not in message


def test_training_ends_episodes_where_the_wrapper_does(logs: Path) -> None:
    """Evaluations inside training return, and Monitor writes the episodes that the agent saw."""
    run = train_online(logs, "--eval-freq", 30, "-w", SHORT, n=60)
    lengths = [line.split(",")[1] for line in (run / "0.monitor.csv").read_text().splitlines()[2:]]
    assert lengths == ["6"] * 10


def test_a_stack_in_yaml(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yml"
    config.write_text(
        """Pendulum-v1:
  n_timesteps: 60
  policy: MlpPolicy
  env_wrapper:
    - gymnasium.wrappers.TimeLimit: {max_episode_steps: 9}
    - gymnasium.wrappers.TimeAwareObservation
    - rl_zoo3.wrappers.HistoryWrapper: {horizon: 2}
"""
    )
    run = train_online(logs, "--config", config, "--eval-freq", -1, n=60)
    assert "9 steps each" in say(capsys, "evaluate", run, "-n", 1)


def test_several_wrapped_envs(online: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = say(capsys, "evaluate", online, "-n", 4, "--n-envs", 2, *stack(f"{SHORT}|RecordEpisodeStatistics"))
    assert "over 4 episodes, 6 steps each" in printed


def test_code_online_and_offline(online: Path, offline: Path) -> None:
    import minari

    agents: list[tuple[Any, gym.Env[Any, Any]]] = [
        (NCLQL.load(online / "Pendulum-v1.zip"), gym.make("Pendulum-v1")),
        (
            DiffusionBC.load(offline / f"{offline.name[:-2]}.zip"),
            minari.load_dataset(DATASET).recover_environment(eval_env=True),
        ),
    ]
    for model, env in agents:
        wrapped = Monitor(wrappers.RecordEpisodeStatistics(wrappers.TimeLimit(env, 5)))
        returns, lengths = evaluate_policy(model, wrapped, 2, return_episode_rewards=True)
        assert lengths == [5, 5]
        assert len(returns) == 2  # type: ignore[arg-type]


def test_the_example_films(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "wrappers.py"), "--steps", "80", "--episodes", "1", "--length", "5"]
    result = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "lengths [" in result.stdout
    assert (tmp_path / "rl-video-episode-0.mp4").stat().st_size > 500
