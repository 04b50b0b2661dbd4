"""Figures are of the numbers that they should be of."""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch as th
from PIL import Image

from sb3_diffrl import NCLQL
from sb3_diffrl.plots import Curve, landscape, plot_curves, plot_profiles, plot_q_landscape, read_curves
from sb3_diffrl.plots.landscape import q_landscape
from sb3_diffrl.plots.scores import common_grid, final_scores, iqm_curve
from tests.envs import box_env


def curve(label: str, last: float, task: str = "T", n: int = 5) -> Curve:
    return Curve(label, task, "r", np.arange(1, n + 1) * 100, np.linspace(0, last, n))


def size(path: Path) -> tuple[int, ...]:
    return matplotlib.image.imread(path).shape


def test_logs_of_every_kind_are_read(tmp_path: Path) -> None:
    run = tmp_path / "logs" / "nclql" / "My-Env_v_2"
    run.mkdir(parents=True)
    np.savez(run / "evaluations.npz", timesteps=[10, 20], results=[[1.0, 3.0], [5.0, 7.0]], ep_lengths=[[1, 1], [1, 1]])
    (run / "0.monitor.csv").write_text('#{"t_start": 0, "env_id": "x"}\nr,l,t\n1,10,1\n3,10,2\n8,20,3\n')
    with (tmp_path / "bench-E-v0-s0.csv").open("w") as file:
        csv.writer(file).writerows([["step", "episode", "return"], [5, 0, 2], [5, 1, 4], [9, 0, 1]])
    (tmp_path / "bench-E-v0-s0.json").write_text(json.dumps({"arguments": {"env": "E-v0", "seed": 0}}))

    zoo, bench = read_curves([tmp_path])
    assert (zoo.label, zoo.task) == ("nclql", "My-Env_v")
    assert zoo.steps.tolist() == [10, 20]
    assert zoo.returns.tolist() == [2.0, 6.0]
    assert (bench.label, bench.task) == ("bench", "E-v0")
    assert bench.returns.tolist() == [3.0, 1.0]
    (training,) = read_curves([f"mine={run}"], monitor=True, window=2)
    assert training.label == "mine"
    assert training.steps.tolist() == [20, 40]
    assert training.returns.tolist() == [2.0, 5.5]
    with pytest.raises(FileNotFoundError, match=r"no evaluations\.npz"):
        read_curves([tmp_path / "nothing"])


def test_runs_of_different_lengths_meet() -> None:
    long, short = curve("a", 10.0), Curve("a", "T", "r", np.array([150, 250]), np.array([1.0, 2.0]))
    steps, returns = common_grid([long, short])
    assert steps.tolist() == [150, 250]
    assert returns[0].tolist() == [1.25, 3.75]


def test_interquartile_mean_and_its_interval() -> None:
    scores = np.array([[0.0], [1.0], [2.0], [30.0]])
    middle, (low, high) = iqm_curve(scores)
    assert middle.tolist() == [1.5]  # the outer quarters do not count
    assert low[0] < 1.5 < high[0]
    assert low[0] >= 0
    same, (left, right) = iqm_curve(np.full((3, 1), 4.0))
    assert same == left == right == 4.0


def test_scores_are_scaled_by_task() -> None:
    curves = [curve("a", 10, "X"), curve("b", 20, "X"), curve("a", 5, "Y"), curve("b", 1, "Y")]
    scores = final_scores(curves)
    assert scores["a"].tolist() == [[0.0, 1.0]]
    assert final_scores(curves, {"X": (0, 100), "Y": (0, 10)})["b"].tolist() == [[0.2, 0.1]]
    with pytest.raises(ValueError, match="no run on Y"):
        final_scores(curves[:3])


def test_curves_and_profiles_are_drawn(tmp_path: Path) -> None:
    curves = [curve("good", 10.0 + i) for i in range(4)] + [curve("bad", 1.0 + i) for i in range(4)]
    assert size(plot_curves(curves, tmp_path / "a" / "curves.png", {"T": 9.0}))[0] > 300
    path, numbers = plot_profiles(curves, tmp_path / "profiles.png", reps=100)
    assert size(path)[1] > 1000
    ((_, chance),) = [(name, value) for name, value in numbers.items() if " over " in name]
    assert chance[0] == 1.0  # every good run is above every bad one
    assert numbers["good"]["IQM"][0] > numbers["bad"]["IQM"][0]
    assert numbers["good"]["IQM"][1] <= numbers["good"]["IQM"][0] <= numbers["good"]["IQM"][2]


@pytest.mark.parametrize("action_dim", [1, 2, 3])
def test_chains_on_the_landscape_are_the_policys_own(action_dim: int) -> None:
    model = NCLQL("MlpPolicy", box_env(3, action_dim), policy_kwargs={"net_arch": [8]}, device="cpu", seed=0, n_levels=3)
    obs = np.full((1, 3), 0.3, np.float32)
    land = q_landscape(model, obs, n_chains=5, seed=7)
    n_steps = 3 * 2
    assert land.chains.shape == (n_steps + 1, 5, min(action_dim, 2))
    assert land.levels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    # The chains are those that the sampler runs from the same draws.
    draws = model.policy.sampler.draw(5, action_dim, generator=th.Generator().manual_seed(7))
    ends = model.policy.sample_actions(th.as_tensor(obs).expand(5, -1), draws)
    assert np.allclose(land.chains[-1], ends[:, : min(action_dim, 2)].numpy(), atol=1e-3)
    # Values are the critics', in units of returns: look one up.
    center = model.policy.deterministic_actions(th.as_tensor(obs))
    column, row = 10, 60
    action = center.clone()
    action[0, 0] = float(land.grid[column])
    if action_dim > 1:
        action[0, 1] = float(land.grid[row])
    with th.no_grad():
        value = model.critic.q_values(model.critic.features(th.as_tensor(obs)), action).amin() / model.reward_scale
    found = land.values[-1][column] if action_dim == 1 else land.values[-1][row, column]
    assert found == pytest.approx(float(value), abs=1e-4)


def test_an_animation_that_is_stopped_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NCLQL("MlpPolicy", box_env(3, 2), policy_kwargs={"net_arch": [8]}, device="cpu", seed=0, n_levels=2)
    path, draw = tmp_path / "q.gif", landscape._draw
    path.write_bytes(b"former")

    def stopped(axes: Any, land: Any, frame: int, *args: Any) -> list[Any]:
        if frame == 2:
            raise KeyboardInterrupt
        return draw(axes, land, frame, *args)

    monkeypatch.setattr(landscape, "_draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        plot_q_landscape(model, np.zeros((1, 3), np.float32), path, n_chains=3)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"former"]


def test_landscape_is_drawn_and_moves(tmp_path: Path) -> None:
    model = NCLQL("MlpPolicy", box_env(3, 2), policy_kwargs={"net_arch": [8]}, device="cpu", seed=0, n_levels=2)
    obs = np.zeros((1, 3), np.float32)
    assert size(plot_q_landscape(model, obs, tmp_path / "q.png"))[0] > 300
    with Image.open(plot_q_landscape(model, obs, tmp_path / "q.gif", n_chains=3)) as gif:
        assert gif.n_frames >= 5
    with pytest.raises(ValueError, match="0 to 1"):
        plot_q_landscape(model, obs, tmp_path / "no.png", dims=(0, 5))
