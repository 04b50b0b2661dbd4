"""Stable-Baselines3 agents whose policies are samplers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_diffrl.bc import DiffusionBC
    from sb3_diffrl.common import NonFiniteError
    from sb3_diffrl.lql import LQL, NCLQL
    from sb3_diffrl.offline import (
        OfflineAlgorithm,
        OfflineDataset,
        fill_replay_buffer,
        make_dataset,
        normalized_score,
        record_dataset,
    )
    from sb3_diffrl.pg import PG
    from sb3_diffrl.planner import DiffusionPlanner
    from sb3_diffrl.saving import ModelFileError

__version__ = "0.1.0"

# Imported on first use: somebody who wants one part of the package does not load what the others need.
_HOMES = {
    "LQL": "sb3_diffrl.lql",
    "NCLQL": "sb3_diffrl.lql",
    "PG": "sb3_diffrl.pg",
    "DiffusionBC": "sb3_diffrl.bc",
    "DiffusionPlanner": "sb3_diffrl.planner",
    "ModelFileError": "sb3_diffrl.saving",
    "NonFiniteError": "sb3_diffrl.common",
    "OfflineAlgorithm": "sb3_diffrl.offline",
    "OfflineDataset": "sb3_diffrl.offline",
    "fill_replay_buffer": "sb3_diffrl.offline",
    "make_dataset": "sb3_diffrl.offline",
    "normalized_score": "sb3_diffrl.offline",
    "record_dataset": "sb3_diffrl.offline",
}

__all__ = [
    "LQL",
    "NCLQL",
    "PG",
    "DiffusionBC",
    "DiffusionPlanner",
    "ModelFileError",
    "NonFiniteError",
    "OfflineAlgorithm",
    "OfflineDataset",
    "__version__",
    "fill_replay_buffer",
    "make_dataset",
    "normalized_score",
    "record_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
