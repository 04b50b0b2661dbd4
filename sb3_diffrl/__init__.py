"""Stable-Baselines3 agents whose policies are samplers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_diffrl.lql import LQL, NCLQL

__version__ = "0.1.0"

__all__ = ["LQL", "NCLQL", "__version__"]

# Imported on first use: somebody who wants one part of the package does not load what the others need.
_HOMES = {"LQL": "sb3_diffrl.lql", "NCLQL": "sb3_diffrl.lql"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
