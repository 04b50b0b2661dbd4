"""Dataset makers: what they make is real, seeded, whole, and never mistaken for something else."""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from sb3_diffrl.cli import main as command
from sb3_diffrl.offline.makers import DATASET_IDS, locomotion, make_dataset, pointmaze, training
from sb3_diffrl.offline.makers.locomotion import PLANS
from sb3_diffrl.offline.makers.pointmaze import MAZES, WaypointController
from sb3_diffrl.offline.makers.training import REPLAY, Evaluation, LevelNotReachedError, TrainingPlan, train

UMAZE = "sb3-diffrl/pointmaze/umaze-v0"
# A run of three stretches of a few updates each, on an environment whose episodes end by falling.
TINY = TrainingPlan(
    "Hopper-v5",
    "SAC",
    {"learning_starts": 20, "batch_size": 8, "train_freq": 4, "policy_kwargs": {"net_arch": [8]}},
    medium_return=None,
    expert_return=1e6,
    max_steps=180,
    stretch_steps=60,
    n_eval_episodes=1,
)


@pytest.fixture(autouse=True)
def _data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def columns(dataset: minari.MinariDataset, key: str) -> np.ndarray:
    return np.concatenate([episode.observations[key][:-1] for episode in dataset])


class TestPointMaze:
    def test_journeys_follow_on_from_each_other_and_end_at_rest_at_a_new_goal(self) -> None:
        dataset = make_dataset(UMAZE, n_steps=1_000, progress_bar=False)
        episodes = list(minari.load_dataset(UMAZE))

        assert dataset.total_steps == sum(len(episode) for episode in episodes) == 1_000
        assert dataset.observation_space == gym.make(MAZES["umaze"].env_id).observation_space
        assert len(episodes) > 5
        for episode, following in pairwise(episodes):
            goals = episode.observations["desired_goal"]
            assert (goals == goals[0]).all()
            last = {key: values[-1] for key, values in episode.observations.items()}
            assert np.linalg.norm(last["achieved_goal"] - goals[0]) < 0.1
            assert np.linalg.norm(last["observation"][2:]) < 0.1
            assert (last["observation"] == following.observations["observation"][0]).all()
            assert np.linalg.norm(following.observations["desired_goal"][0] - last["achieved_goal"]) > 0.45
            assert episode.truncations.tolist() == [False] * (len(episode) - 1) + [True]
            assert not episode.terminations.any()

    def test_the_data_are_what_the_environment_does_with_the_actions(self) -> None:
        make_dataset(UMAZE, n_steps=200, seed=3, progress_bar=False)
        env: Any = gym.make(pointmaze.collection_spec(MAZES["umaze"])).unwrapped
        observation, _ = env.reset(seed=3)
        for episode in minari.load_dataset(UMAZE):
            env.goal = episode.observations["desired_goal"][0]
            for step, action in enumerate(episode.actions):
                assert (observation["observation"] == episode.observations["observation"][step]).all()
                observation, reward, *_ = env.step(action)
                assert reward == episode.rewards[step]

    def test_one_seed_gives_one_dataset(self) -> None:
        actions = [
            np.concatenate([e.actions for e in make_dataset(UMAZE, n_steps=150, seed=seed, overwrite=True, progress_bar=False)])
            for seed in (0, 0, 1)
        ]
        assert (actions[0] == actions[1]).all()
        assert (actions[0] != actions[2]).any()

    @pytest.mark.parametrize(("name", "cell"), [("umaze", [1, 1]), ("medium", [6, 6]), ("large", [7, 9])])
    def test_the_evaluation_environment_has_one_goal_cell_and_random_starts(self, name: str, cell: list[int]) -> None:
        dataset = make_dataset(f"sb3-diffrl/pointmaze/{name}-v0", n_steps=50, progress_bar=False)
        env = dataset.recover_environment(eval_env=True)
        maze = env.unwrapped.maze
        observations = [env.reset(seed=seed)[0] for seed in range(20)]
        assert all(maze.cell_xy_to_rowcol(o["desired_goal"]).tolist() == cell for o in observations)
        assert len({tuple(maze.cell_xy_to_rowcol(o["achieved_goal"])) for o in observations}) >= 5
        goals = columns(
            make_dataset(f"sb3-diffrl/pointmaze/{name}-v0", n_steps=1_500, overwrite=True, progress_bar=False), "desired_goal"
        )
        assert len({tuple(maze.cell_xy_to_rowcol(goal)) for goal in goals}) >= 4

    def test_the_noise_free_controller_always_gets_there_and_scores_its_reference(self) -> None:
        dataset = make_dataset(UMAZE, n_steps=50, progress_bar=False)
        env = dataset.recover_environment(eval_env=True)
        controller = WaypointController(env.unwrapped.maze)
        returns = []
        for seed in range(12):
            observation, _ = env.reset(seed=seed)
            rewards: list[float] = []
            truncated = False
            while not truncated:
                observation, reward, _, truncated, _ = env.step(controller(observation))
                rewards.append(float(reward))
            # It stays: once there, every later step is rewarded.
            assert rewards[-100:] == [1.0] * 100
            returns.append(sum(rewards))
        standard_error = np.std(returns) / np.sqrt(len(returns))
        score = minari.get_normalized_score(dataset, np.mean(returns))
        assert score == pytest.approx(1.0, abs=4 * standard_error / MAZES["umaze"].expert_return)

    def test_shortest_paths_have_the_known_lengths(self) -> None:
        # U maze: from one end of the U to the other, around the wall.
        following = pointmaze.next_cells([[0, 0, 0], [1, 1, 0], [0, 0, 0]])[(2, 0)]
        path = [(0, 0)]
        while path[-1] != (2, 0):
            path.append(following[path[-1]])
        assert path == [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0)]

    def test_a_missing_gymnasium_robotics_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "gymnasium_robotics", None)
        with pytest.raises(ImportError, match=r'pip install "sb3_diffrl\[robotics\]"'):
            make_dataset(UMAZE, n_steps=10)


class TestTraining:
    def test_an_interrupted_run_goes_on_to_the_same_end_to_the_bit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(LevelNotReachedError):
            train(TINY, tmp_path / "whole", progress_bar=False)

        monkeypatch.setattr(training, "_Progress", interrupting_after(100))
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "resumed", progress_bar=False)
        monkeypatch.undo()
        with pytest.raises(LevelNotReachedError):
            train(TINY, tmp_path / "resumed", progress_bar=False)

        assert [e[:3] for e in curve_of(tmp_path / "whole")] == [e[:3] for e in curve_of(tmp_path / "resumed")]
        whole, resumed = (SAC.load(last_checkpoint(tmp_path / name) / "model.zip") for name in ("whole", "resumed"))
        assert whole._n_updates == resumed._n_updates == 40
        for a, b in zip(whole.policy.state_dict().values(), resumed.policy.state_dict().values(), strict=True):
            assert th.equal(a, b)

    def test_policies_are_the_first_to_reach_their_levels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        returns = iter([5.0, 40.0, 90.0])
        monkeypatch.setattr(
            training, "_evaluate", lambda model, plan, seconds: Evaluation(model.num_timesteps, next(returns), 0.0, seconds)
        )
        curve = train(replace(TINY, medium_return=30, expert_return=80), tmp_path, progress_bar=False)
        assert [e.mean for e in curve] == [5, 40, 90]
        steps = {name: SAC.load(tmp_path / f"{name}.zip").num_timesteps for name in ("medium", "expert")}
        assert steps == {"medium": 120, "expert": 180}
        assert len(np.load(tmp_path / "medium-replay.npz")["rewards"]) == 120

    def test_a_finished_run_is_not_trained_again(self, tmp_path: Path) -> None:
        plan = replace(TINY, expert_return=None)
        curve = train(plan, tmp_path, progress_bar=False)
        before = (tmp_path / "expert.zip").stat().st_mtime_ns
        assert [e.step for e in train(plan, tmp_path, progress_bar=False)] == [e.step for e in curve] == [60, 120]
        assert (tmp_path / "expert.zip").stat().st_mtime_ns == before
        assert not (tmp_path / "checkpoints").exists()

    def test_a_run_stopped_at_the_medium_level_goes_on_to_the_expert_level(self, tmp_path: Path) -> None:
        plan = replace(TINY, expert_return=None)
        assert [e.step for e in train(plan, tmp_path, until="medium", progress_bar=False)] == [60]
        assert not (tmp_path / "expert.zip").exists()
        assert [e.step for e in train(plan, tmp_path, progress_bar=False)] == [60, 120]

    def test_training_leaves_the_plan_as_it_is(self, tmp_path: Path) -> None:
        before = json.dumps(asdict(PLANS["hopper"]))
        plan = replace(PLANS["hopper"], medium_return=None, expert_return=None, max_steps=240, stretch_steps=240, n_eval_episodes=1)
        train(plan, tmp_path, "medium", progress_bar=False)  # the level is reached with the last step
        assert json.dumps(asdict(PLANS["hopper"])) == before
        assert len(np.load(tmp_path / REPLAY)["rewards"]) == 240

    def test_a_folder_with_other_settings_is_refused(self, tmp_path: Path) -> None:
        train(replace(TINY, expert_return=None), tmp_path, progress_bar=False)
        with pytest.raises(ValueError, match="other settings"):
            train(replace(TINY, expert_return=None, seed=1), tmp_path, progress_bar=False)

    def test_a_level_out_of_reach_says_how_far_it_got(self, tmp_path: Path) -> None:
        with pytest.raises(LevelNotReachedError, match=r"expert level, a return of 1000000.0, in 180 steps \(best: [0-9]+ at step"):
            train(TINY, tmp_path, progress_bar=False)


class TestLocomotion:
    @pytest.mark.parametrize("tier", locomotion.TIERS)
    def test_quick_datasets_share_one_run_and_say_what_they_are(self, tier: str, cache: Path) -> None:
        dataset = make_dataset(f"sb3-diffrl/hopper/{tier}-v0", n_steps=200, quick=True, cache=cache, progress_bar=False)
        assert dataset.id == f"sb3-diffrl/hopper/{tier}-quick-v0"
        assert dataset.total_steps == 200
        assert "QUICK STAND-IN" in dataset.storage.metadata["description"]
        assert dataset.recover_environment(eval_env=True).spec.id == "Hopper-v5"
        if tier != "random":
            assert [path.name for path in cache.iterdir()] == ["hopper-quick-s0"]
            assert dataset.storage.metadata["provenance"]["training"]["expert_return"] is None

    def test_more_replay_than_there_is_is_an_error(self, cache: Path) -> None:
        with pytest.raises(ValueError, match="has 240 steps, all that training took"):
            make_dataset("sb3-diffrl/hopper/medium-replay-v0", n_steps=10_000, quick=True, cache=cache, progress_bar=False)

    def test_a_replay_is_what_training_saw(self, tmp_path: Path) -> None:
        """Played back in the environment, the actions give the recorded rewards and ends."""
        train(replace(TINY, stretch_steps=160, max_steps=320, expert_return=None), tmp_path, progress_bar=False)
        with np.load(tmp_path / "medium-replay.npz") as arrays:
            episodes = list(locomotion.replay_episodes(dict(arrays)))
        assert sum(len(episode.rewards) for episode in episodes) == 160
        assert len(episodes) > 3
        for i, episode in enumerate(episodes):
            is_last = i == len(episodes) - 1
            assert episode.terminations.tolist() == [False] * (len(episode.rewards) - 1) + [not is_last]
            assert episode.truncations.tolist() == [False] * (len(episode.rewards) - 1) + [is_last]
            env: Any = gym.make("Hopper-v5").unwrapped
            env.reset(seed=0)
            # The observation lacks the horizontal position only, of which nothing depends.
            env.set_state(np.append(0.0, episode.observations[0][:5]), episode.observations[0][5:])
            for step, action in enumerate(episode.actions[:5]):
                observation, reward, terminated, *_ = env.step(action)
                np.testing.assert_allclose(observation, episode.observations[step + 1], atol=1e-5)
                assert reward == pytest.approx(episode.rewards[step], abs=1e-5)
                assert terminated == episode.terminations[step]

    def test_the_newest_steps_are_kept(self) -> None:
        def episode(start: int, n: int) -> locomotion.Episode:
            flags = np.zeros(n, bool)
            return locomotion.Episode(np.arange(start, start + n + 1), np.arange(start, start + n), np.ones(n), flags, flags)

        kept = locomotion.newest([episode(0, 4), episode(10, 3), episode(20, 2)], 4)
        assert [e.actions.tolist() for e in kept] == [[11, 12], [20, 21]]
        assert [e.observations.tolist() for e in kept] == [[11, 12, 13], [20, 21, 22]]


class TestCommand:
    def test_an_unknown_id_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"Nearest: sb3-diffrl/halfcheetah/medium-v0"):
            make_dataset("sb3-diffrl/half-cheetah/medium-v2")

    def test_a_dataset_is_not_overwritten_silently(self) -> None:
        make_dataset(UMAZE, n_steps=50, progress_bar=False)
        with pytest.raises(FileExistsError, match="overwrite"):
            make_dataset(UMAZE, n_steps=60, progress_bar=False)
        assert minari.load_dataset(UMAZE).total_steps == 50

    def test_the_command_makes_and_lists(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert command(["dataset", "list"]) == 0
        assert set(DATASET_IDS) <= set(capsys.readouterr().out.split())
        assert command(["dataset", "make", UMAZE, "--n-steps", "70", "--quick"]) == 0
        assert "sb3-diffrl/pointmaze/umaze-quick-v0: " in capsys.readouterr().out
        assert minari.load_dataset("sb3-diffrl/pointmaze/umaze-quick-v0").total_steps == 70
        assert command(["dataset", "make", UMAZE, "--quick"]) == 1
        assert "error: There is a dataset" in capsys.readouterr().err


def curve_of(folder: Path) -> list[Evaluation]:
    return training.read_curve(folder / "curve.csv")


def last_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


def interrupting_after(n_steps: int) -> type[BaseCallback]:
    class Interrupting(BaseCallback):
        def __init__(self, bar: Any) -> None:
            super().__init__()

        def _on_step(self) -> bool:
            if self.num_timesteps > n_steps:
                raise KeyboardInterrupt
            return True

    return Interrupting
