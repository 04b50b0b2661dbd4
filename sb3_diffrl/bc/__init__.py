"""Diffusion behaviour cloning."""

from sb3_diffrl.bc.diffusion_bc import DiffusionBC
from sb3_diffrl.bc.policies import DiffusionPolicy, MlpPolicy

__all__ = ["DiffusionBC", "DiffusionPolicy", "MlpPolicy"]
