"""Stable-Baselines3 agents whose policies are samplers."""

from sb3_diffrl.lql import LQL, NCLQL

__version__ = "0.1.0"

__all__ = ["LQL", "NCLQL", "__version__"]
