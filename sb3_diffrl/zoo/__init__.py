"""RL Zoo knows the package's algorithms after ``import sb3_diffrl.zoo``: training, tuning, playing, plots, logs.

RL Zoo changes Gymnasium when it is imported (its ``TimeLimit`` marks time-outs in the infos): nothing else here imports it.
"""

try:
    import rl_zoo3  # noqa: F401
except ImportError as error:
    raise ImportError('RL Zoo is not installed: pip install "sb3_diffrl[zoo]"') from error

from sb3_diffrl.zoo.experiment import Experiment
from sb3_diffrl.zoo.registration import ALGORITHMS, register

register()

__all__ = ["ALGORITHMS", "Experiment", "register"]
