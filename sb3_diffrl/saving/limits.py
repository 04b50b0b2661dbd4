"""Types and ranges of what a file gives: types from the annotations of constructors, ranges from a table."""

import math
import numbers
import random
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv

OBSERVATION = np.ndarray | dict[str, np.ndarray] | None
#: Types of attributes that are no arguments of the constructor, or may be of more types than it says
TYPES: dict[str, Any] = {
    "policy_class": type[BasePolicy],
    "observation_space": spaces.Space,
    "action_space": spaces.Box,
    "learning_starts": float,
    "train_freq": int | tuple[int, str] | TrainFreq,
    "tensorboard_log": str | Path | None,
    **dict.fromkeys(("_last_obs", "_last_original_obs"), OBSERVATION),
    "_last_episode_starts": np.ndarray | None,
    **dict.fromkeys(("ep_info_buffer", "ep_success_buffer"), deque | None),
    "_current_progress_remaining": float,
    "start_time": float,
    **dict.fromkeys(("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num", "_n_updates"), int),
    **dict.fromkeys(("n_skipped", "_skipped_in_a_row", "n_envs", "dataset_steps", "dataset_checksum", "sde_sample_freq"), int),
    **dict.fromkeys(("use_sde", "use_sde_at_warmup"), Literal[False]),
    "_env_seed": int | None,
    "action_noise": ActionNoise | None,
    "dataset_ids": Sequence[str],
    "trains_prior": bool,
    "_random_state": dict[str, Any] | None,
    "_generator_state": tuple[str, np.ndarray] | None,
}
FRACTION, COUNTER, MANY = (0, 1), (0, 2**62), (1, 10_000)
#: Smallest and largest of what is made or done so many times when a model is made, acts or learns, wherever a file names it
COUNTS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("n_langevin_steps", "n_particles", "n_steps", "n_envs", "n_levels", "n_critics"), MANY),
    **dict.fromkeys(("num_train_timesteps", "num_inference_steps", "prior_inference_steps"), MANY),
    **dict.fromkeys(("horizon", "stride", "n_candidates", "num_action_steps", "n_sampled_goal"), MANY),
}
#: The same of a model's attributes, and of their other numbers
RANGES: dict[str, tuple[float, float]] = {
    **COUNTS,
    **dict.fromkeys(("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num", "_n_updates"), COUNTER),
    **dict.fromkeys(("n_skipped", "_skipped_in_a_row", "learning_starts", "start_time", "dataset_steps"), COUNTER),
    **dict.fromkeys(("tau", "gamma", "ema_decay", "discount", "cfg_dropout", "planner_fraction"), FRACTION),
    **dict.fromkeys(("seed", "_env_seed"), (0, 2**63 - 1)),
    **dict.fromkeys(("batch_size", "_stats_window_size"), (1, 10**6)),
    "gradient_steps": (-1, 10**6),
    "buffer_size": (1, 10**7),
    "learning_rate": (0, 10**6),
    "verbose": (0, 10),
}
#: Of a sampler: the noise of a chain has that many rows.
CHAIN = ("n_levels", "n_langevin_steps", "n_steps", "n_particles"), 10**6


class UnfitError(ValueError):
    """A value that cannot be.

    :param name: of the attribute or argument
    :param reason: what is wrong with it, for messages
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name[:100]!r} {reason}")
        self.name = name


def check_arguments(
    made: Callable[..., Any],
    arguments: Mapping[str, Any],
    aliases: Mapping[str, Any] | None = None,
    ranges: Mapping[str, tuple[float, float]] = COUNTS,
) -> None:
    """Compare arguments with the annotations of a constructor and with ranges.

    :param made: class or constructor
    :param arguments: by name; an attribute may have the argument's name with an underscore before it
    :param aliases: types of other names
    :param ranges: smallest and largest by name
    :raises UnfitError: naming the one that does not fit
    """
    hints = {**_hints(made.__init__ if isinstance(made, type) else made), **(aliases or {})}  # type: ignore[misc]
    for name, value in arguments.items():
        hint = hints.get(name, hints.get(name.removeprefix("_"), Any))
        if not fits(value, hint):
            raise UnfitError(name, f"is {str(value)[:50]!r}, it should be of the type {_named(hint)}")
        low, high = ranges.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float, np.number)) and not low <= value <= high:
            raise UnfitError(name, f"is {value}, it should be from {low:,} to {high:,}")
    names, most = CHAIN
    product = math.prod(value for name in names if isinstance(value := arguments.get(name, 1), int))
    if product > most:
        name = max(names, key=lambda name: arguments.get(name, 1))
        raise UnfitError(name, f"is too much: {' times '.join(names)} is {product:,}, it should be {most:,} at most")


@cache
def _hints(constructor: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(constructor, localns={"VecEnv": VecEnv})
    except (NameError, TypeError):  # of somebody else's class
        return {}


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that an annotation says; annotations of other kinds than are used here allow everything."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in args)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if origin is dict:
        return isinstance(value, dict) and all(fits(key, args[0]) and fits(item, args[1]) for key, item in value.items())
    if origin is tuple and args[-1:] != (...,):
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, value, args))
    if origin in (list, tuple, Sequence):
        taken = (list, tuple) if origin is Sequence else origin
        return isinstance(value, taken) and all(fits(item, args[0]) for item in value)
    return _is_one(value, origin or hint, args)


def _is_one(value: Any, kind: Any, args: tuple[Any, ...]) -> bool:
    if kind is Any:
        return True
    if kind in (None, types.NoneType):
        return value is None
    if kind is type and args:
        return isinstance(value, type) and (not isinstance(args[0], type) or issubclass(value, args[0]))
    if kind is Callable:
        return callable(value) and not isinstance(value, type)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and math.isfinite(value)
    if kind is bool:
        return isinstance(value, (bool, np.bool_)) or (type(value) is int and value in (0, 1))
    try:
        return isinstance(value, kind)
    except TypeError:
        return True


# ---------------------------------------------------------------------- attributes of a model


def check_attributes(cls: type, attributes: Mapping[str, Any]) -> None:
    """Compare the attributes of a saved model with what they can be.

    :param cls: of the model
    :raises UnfitError: naming the one that cannot be
    """
    check_arguments(cls, attributes, TYPES, RANGES)
    check_arguments(attributes["policy_class"], attributes.get("policy_kwargs") or {})
    if callable(schedule := attributes.get("learning_rate")) and not fits(schedule(1.0), float):
        raise UnfitError("learning_rate", "is a schedule that does not give numbers")
    if (attributes.get("ep_info_buffer") is None) is not (attributes.get("ep_success_buffer") is None):
        raise UnfitError("ep_success_buffer", "is not there for the episodes of 'ep_info_buffer', or there alone")
    for name, check in CHECKS.items():
        if attributes.get(name) is not None:
            try:
                check(attributes[name], attributes)
            except Exception as error:
                raise UnfitError(name, "does not belong in this model") from error
    if issubclass(cls, OffPolicyAlgorithm):
        for name in ("_last_obs", "_last_original_obs"):
            _check_observation(name, attributes)


def _check_frequency(value: Any, _: Mapping[str, Any]) -> None:
    number, unit = value if isinstance(value, tuple) else (value, "step")
    low, high = RANGES["batch_size"]
    assert fits(number, int)
    assert low <= number <= high
    assert isinstance(unit, TrainFrequencyUnit if isinstance(value, TrainFreq) else str)


def _check_episodes(value: Any, _: Mapping[str, Any]) -> None:
    assert all(fits(info, dict[str, Any]) and fits(info["r"], float) and fits(info["l"], float) for info in value)


def _check_successes(value: Any, _: Mapping[str, Any]) -> None:
    assert all(fits(success, float | np.bool_) for success in value)


def _check_noise(noise: Any, attributes: Mapping[str, Any]) -> None:
    base, shape = getattr(noise, "base_noise", noise), attributes["action_space"].shape
    for name in ("_mu", "_sigma"):
        if hasattr(base, name):
            assert np.broadcast_shapes(np.shape(getattr(base, name)), shape) == shape


def _check_observation(name: str, attributes: Mapping[str, Any]) -> None:
    stored: Any = attributes.get(name)
    if stored is None:
        return
    space = attributes["observation_space"]
    expected = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    found = stored if isinstance(stored, dict) else {"": stored}
    for key, part in expected.items():
        # Buffers turn the integers of one space, (n_envs,), to (n_envs, 1) in place.
        if key not in found or found[key].size != attributes.get("n_envs", 1) * math.prod(part.shape or ()):
            raise UnfitError(name, "is no observation of the model's space and number of envs")


def _check_random_state(state: Any, _: Mapping[str, Any]) -> None:
    # Tried on generators of their own, where these look at what they are given
    th.Generator().set_state(th.as_tensor(state["torch"]))
    name, words, position, *_ = state["numpy"]
    assert name == "MT19937"
    assert 0 <= position <= 624  # it would read beyond its words
    np.random.RandomState().set_state(state["numpy"])
    version, words, gauss = state["python"]
    random.Random().setstate((version, tuple(words.tolist()), gauss))
    np.random.PCG64().state = state["action_space"]
    assert fits(state["seed"], int | None)


def _check_generator(state: Any, _: Mapping[str, Any]) -> None:
    if state[0] == "cpu":
        th.Generator().set_state(th.as_tensor(state[1]))
    assert state[1].dtype == np.uint8


#: Of attributes whose type says too little; they raise if a value cannot be.
CHECKS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "train_freq": _check_frequency,
    "ep_info_buffer": _check_episodes,
    "ep_success_buffer": _check_successes,
    "action_noise": _check_noise,
    "_random_state": _check_random_state,
    "_generator_state": _check_generator,
}
