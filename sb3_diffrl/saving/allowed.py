"""The classes that a file may name."""

import importlib
import inspect
import sys
from functools import cache

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

#: Objects that their constructor makes again from their attributes: class -> constructor argument -> attribute.
STABLE_BASELINES3_VALUES: dict[type, dict[str, str]] = {
    ConstantSchedule: {"val": "val"},
    LinearSchedule: {"start": "start", "end": "end", "end_fraction": "end_fraction"},
    FloatSchedule: {"value_schedule": "value_schedule"},
    NormalActionNoise: {"mean": "_mu", "sigma": "_sigma", "dtype": "_dtype"},
    OrnsteinUhlenbeckActionNoise: {
        "mean": "_mu",
        "sigma": "_sigma",
        "theta": "_theta",
        "dt": "_dt",
        "initial_noise": "initial_noise",
        "dtype": "_dtype",
    },
    VectorizedActionNoise: {"base_noise": "base_noise", "n_envs": "n_envs"},
}
#: The same of our own, whose attributes are named as the arguments.
OUR_VALUES = {
    "sb3_diffrl.common.CosineSchedule",
    "sb3_diffrl.lql.langevin.LangevinSampler",
    "sb3_diffrl.timesteps.adaptive.AdaptiveTimestepSampler",
    "sb3_diffrl.timesteps.samplers.LogNormalTimestepSampler",
    "sb3_diffrl.timesteps.samplers.LogitNormalTimestepSampler",
    "sb3_diffrl.timesteps.samplers.LossSecondMomentSampler",
    "sb3_diffrl.timesteps.samplers.SpeedTimestepSampler",
    "sb3_diffrl.timesteps.samplers.UniformTimestepSampler",
    "sb3_diffrl.timesteps.weightings.MinSNR",
    "sb3_diffrl.timesteps.weightings.P2",
}
#: Parts of this package that hold policies and networks.
OUR_PARTS = {"bc", "diffusion", "lql", "planner", "pg", "offline", "timesteps"}

NUMPY_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
_OTHERS = (
    *(FlattenExtractor, NatureCNN, CombinedExtractor, RMSpropTFLike),
    *(ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer),
    *(GoalSelectionStrategy, TrainFrequencyUnit, bool, int, float),
)


@cache
def _by_name() -> dict[str, type]:
    # Activations and optimisers of torch, under their short names; and single classes
    names: dict[str, type] = {f"torch.nn.{name}": getattr(nn, name) for name in nn.modules.activation.__all__}
    names |= {
        f"torch.optim.{name}": value
        for name, value in vars(th.optim).items()
        if inspect.isclass(value) and issubclass(value, th.optim.Optimizer)
    }
    names |= {f"numpy.{name}": getattr(np, name) for name in NUMPY_TYPES}
    return names | {f"{value.__module__}.{value.__qualname__}": value for value in (*_OTHERS, *STABLE_BASELINES3_VALUES)}


@cache
def _names() -> dict[type, str]:
    return {value: name for name, value in _by_name().items()}


def name_of_class(cls: type) -> str | None:
    """The name that a class has in a file, ``None`` if it is not allowed."""
    if cls in _names():
        return _names()[cls]
    name = f"{cls.__module__}.{cls.__qualname__}"
    return name if name in OUR_VALUES or _is_ours(name, cls) else None


def find_class(name: str) -> type:
    """The class of a name.

    :raises KeyError: if it is not allowed; nothing is imported then
    """
    if name in _by_name():
        return _by_name()[name]
    module, _, _ = name.rpartition(".")
    parts = module.split(".")
    if name in OUR_VALUES or (parts[0] == "sb3_diffrl" and len(parts) > 1 and parts[1] in OUR_PARTS):
        found = _find_ours(name)
        if found is not None and (name in OUR_VALUES or _is_ours(name, found)):
            return found
    raise KeyError(f"the class {name[:200]!r} is not allowed")


def find_value_class(name: str) -> type:
    """The class of a name, if its objects may be made.

    :raises KeyError: if they may not; nothing is imported then
    """
    if name in OUR_VALUES or _by_name().get(name) in STABLE_BASELINES3_VALUES:
        return find_class(name)
    raise KeyError(f"objects of the class {name[:200]!r} are not allowed")


def value_arguments(cls: type) -> dict[str, str] | None:
    """Arguments that make an object again, and the attributes they are in; ``None`` if objects of the class are not allowed."""
    if cls in STABLE_BASELINES3_VALUES:
        return STABLE_BASELINES3_VALUES[cls]
    if f"{cls.__module__}.{cls.__qualname__}" in OUR_VALUES:
        return {name: name for name in inspect.signature(cls).parameters}
    return None


def _is_ours(name: str, cls: type) -> bool:
    # Networks and policies of this package, not what anybody has put into its namespace
    module, _, qualname = name.rpartition(".")
    return (
        name.startswith("sb3_diffrl.")
        and issubclass(cls, (nn.Module, BasePolicy))
        and getattr(sys.modules.get(module), qualname, None) is cls
    )


def _find_ours(name: str) -> type | None:
    module, _, qualname = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), qualname, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and found.__module__ == module else None
