"""Long runs and threads: memory stays flat, no file is left open, two threads get what one gets.

``benchmarks/faults.py long`` does the same a million times.
"""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest

from sb3_diffrl import NCLQL, DiffusionPlanner

from .envs import box_env
from .test_nonfinite import OFFLINE, dataset, offline

TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "n_levels": 2, "n_langevin_steps": 1, "buffer_size": 100}


def tiny() -> NCLQL:
    return NCLQL("MlpPolicy", box_env(), learning_starts=5, batch_size=4, seed=0, device="cpu", **TINY).learn(20)


def growth(act: Callable[[], object], times: int = 150) -> tuple[float, int, int]:
    """KiB, open files and Python objects for each call, once it has become used to them; what leaks grows in every part."""
    usages = []
    for _ in range(4):
        for _ in range(times):
            act()
        gc.collect()
        used = faults.usage()
        usages.append((used["memory_mib"], used["open_files"], len(gc.get_objects())))
    # (parts, 3)
    least = np.diff(usages[1:], axis=0).min(axis=0)
    return 1024 * least[0] / times, int(least[1]), int(least[2])


def test_updates_and_predictions_leave_nothing_behind() -> None:
    model, obs = tiny(), np.zeros(5, np.float32)

    def act() -> None:
        model.train(1, batch_size=4)
        model.predict(obs)

    memory, files, objects = growth(act)
    assert memory < 3
    assert (files, objects) == (0, 0)


def test_saving_and_loading_leave_no_file_open(tmp_path: Path) -> None:
    model = tiny()

    def some(n: int) -> float:
        for _ in range(n):
            model.save(tmp_path / "model")
            model.save_replay_buffer(tmp_path / "buffer")
            NCLQL.load(tmp_path / "model", device="cpu").load_replay_buffer(tmp_path / "buffer")
        return float(faults.usage()["open_files"])

    assert some(1) == some(5)


def in_threads(work: Callable[[], list[np.ndarray]]) -> list[list[np.ndarray]]:
    """What three threads get that do the same at the same time."""
    with ThreadPoolExecutor(3) as pool:
        return [future.result() for future in [pool.submit(work) for _ in range(3)]]


def model_and_batches(kind: str) -> tuple[Any, list[np.ndarray]]:
    model: Any = tiny() if kind == "NCLQL" else offline(kind, dataset())
    n = model.observation_space.shape[0]
    return model, [np.random.default_rng(i).normal(size=(1 + i % 7, n)).astype(np.float32) for i in range(60)]


@pytest.mark.parametrize("kind", ["NCLQL", *OFFLINE])
def test_threads_that_predict_at_once_get_what_one_gets(kind: str) -> None:
    model, batches = model_and_batches(kind)

    def work() -> list[np.ndarray]:
        # Actions of a planner that has learned nothing are at the bounds; its plans differ.
        plans = [model.plan(batch, deterministic=True) for batch in batches] if isinstance(model, DiffusionPlanner) else []
        return plans + [model.predict(batch, deterministic=True)[0] for batch in batches]

    expected = work()
    for results in in_threads(work):
        assert len(results) == len(expected)
        for mine, theirs in zip(results, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["NCLQL", *OFFLINE])
def test_threads_that_sample_at_once_get_actions_of_the_space(kind: str) -> None:
    model, batches = model_and_batches(kind)
    for results in in_threads(lambda: [model.predict(batch)[0] for batch in batches]):
        assert all(model.action_space.contains(action) for actions in results for action in actions)
        assert len({action.tobytes() for actions in results for action in actions}) > 3  # they are drawn
