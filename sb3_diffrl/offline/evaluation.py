"""Normalised scores: 0 is a random policy, 1 is an expert."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec

from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.reading import DatasetSource, open_datasets

# Env id -> "random" and "expert" -> mean return and its provenance, in units of the env's undiscounted return. Random ones are
# measured by benchmarks/reference_scores.py.
REFERENCES: dict[str, dict[str, dict[str, Any]]] = json.loads(
    files("sb3_diffrl.offline").joinpath("references.json").read_text(encoding="utf-8")
)


def normalized_score(
    dataset: DatasetSource | OfflineDataset | Sequence[DatasetSource], returns: float | Sequence[float] | np.ndarray
) -> np.ndarray:
    """Place returns on the scale on which a random policy scores 0 and an expert 1 (``minari.get_normalized_score``).

    The two ends of the scale are the dataset's own, from its metadata; where it has none, those of ``REFERENCES`` for its
    evaluation env.

    :param dataset: id, dataset (loaded or not), or a list of ids and Minari datasets
    :param returns: undiscounted returns of episodes in the evaluation env, of any shape
    :return: scores, of the same shape; D4RL's are 100 times these
    :raises ValueError: if there is no random or no expert reference, or several datasets do not agree on them
    """
    sources = dataset.sources if isinstance(dataset, OfflineDataset) else open_datasets(dataset)
    if not sources:
        raise ValueError("This dataset was not read from disk: it has no references.")
    scales = [_scale(source) for source in sources]
    if any(scale != scales[0] for scale in scales):
        named = ", ".join(f"{source.id!r}: {scale}" for source, scale in zip(sources, scales, strict=True))
        raise ValueError(f"The datasets have different random and expert references ({named}): name the one to score by.")
    low, high = scales[0]
    return (np.asarray(returns, np.float64) - low) / (high - low)


def reference_scores(spec: EnvSpec | None) -> tuple[float | None, float | None]:
    """Mean returns of a random policy and of an expert in an env, as far as ``REFERENCES`` has them.

    :param spec: of the env; one with other arguments or wrappers than the registered env's is another task
    """
    registered = None if spec is None or spec.id not in REFERENCES else gym.registry.get(spec.id)
    if spec is None or registered is None:
        return None, None
    if spec.kwargs != registered.kwargs or spec.additional_wrappers or spec.max_episode_steps != registered.max_episode_steps:
        return None, None
    low, high = (REFERENCES[spec.id].get(name, {}).get("mean_return") for name in ("random", "expert"))
    return low, high


def _scale(source: minari.MinariDataset) -> tuple[float, float]:
    metadata = source.storage.metadata
    own = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    eval_spec = metadata.get("eval_env_spec")
    spec = source.env_spec if eval_spec is None else EnvSpec.from_json(str(eval_spec))
    known = reference_scores(spec)
    low, high = (mine if mine is not None else ours for mine, ours in zip(own, known, strict=True))
    if low is None or high is None:
        missing = "random" if low is None else "expert"
        raise ValueError(
            f"There is no {missing} reference for dataset {source.id!r} (env {None if spec is None else spec.id}): its metadata "
            f"has none, and the package's own are for {sorted(REFERENCES)}. Set them in the dataset with "
            "`dataset.storage.update_metadata({'ref_min_score': ..., 'ref_max_score': ...})`, or report plain returns."
        )
    if not low < high:
        raise ValueError(
            f"Dataset {source.id!r} has a random reference of {low} and an expert one of {high}: the expert's must be higher."
        )
    return float(low), float(high)
