"""Normalised scores: the scale, where its two ends come from, and what is said where there are none."""

from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest

from sb3_diffrl.offline import evaluation
from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.evaluation import REFERENCES, normalized_score, reference_scores
from sb3_diffrl.offline.recording import record_dataset

from .minari_data import write_episodes

pytestmark = pytest.mark.usefixtures("datasets_in_tmp_path")

SCALE = {"random": {"mean_return": -1000.0}, "expert": {"mean_return": -200.0}}


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, dict[str, Any]]]:
    known = {"Pendulum-v1": SCALE}
    monkeypatch.setattr(evaluation, "REFERENCES", known)
    return known


def test_a_datasets_own_ends_come_first(references: dict[str, Any]) -> None:
    dataset = record_dataset(None, "Pendulum-v1", "test/own-v0", n_steps=2, ref_min_score=0, ref_max_score=10)
    scores = normalized_score(dataset, np.array([[0, 5], [10, 20]]))
    np.testing.assert_array_equal(scores, [[0, 0.5], [1, 2]])
    np.testing.assert_array_equal(scores, normalized_score(OfflineDataset.load(dataset), np.array([[0, 5], [10, 20]])))
    np.testing.assert_array_equal(scores, minari.get_normalized_score(dataset, np.array([[0, 5], [10, 20]])))


def test_the_packages_ends_stand_in_for_the_evaluation_env(references: dict[str, Any]) -> None:
    # Made without references: those of its evaluation env count
    references.clear()
    dataset = record_dataset(None, "CartPole-v1", "test/without-v0", n_steps=2, eval_env="Pendulum-v1")
    references["Pendulum-v1"] = SCALE
    assert float(normalized_score("test/without-v0", -600)) == 0.5
    assert float(normalized_score([dataset, "test/without-v0"], -600)) == 0.5


@pytest.mark.parametrize("missing", ["random", "expert"])
def test_a_missing_end_is_named(missing: str, references: dict[str, Any]) -> None:
    references["Pendulum-v1"] = {end: entry for end, entry in SCALE.items() if end != missing}
    dataset = record_dataset(None, "Pendulum-v1", "test/half-v0", n_steps=2)
    with pytest.raises(ValueError, match=f"no {missing} reference for dataset 'test/half-v0' \\(env Pendulum-v1\\)"):
        normalized_score(dataset, 0)


def test_what_has_no_env_has_no_scale() -> None:
    with pytest.raises(ValueError, match="no random reference"):
        normalized_score(write_episodes("test/no-env-v0", [2]), 0)
    with pytest.raises(FileNotFoundError):
        normalized_score("test/absent-v0", 0)


def test_a_scale_upside_down_is_refused() -> None:
    dataset = record_dataset(None, "Pendulum-v1", "test/down-v0", n_steps=2, ref_min_score=1, ref_max_score=0)
    with pytest.raises(ValueError, match="the expert's must be higher"):
        normalized_score(dataset, 0)


def test_datasets_on_different_scales_have_no_common_score() -> None:
    datasets = [
        record_dataset(None, "Pendulum-v1", f"test/scale{top}-v0", n_steps=2, ref_min_score=0, ref_max_score=top) for top in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"'test/scale1-v0': \(0.0, 1.0\), 'test/scale2-v0': \(0.0, 2.0\)"):
        normalized_score(datasets, 0)


def test_another_task_under_the_same_id_has_other_references(references: dict[str, Any]) -> None:
    assert reference_scores(gym.spec("Pendulum-v1")) == (-1000, -200)
    variants = [gym.make("Pendulum-v1", g=3.0), gym.make("Pendulum-v1", max_episode_steps=10)]
    variants.append(gym.wrappers.FlattenObservation(gym.make("Pendulum-v1")))
    for env in variants:
        assert reference_scores(env.spec) == (None, None)
    assert reference_scores(None) == reference_scores(gym.spec("CartPole-v1")) == (None, None)


def test_every_reference_says_where_it_comes_from() -> None:
    envs = {f"{name}-v5" for name in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "InvertedPendulum", "Swimmer", "Walker2d")}
    assert envs | {"Pendulum-v1"} <= set(REFERENCES)
    for env_id, ends in REFERENCES.items():
        assert gym.spec(env_id)
        assert "random" in ends
        assert set(ends) <= {"random", "expert"}
        for entry in ends.values():
            assert np.isfinite([entry["mean_return"], entry["std_return"]]).all()
            assert entry["n_episodes"] >= 10
            assert {"seed", "versions"} <= set(entry)
            assert {"gymnasium", "mujoco"} <= set(entry["versions"])
        if "expert" in ends:
            assert ends["random"]["mean_return"] < ends["expert"]["mean_return"]


def test_the_random_reference_is_what_random_actions_return() -> None:
    entry = REFERENCES["Pendulum-v1"]["random"]
    dataset = record_dataset(None, "Pendulum-v1", "test/random-v0", n_episodes=30, seed=99)
    mean = dataset.storage.metadata["provenance"]["mean_return"]
    error = entry["std_return"] * np.sqrt(1 / 30 + 1 / entry["n_episodes"])
    assert abs(mean - entry["mean_return"]) < 4 * error
