"""DiffusionPlanner: trajectory diffusion, inverse dynamics, and four ways to plan for value."""

from sb3_diffrl.planner.diffusion_planner import DiffusionPlanner
from sb3_diffrl.planner.policies import MlpPolicy, PlannerPolicy
from sb3_diffrl.planner.presets import PRESETS

__all__ = ["PRESETS", "DiffusionPlanner", "MlpPolicy", "PlannerPolicy"]
