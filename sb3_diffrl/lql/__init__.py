"""Langevin Q-learning: online agents whose policy is Langevin dynamics on the critic."""

from sb3_diffrl.common import NonFiniteError
from sb3_diffrl.lql.langevin import LangevinSampler
from sb3_diffrl.lql.lql import LQL
from sb3_diffrl.lql.nclql import NCLQL
from sb3_diffrl.lql.policies import CnnPolicy, LangevinPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["LQL", "NCLQL", "CnnPolicy", "LangevinPolicy", "LangevinSampler", "MlpPolicy", "MultiInputPolicy", "NonFiniteError"]
