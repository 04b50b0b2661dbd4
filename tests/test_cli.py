"""The command line: what each command does and leaves, repeats, goes on with, and says when something is wrong."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.monitor import load_results

from sb3_diffrl import NCLQL, DiffusionBC
from sb3_diffrl.cli import main, make_parser, playing
from sb3_diffrl.configs import load_yaml
from tests.cli_tools import DATASET, ONLINE, say, train_offline, train_online
from tests.zoo_process import gymnasium_put_back  # noqa: F401

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def run(logs: Path) -> Path:
    return train_online(logs)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minari")
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    assert main(["dataset", "make", "sb3-diffrl/pointmaze/umaze-v0", "--quick", "--n-steps", "400"]) == 0
    if before is None:
        del os.environ["MINARI_DATASETS_PATH"]
    else:
        os.environ["MINARI_DATASETS_PATH"] = before
    return folder


@pytest.fixture
def on_disk(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(data))


def test_a_run_leaves_what_rl_zoo_leaves_and_what_repeats_it(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"Pendulum-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv", "Pendulum-v1"} <= names
    config, args, described = (load_yaml(run / "Pendulum-v1" / f"{name}.yml") for name in ("config", "args", "run"))
    assert config["n_timesteps"] == 120
    assert config["policy_kwargs"] == {"net_arch": [8, 8]}
    assert config["tau"] == 0.02  # the shipped setting
    assert args["env_kwargs"] is None  # RL Zoo's own enjoy reads it
    assert described["seed"] == 1
    assert {"torch", "stable-baselines3", "sb3_diffrl"} <= set(described["versions"])
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [60, 120]


def test_from_repeats_a_run_in_a_folder_of_its_own(run: Path, logs: Path) -> None:
    before = (run / "Pendulum-v1.zip").stat().st_mtime_ns
    assert main(["train", "--from", str(run), "-f", str(logs), "--num-threads", "1", "--device", "cpu", "-v", "0"]) == 0
    again = run.with_name("Pendulum-v1_2")
    first, second = (NCLQL.load(folder / "Pendulum-v1.zip").policy.state_dict() for folder in (run, again))
    assert all(th.equal(first[name], second[name]) for name in first)
    assert (run / "Pendulum-v1.zip").stat().st_mtime_ns == before
    assert load_yaml(again / "Pendulum-v1" / "config.yml") == load_yaml(run / "Pendulum-v1" / "config.yml")


def test_from_takes_what_is_typed_before_what_was_recorded(run: Path, tmp_path: Path) -> None:
    assert main(["train", "--from", str(run), "-f", str(tmp_path), "-n", "60", "--eval-freq", "30", "-v", "0"]) == 0
    (again,) = (tmp_path / "nclql").iterdir()
    args = load_yaml(again / "Pendulum-v1" / "args.yml")
    assert (args["eval_freq"], args["n_timesteps"]) == (30, 60)
    assert (args["eval_episodes"], args["device"], args["num_threads"]) == (1, "cpu", 1)  # as in the run
    assert np.load(again / "evaluations.npz")["timesteps"].tolist() == [30, 60]


def test_evaluate_gives_the_returns(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "scores.json"
    printed = say(capsys, "evaluate", run, "-n", 2, "-o", out, "-w", "TimeLimit:max_episode_steps=7")
    scores = json.loads(out.read_text())
    assert scores["lengths"] == [7, 7]
    assert scores["mean_return"] == pytest.approx(np.mean(scores["returns"]))
    assert f"return {scores['mean_return']:.2f}" in printed
    for i, value in enumerate(scores["returns"], 1):
        assert f"episode {i}: return {value:.2f}, 7 steps" in printed
    # The same by names, and by the best model
    by_name = say(capsys, "evaluate", "--algo", "nclql", "--env", "Pendulum-v1", "-f", run.parent.parent, "--exp-id", 1, "-n", 2,
                  "-w", "TimeLimit:max_episode_steps=7")  # fmt: skip
    assert by_name == printed
    say(capsys, "evaluate", run, "-n", 1, "--best", "-w", "TimeLimit:max_episode_steps=7")


def test_several_envs_and_drawn_actions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["-w", "TimeLimit:max_episode_steps=5"]
    assert "over 4 episodes, 5 steps" in say(capsys, "evaluate", run, "-n", 4, "--n-envs", 2, "--stochastic", *short)


def test_record_films_whole_episodes_and_never_overwrites(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        printed = say(capsys, "record", run, "-n", 1, "-o", tmp_path / "v", "-w", "TimeLimit:max_episode_steps=4")
        video = tmp_path / "v" / f"video{number}-episode-0.mp4"
        assert str(video) in printed
        assert video.stat().st_size > 500
    assert len(list((tmp_path / "v").glob("*.mp4"))) == 2


def test_enjoy_without_a_screen_says_what_to_do(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if sys.platform == "linux":
        assert "--video" in say(capsys, "enjoy", run, code=1)
    short = ["-n", 1, "-w", "TimeLimit:max_episode_steps=4"]
    assert "return" in say(capsys, "enjoy", run, "--no-render", *short)
    say(capsys, "enjoy", run, "--video", tmp_path / "film", *short)
    assert len(list((tmp_path / "film").glob("*.mp4"))) == 1


@pytest.mark.parametrize("algo", ["diffusion_bc", "planner", "pg"])
def test_offline_agents_fit_the_same_layout(algo: str, on_disk: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_offline(tmp_path, algo)
    assert folder.name == "sb3-diffrl-pointmaze-umaze-quick-v0_1"
    assert load_yaml(folder / folder.name[:-2] / "config.yml")["dataset"] == DATASET
    printed = say(capsys, "evaluate", "--algo", algo, "--dataset", DATASET, "-f", tmp_path, "-n", 1, "-w",
                  "TimeLimit:max_episode_steps=3")  # fmt: skip
    assert "normalised score" in printed


@pytest.mark.parametrize("algo", ["diffusion_bc", "planner", "pg"])
def test_densities_of_offline_agents(
    algo: str, on_disk: None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_offline(tmp_path, algo, "--params", "timestep_sampler:logit_normal")
    say(capsys, "plot", "timesteps", folder, "-o", tmp_path / "densities.png")
    assert (tmp_path / "densities.png").stat().st_size > 5_000
    assert "diffusion_bc, planner and pg" in say(capsys, "plot", "timesteps", run, code=1)


def test_offline_evaluation_in_another_env(on_disk: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gymnasium_robotics  # noqa: F401 - registers the mazes

    folder = train_offline(tmp_path, "diffusion_bc", "--env", "PointMaze_Medium-v3")
    assert folder.name == "PointMaze_Medium-v3_1"
    say(capsys, "evaluate", folder, "-n", 1, "-w", "TimeLimit:max_episode_steps=3")


def test_a_resumed_offline_run_is_the_run_that_never_stopped(on_disk: None, tmp_path: Path) -> None:
    constant = ["--params", "learning_rate:1e-3"]
    whole = train_offline(tmp_path / "whole", "diffusion_bc", *constant, n=6)
    half = train_offline(tmp_path / "half", "diffusion_bc", *constant, n=3)
    described = half / half.name[:-2] / "run.yml"
    text = described.read_text()
    assert "n_timesteps: 3" in text
    described.write_text(text.replace("n_timesteps: 3", "n_timesteps: 6"))  # as if it had been stopped half-way
    assert main(["train", "--resume", str(half), "--num-threads", "1", "--device", "cpu", "-v", "0"]) == 0
    models = [DiffusionBC.load(folder / f"{folder.name[:-2]}.zip") for folder in (whole, half)]
    assert [model.num_timesteps for model in models] == [6, 6]
    one, other = (model.policy.state_dict() for model in models)
    assert all(th.equal(one[name], other[name]) for name in one)


def test_ctrl_c_saves_and_resume_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_diffrl", "train", "--algo", "nclql", "--env", "Pendulum-v1", "-n", "100000"]
    command += ["--eval-freq", "100", "--eval-episodes", "1", "--seed", "0", "-f", str(tmp_path), *ONLINE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = tmp_path / "nclql" / "Pendulum-v1_1"
    deadline = time.monotonic() + 120
    while not (folder / "evaluations.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert f"sb3-diffrl train --resume {folder}" in printed
    steps = NCLQL.load(folder / "Pendulum-v1.zip").num_timesteps
    assert 100 <= steps < 100_000
    assert (folder / "replay_buffer.pkl").exists()

    # Goes on to a nearer end.
    path = folder / "Pendulum-v1" / "run.yml"
    path.write_text(path.read_text().replace("n_timesteps: 100000", f"n_timesteps: {steps + 200}"))
    assert main(["train", "--resume", str(folder), "--num-threads", "1", "--device", "cpu", "-v", "0"]) == 0
    model = NCLQL.load(folder / "Pendulum-v1.zip")
    model.load_replay_buffer(folder / "replay_buffer.pkl")
    assert model.num_timesteps == steps + 200
    evaluated = np.load(folder / "evaluations.npz")["timesteps"].tolist()
    assert evaluated == sorted(set(evaluated))
    assert evaluated[0] == 100
    assert evaluated[-1] > steps
    assert len(load_results(str(folder))) >= (steps + 200) // 200 - 1  # episodes of both parts
    assert [path.name for path in folder.parent.iterdir()] == ["Pendulum-v1_1"]


def test_tune_finds_settings_that_train_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage, study = tmp_path / "study.log", "mine"
    words = ["tune", "--algo", "nclql", "--env", "Pendulum-v1", "-n", 60, "--n-trials", 2, "--n-evaluations", 1]
    words += ["--eval-episodes", 1, "-f", tmp_path, "--storage", storage, "--study-name", study, "--seed", 0]
    words += [word for word in ONLINE if word != "--no-progress"]
    words += ["-w", "TimeLimit:max_episode_steps=10"]
    say(capsys, *words)
    best = tmp_path / "nclql" / "tune-Pendulum-v1_1" / "best.yml"
    entry = load_yaml(best)["Pendulum-v1"]
    assert {"gamma", "learning_rate", "reward_scale", "tau", "policy_kwargs"} <= set(entry)
    described, args = (load_yaml(best.parent / "Pendulum-v1" / f"{name}.yml") for name in ("run", "args"))
    assert described["seed"] == 0
    assert "torch" in described["versions"]
    assert args["n_trials"] == 2
    words[words.index("--n-trials") + 1] = 1
    say(capsys, *words)  # the same study goes on
    import optuna
    from optuna.storages.journal import JournalFileBackend

    journal = optuna.storages.JournalStorage(JournalFileBackend(str(storage)))
    assert len(optuna.load_study(storage=journal, study_name=study).trials) == 3
    folder = train_online(tmp_path, "--config", best)
    assert load_yaml(folder / "Pendulum-v1" / "config.yml")["tau"] == entry["tau"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_search_that_is_stopped_says_how_it_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "sb3_diffrl", "tune", "--algo", "nclql", "--env", "Pendulum-v1", "-n", "100000"]
    command += ["-f", str(tmp_path), *(word for word in ONLINE if word != "--no-progress")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    study = tmp_path / "nclql" / "tune-Pendulum-v1_1" / "study.log"
    deadline = time.monotonic() + 120
    # Until a trial runs: its number is in the study.
    while not (study.exists() and '"op_code":4' in study.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code, printed
    assert f"--storage {study} --study-name nclql-Pendulum-v1" in printed


def test_an_env_of_a_package_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_envs.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "gym.register('OwnPendulum-v0', PendulumEnv, max_episode_steps=4)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = train_online(tmp_path, "--eval-freq", -1, env="own_envs:OwnPendulum-v0", n=60)
    assert run.name == "OwnPendulum-v0_1"
    assert f"evaluate {run} --trust" in capsys.readouterr().out
    assert "4 steps each" in say(capsys, "evaluate", run, "-n", 1, "--trust")
    by_name = ["evaluate", "--algo", "nclql", "--env", "own_envs:OwnPendulum-v0", "-f", tmp_path, "-n", 1]
    # A folder does not say which packages are imported.
    for words in (["evaluate", run, "-n", 1], by_name, ["train", "--from", run, "-f", tmp_path]):
        assert "--trust" in say(capsys, *words, code=1)


def test_gymnasium_robotics_needs_no_package_before_its_ids(tmp_path: Path) -> None:
    train_online(tmp_path, "--eval-freq", -1, "--params", "policy:MultiInputPolicy", env="PointMaze_UMaze-v3", n=60)


def test_an_env_does_not_take_any_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--algo", "nclql", "--env", "Pendulum-v1", "-f", tmp_path, "--env-kwargs", "gravity:3"]
    assert "unexpected keyword argument 'gravity'" in say(capsys, *words, code=1)


@pytest.mark.parametrize(
    ("words", "module", "extra"),
    [
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-tb", "tb"], "tensorboard", "tensorboard"),
        (["train", "--algo", "nclql", "--env", "PointMaze_Absent-v3"], "gymnasium_robotics", "robotics"),
    ],
)
def test_what_an_option_needs_is_named(
    words: list[str], module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert f'pip install "sb3_diffrl[{extra}]"' in say(capsys, *words, code=1)


def test_a_graphics_library_that_is_missing_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(playing, "_play", fails)
    monkeypatch.setattr(playing, "find_library", lambda _: None)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert "apt-get install libosmesa6" in say(capsys, "record", run, "-o", tmp_path, code=1)


@pytest.mark.parametrize(
    ("dataset", "left"), [("pointmaze/umaze-v0", "begins anew"), ("hopper/medium-v0", "goes on from the last")]
)
def test_a_dataset_that_is_stopped_says_what_is_left(
    dataset: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sb3_diffrl.offline import makers

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(makers, "make_dataset", stopped)
    assert left in say(capsys, "dataset", "make", f"sb3-diffrl/{dataset}", "--cache", tmp_path, code=130)


def test_dataset_record_info_list(run: Path, on_disk: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "50 steps" in say(capsys, "dataset", "record", "test/pendulum/mine-v0", run, "--n-steps", 50, "--overwrite")
    printed = say(capsys, "dataset", "info", "test/pendulum/mine-v0")
    assert "Pendulum-v1" in printed
    assert "NCLQL" in printed
    listed = say(capsys, "dataset", "list")
    assert "test/pendulum/mine-v0" in listed
    assert "sb3-diffrl/hopper/expert-v0" in listed
    assert "error: " in say(capsys, "dataset", "record", "test/pendulum/mine-v0", run, "--n-steps", 50, code=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--algo", "nclq", "--env", "Pendulum-v1"], "nclql"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v2"], "Pendulum-v1"),
        (["train", "--algo", "nclql"], "--env"),
        (["train", "--algo", "nclql", "--env", "absent_package:X-v0"], "absent_package"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-p", "learing_rate:1e-3"], "Nearest: learning_rate"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-p", "policy_kwargs:dict(net_arc=[8])"], "Nearest: net_arch"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-p", "policy:MlpPolcy"], "Nearest: MlpPolicy"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-p", "noise_type:norml"], "Nearest: normal"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-p", "noise_type:normal"], "noise_std"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-p", "seed:1"], "--seed"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-w", "TimeLimit:max_steps=3"], "Nearest: max_episode_steps"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-w", "gymnasium.wrappers.TimeLimt"], "Nearest: TimeLimit"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-w", "absent_package.Wrapper"], "cannot be imported"),
        (["train", "--algo", "pg", "--env", "Hopper-v5"], "--dataset"),
        (["train", "--algo", "sac", "--dataset", DATASET], "--env"),
        (["train", "--algo", "pg", "--dataset", "sb3-diffrl/pointmaze/umaze-v7"], "not on disk"),
        (["train", "--algo", "nclql", "--env", "Pendulum-v1", "-c", "absent.yml"], "absent.yml"),
        (["train", "--resume", "absent"], "not the folder of a run"),
        (["evaluate", "--algo", "nclql", "--env", "Hopper-v5"], "No run"),
        (["evaluate"], "--algo"),
        (["list", "nclq"], "nclql"),
        (["dataset", "make", "sb3-diffrl/pointmaze/umazz-v0"], "umaze-v0"),
    ],
)
def test_errors_say_what_to_do(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as error:
        code, message = 1, str(error)
    else:
        message = capsys.readouterr().err
    assert code == 1
    assert said in message
    assert not (tmp_path / "logs").exists()


def test_a_wrong_action_space_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = say(capsys, "train", "--algo", "nclql", "--env", "CartPole-v1", "-n", 5, "-f", tmp_path, code=1)
    assert "error: The algorithm only supports" in message
    assert "Discrete(2)" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "train"),
        (["train", "--alg0", "x"], "--algo"),
        (["evaluate", "x", "-w", "TimeLimt"], "TimeLimit"),
        (["evaluate", "x", "--device", "cdua"], "cuda"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_suggests_the_right_one(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert said in capsys.readouterr().err.split("error:")[1]


@pytest.mark.parametrize(
    "words", [[], ["train"], ["tune"], ["evaluate"], ["enjoy"], ["record"], ["plot"], ["plot", "curves"], ["dataset"], ["list"]]
)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    assert "usage: sb3-diffrl" in capsys.readouterr().out


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    kinds = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(found for choices in kinds for inner in choices.values() for found in parsers(inner))]


def test_every_option_of_every_command_is_explained() -> None:
    found = parsers(make_parser())
    assert len(found) == 18
    for parser in found:
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, f"{parser.prog} {action.option_strings or action.dest}"


def test_list_names_algorithms_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    printed = say(capsys, "list")
    assert "NCLQL" in printed
    assert "D4RL/pointmaze/umaze-v2" in printed
    assert "*small" in say(capsys, "list", "nclql")


def test_a_missing_extra_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['rl_zoo3'] = None; from sb3_diffrl.cli import main; sys.exit(main(['evaluate', 'x']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'pip install "sb3_diffrl[zoo]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_a_renderer_that_is_not_installed_is_named(run: Path, tmp_path: Path) -> None:
    words = ["record", str(run), "-n", "1", "-o", str(tmp_path / "films")]
    code = f"import sys; sys.modules['pygame'] = None; from sb3_diffrl.cli import main; sys.exit(main({words}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "error: pygame is not installed" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_configuration_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yml"
    config.write_text("Pendulum-v1: {n_timesteps: 10, policy: MlpPolicy, env_wrapper: subprocess.Popen}\n")
    assert "--trust" in say(capsys, "train", "--algo", "nclql", "--env", "Pendulum-v1", "-c", config, "-f", tmp_path, code=1)
    for code in ("exec('1')", "'exec(1)'"):
        config.write_text(f'Pendulum-v1: {{n_timesteps: 10, policy: MlpPolicy, policy_kwargs: "{code}"}}\n')
        assert "--trust" in say(capsys, "train", "--algo", "nclql", "--env", "Pendulum-v1", "-c", config, "-f", tmp_path, code=1)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted({line.split("#")[0].strip() for page in PAGES for line in re.findall(r"^sb3-diffrl .*", page.read_text(), re.M)})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_the_pages_are_understood(command: str) -> None:
    assert callable(make_parser().parse_args(shlex.split(command)[1:]).run)
