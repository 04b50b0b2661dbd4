"""Long runs and threads: memory stays flat, no file is left open, two threads get what one gets.

``benchmarks/faults.py long`` does the same a million times.
"""

import gc
import threading
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest

from sb3_diffrl import NCLQL, DiffusionBC

from .envs import box_env
from .test_saving import tiny_dataset

TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "n_levels": 2, "n_langevin_steps": 1, "buffer_size": 100}


def tiny() -> NCLQL:
    return NCLQL("MlpPolicy", box_env(), learning_starts=5, batch_size=4, seed=0, device="cpu", **TINY).learn(20)


def test_updates_and_predictions_leave_nothing_behind() -> None:
    model, obs = tiny(), np.zeros(5, np.float32)

    def some(n: int) -> tuple[float, float, int]:
        model.train(n, batch_size=4)
        for _ in range(n):
            model.predict(obs)
        gc.collect()
        used = faults.usage()
        return used["memory_mib"], used["open_files"], len(gc.get_objects())

    some(300)
    memory, files, objects = some(300)
    memory_later, files_later, objects_later = some(1500)
    assert memory_later - memory < 8
    assert files_later == files
    assert objects_later - objects < 200


def test_saving_and_loading_leave_no_file_open(tmp_path: Path) -> None:
    model = tiny()

    def some(n: int) -> float:
        for _ in range(n):
            model.save(tmp_path / "model")
            model.save_replay_buffer(tmp_path / "buffer")
            NCLQL.load(tmp_path / "model", device="cpu").load_replay_buffer(tmp_path / "buffer")
        return float(faults.usage()["open_files"])

    assert some(1) == some(5)


@pytest.mark.parametrize("kind", ["NCLQL", "DiffusionBC"])
def test_threads_that_predict_at_once_get_what_one_gets(kind: str) -> None:
    bc: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 0}
    model: Any = tiny() if kind == "NCLQL" else DiffusionBC("MlpPolicy", dataset=tiny_dataset(), **bc)
    n = 5 if kind == "NCLQL" else 3
    batches = [np.random.default_rng(i).normal(size=(1 + i % 7, n)).astype(np.float32) for i in range(60)]
    expected = [model.predict(batch, deterministic=True)[0] for batch in batches]
    found: list[list[np.ndarray]] = [[], [], []]

    def work(results: list[np.ndarray]) -> None:
        results += [model.predict(batch, deterministic=True)[0] for batch in batches]

    threads = [threading.Thread(target=work, args=(results,)) for results in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in found:
        assert len(results) == len(expected)
        for mine, theirs in zip(results, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
