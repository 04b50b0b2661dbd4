"""The package's algorithms in RL Zoo's tables."""

import sys

import rl_zoo3.exp_manager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_diffrl.bc import DiffusionBC
from sb3_diffrl.lql import LQL, NCLQL
from sb3_diffrl.pg import PG
from sb3_diffrl.planner import DiffusionPlanner
from sb3_diffrl.zoo.experiment import Experiment
from sb3_diffrl.zoo.spaces import CONVERTERS, SAMPLERS

#: Name in RL Zoo -> class.
ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "nclql": NCLQL,
    "lql": LQL,
    "pg": PG,
    "planner": DiffusionPlanner,
    "diffusion_bc": DiffusionBC,
}


def register() -> None:
    """Enter the algorithms in RL Zoo's tables, in place: all of RL Zoo shares them. Doing it twice is as doing it once."""
    ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update(SAMPLERS)
    HYPERPARAMS_CONVERTER.update(CONVERTERS)
    # RL Zoo looks for settings in its own folder alone, and has no place for a dataset.
    rl_zoo3.exp_manager.ExperimentManager = Experiment  # type: ignore[misc]
    if "rl_zoo3.train" in sys.modules:
        sys.modules["rl_zoo3.train"].ExperimentManager = Experiment  # type: ignore[attr-defined]
