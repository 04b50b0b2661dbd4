"""The package in RL Zoo: tables, shipped settings, folders, tuning spaces."""

import inspect
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_diffrl.cli.listing import ALGORITHMS, tasks
from sb3_diffrl.configs import UnsafeConfigError, load_yaml, packaged_hyperparams, resolve
from tests.zoo_process import gymnasium_put_back  # noqa: F401

ISSUE_TASKS = ["Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3", "BipedalWalker-v3", "InvertedPendulum-v5"]
ISSUE_TASKS += ["InvertedDoublePendulum-v5", "Reacher-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5"]
ISSUE_TASKS += ["Swimmer-v5"]
# Keys that RL Zoo takes for itself
ZOO_KEYS = {"n_timesteps", "n_envs", "normalize", "env_wrapper", "noise_type", "noise_std", "preset"}


def test_rl_zoo_knows_the_algorithms() -> None:
    import rl_zoo3
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_diffrl import zoo

    zoo.register()  # once more is as once
    for algo, (name, _) in ALGORITHMS.items():
        assert rl_zoo3.ALGOS[algo].__name__ == name
        assert algo in HYPERPARAMS_SAMPLER
        assert algo in HYPERPARAMS_CONVERTER
    assert rl_zoo3.ALGOS["sac"].__name__ == "SAC"


def test_nothing_else_imports_rl_zoo() -> None:
    code = "import sys, sb3_diffrl.cli; sb3_diffrl.cli.make_parser(); from sb3_diffrl import NCLQL; print('rl_zoo3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize("algo", ["nclql", "lql"])
def test_online_settings_cover_the_tasks(algo: str) -> None:
    assert set(ISSUE_TASKS) <= set(tasks(algo))


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_every_shipped_setting_is_an_argument(algo: str) -> None:
    from sb3_diffrl.zoo import ALGORITHMS as CLASSES
    from sb3_diffrl.zoo.experiment import _with_preset

    known = set(inspect.signature(CLASSES[algo].__init__).parameters) | ZOO_KEYS
    settings = load_yaml(packaged_hyperparams(algo))
    for task in ["default", *tasks(algo)]:
        resolved = resolve(_with_preset(dict(settings[task])))
        assert set(resolved) <= known, task
        assert resolved["n_timesteps"] > 0


def manager(tmp_path: Path, algo: str, env: str, hyperparams: dict[str, Any], **args: Any) -> Any:
    from sb3_diffrl.zoo import Experiment

    return Experiment(
        Namespace(algo=algo, env=env, env_kwargs=None, **args),
        algo,
        env,
        str(tmp_path / "logs"),
        n_timesteps=120,
        eval_freq=-1,
        hyperparams={"learning_starts": 50, "policy_kwargs": {"net_arch": [8]}, **hyperparams},
        verbose=0,
        seed=0,
        device="cpu",
    )


def test_schedules_noise_and_normalisation_reach_the_agent(tmp_path: Path) -> None:
    settings = {"learning_rate": "lin_1e-3", "noise_type": "normal", "noise_std": 0.1, "normalize": "{'norm_reward': False}"}
    experiment = manager(tmp_path, "nclql", "Pendulum-v1", settings)
    model, saved = experiment.setup_experiment()
    assert saved["learning_rate"] == "lin_1e-3"
    assert model.lr_schedule(1.0) == pytest.approx(1e-3)
    assert model.lr_schedule(0.25) == pytest.approx(2.5e-4)
    assert model.action_noise is not None
    normalize = model.get_vec_normalize_env()
    assert normalize is not None
    assert not normalize.norm_reward
    experiment.learn(model)
    experiment.save_trained_model(model)
    folder = tmp_path / "logs" / "nclql" / "Pendulum-v1_1"
    assert (folder / "Pendulum-v1" / "vecnormalize.pkl").exists()
    type(model).load(folder / "Pendulum-v1.zip")  # without trust


def test_a_cosine_schedule_and_a_wrong_one(tmp_path: Path) -> None:
    model, _ = manager(tmp_path, "nclql", "Pendulum-v1", {"learning_rate": "cos_1e-3"}).setup_experiment()
    assert model.lr_schedule(0.5) == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="lin_<start>"):
        manager(tmp_path, "nclql", "Pendulum-v1", {"learning_rate": "sin_1"}).setup_experiment()


def test_runs_that_start_at_once_take_folders_of_their_own(tmp_path: Path) -> None:
    # Both have looked which number is free before either takes it.
    first, second = (manager(tmp_path, "nclql", "Pendulum-v1", {}) for _ in range(2))
    first.create_log_folder()
    second.create_log_folder()
    assert (Path(first.save_path).name, Path(second.save_path).name) == ("Pendulum-v1_1", "Pendulum-v1_2")


def test_presets_lie_beneath_the_other_settings() -> None:
    from sb3_diffrl.planner import PRESETS
    from sb3_diffrl.zoo.experiment import _with_preset

    merged = _with_preset({"preset": "pointmaze/paper", "horizon": 3})
    assert merged == {**PRESETS["pointmaze"]["paper"], "horizon": 3}
    with pytest.raises(ValueError, match="Nearest: pointmaze/paper"):
        _with_preset({"preset": "pointmaze/papr"})


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_what_a_trial_draws_are_arguments(algo: str) -> None:
    import optuna

    from sb3_diffrl.zoo import ALGORITHMS as CLASSES
    from sb3_diffrl.zoo.spaces import CONVERTERS, SAMPLERS

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    known = set(inspect.signature(CLASSES[algo].__init__).parameters)
    for _ in range(5):
        trial = study.ask()
        drawn = SAMPLERS[algo](trial, 1, 1, {"using_her_replay_buffer": False, "her_kwargs": {}})
        assert set(drawn) <= known
        assert drawn == CONVERTERS[algo](trial.params)  # what a stored study gives is what the trial ran with
        for name in ("gamma", "discount", "ema_decay"):
            assert 0.9 < drawn.get(name, 0.99) < 1


def test_rl_zoos_own_command_finds_the_settings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_diffrl.zoo", "train", "--algo", "nclql", "--env", "Pendulum-v1", "-n", "60"]
    command += ["--eval-freq", "-1", "-f", str(tmp_path), "-params", "learning_starts:50", "--seed", "1", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "nclql" / "Pendulum-v1_1"
    assert load_yaml(folder / "Pendulum-v1" / "config.yml")["tau"] == 0.02
    from sb3_diffrl import NCLQL

    assert NCLQL.load(folder / "Pendulum-v1.zip").num_timesteps == 60


def test_a_run_repeats_to_the_bit(tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        experiment = manager(tmp_path, "nclql", "Pendulum-v1", {})
        th.manual_seed(0)
        model, _ = experiment.setup_experiment()
        experiment.learn(model)
        weights.append(model.policy.state_dict())
    assert all(th.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_rl_zoos_own_settings_are_understood_as_data() -> None:
    import rl_zoo3

    refused, missing = [], []
    for path in sorted((Path(rl_zoo3.__file__).parent / "hyperparams").glob("*.yml")):
        for task, entry in load_yaml(path).items():
            try:
                resolved = resolve(entry)
            except UnsafeConfigError:
                refused.append(task)
            except ValueError:
                missing.append(task)
            else:
                assert not isinstance(resolved.get("policy_kwargs", {}), str)
    assert {task.split("-")[0] for task in refused} <= {"CarRacing"}  # they need a package of their own, `ae`
    assert {task.split("-")[0] for task in missing} <= {"MiniGrid", "donkey"}  # not installed; of an older Gymnasium


def test_rl_zoos_own_settings_have_no_wrong_names() -> None:
    import rl_zoo3

    from sb3_diffrl.zoo.names import check_names

    n_right, wrong = 0, []
    for path in sorted((Path(rl_zoo3.__file__).parent / "hyperparams").glob("*.yml")):
        for task, entry in load_yaml(path).items():
            if path.stem not in rl_zoo3.ALGOS:
                continue  # of hindsight, without an algorithm of its own
            try:
                check_names(path.stem, entry)
                n_right += 1
            except ValueError as error:
                if "cannot be imported" not in str(error):
                    wrong.append((path.stem, task))
    assert n_right > 200
    assert wrong == [("ppo_lstm", "default")]  # it has no MlpPolicy
