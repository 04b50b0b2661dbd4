"""PG: a diffusion planner whose noise comes from a learnt prior."""

from sb3_diffrl.pg.pg import PG
from sb3_diffrl.pg.policies import MlpPolicy, PGPolicy

__all__ = ["PG", "MlpPolicy", "PGPolicy"]
