"""Spaces and the vectors that networks see: flattening, standardising, comparing."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

# Relative standard deviation below which a coordinate counts as constant, ten units in the last place of single precision
CONSTANT = 1e-6
GOAL_KEYS = ("observation", "achieved_goal", "desired_goal")


class ObservationFlattener:
    """Turns observations of a space into float vectors.

    A goal-conditioned dictionary (its keys are ``observation``, ``achieved_goal`` and ``desired_goal``) becomes these three in
    this order. The second repeats what the first has in some environments and not in others: AntMaze's position is nowhere else.
    Everything else follows ``gymnasium.spaces.flatten``: parts one after the other, in the order of the space, with
    discrete ones one-hot. Images are refused: a vector of pixels is no use to the networks here.

    :param space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of such, nested at will
    :raises ValueError: if the space has another part
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space
        self.is_goal_conditioned = isinstance(space, spaces.Dict) and set(space.spaces) == set(GOAL_KEYS)
        if isinstance(space, spaces.Dict) and self.is_goal_conditioned:
            # A sequence of pairs keeps its order, a dictionary is sorted.
            self._flat_space: spaces.Space[Any] = spaces.Dict([(key, space[key]) for key in GOAL_KEYS])
        else:
            self._flat_space = space
        self.dim = _dim(self._flat_space)
        #: How many of the last entries are the desired goal.
        self.goal_dim = _dim(space["desired_goal"]) if isinstance(space, spaces.Dict) and self.is_goal_conditioned else 0

    def __call__(self, observations: Any, batched: bool) -> np.ndarray:
        """Flatten one observation or a batch.

        :param observations: an observation, or observations stacked along the first axis of each array, as Minari and SB3's
            vectorised environments give them; or what has been flattened already
        :param batched: which of the two
        :return: float32, ``(batch, dim)``; the batch is 1 for one observation
        :raises ValueError: if a discrete value is not in its space
        """
        if self._is_flat(observations):
            return np.asarray(observations, np.float32).reshape(-1, self.dim)
        if not batched:
            observations = _add_axis(self._flat_space, observations)
        out = np.empty((_batch_size(self._flat_space, observations), self.dim), np.float32)
        self.into(out, observations)
        return out

    def into(self, out: np.ndarray, observations: Any) -> None:
        """Flatten a batch into an array that exists.

        :param out: float32, ``(batch, dim)``
        :param observations: stacked along the first axis of each array
        """
        _flatten(self._flat_space, observations, out)

    def is_batched(self, observations: Any) -> bool:
        """Whether these are stacked observations rather than one, by the number of axes of their first array."""
        if self._is_flat(observations):
            return np.ndim(observations) > 1
        space = self._flat_space
        while isinstance(space, (spaces.Dict, spaces.Tuple)):
            key: Any = next(iter(space.spaces)) if isinstance(space, spaces.Dict) else 0
            space, observations = space[key], observations[key]
        return np.ndim(observations) > len(space.shape or ())

    def _is_flat(self, observations: Any) -> bool:
        if not (isinstance(self._flat_space, (spaces.Dict, spaces.Tuple)) and isinstance(observations, np.ndarray)):
            return False
        if observations.shape[-1:] != (self.dim,):
            raise ValueError(f"Unexpected observation shape {observations.shape} for flattened observations of {self.dim} numbers.")
        return True


class FlattenObservation(gym.ObservationWrapper[np.ndarray, Any, Any]):
    """Gives an environment's observations as vectors, see ``ObservationFlattener``.

    SB3's vectorised environments do not take a dictionary within a dictionary (FrankaKitchen's goals).

    :param env: environment
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.flatten = ObservationFlattener(env.observation_space)
        self.observation_space = flattened(env.observation_space)

    def observation(self, observation: Any) -> np.ndarray:
        """``(dim,)``, float32"""
        vector: np.ndarray = self.flatten(observation, batched=False)[0]
        return vector


def flattened(space: spaces.Space[Any]) -> spaces.Box:
    """The space of the vectors that ``FlattenObservation`` gives."""
    return spaces.Box(-np.inf, np.inf, (ObservationFlattener(space).dim,))


def is_nested(space: spaces.Space[Any]) -> bool:
    """Whether SB3's vectorised environments need it flattened: a tuple, or a dictionary that holds a dictionary or a tuple."""
    if isinstance(space, spaces.Tuple):
        return True
    return isinstance(space, spaces.Dict) and any(isinstance(part, (spaces.Dict, spaces.Tuple)) for part in space.values())


def _dim(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Dict):
        return sum(_dim(part) for part in space.values())
    if isinstance(space, spaces.Tuple):
        return sum(_dim(part) for part in space)
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1:
        raise ValueError(
            f"{space} holds images, which the offline agents do not learn from. Put an encoder in front (an observation wrapper), "
            "and record the dataset through it."
        )
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return int(np.prod(space.shape))
    raise ValueError(
        f"{space} cannot be flattened into a vector of fixed length: use Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple."
    )


def _flatten(space: spaces.Space[Any], values: Any, out: np.ndarray) -> None:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        start = 0
        for key, part in space.items() if isinstance(space, spaces.Dict) else enumerate(space):
            width = _dim(part)
            _flatten(part, values[key], out[:, start : start + width])
            start += width
    elif isinstance(space, spaces.Discrete):
        _one_hot(np.asarray(values).reshape(-1) - space.start, int(space.n), out)
    elif isinstance(space, spaces.MultiDiscrete):
        # (batch, *shape) -> (batch, parts)
        indices = (np.asarray(values) - space.start).reshape(len(out), -1)
        start = 0
        for column, n in zip(indices.T, space.nvec.reshape(-1), strict=True):
            _one_hot(column, int(n), out[:, start : start + n])
            start += n
    else:
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"Unexpected observation type {array.dtype} for {space}: it must be numbers.")
        if array.shape[1:] != space.shape:
            raise ValueError(f"Unexpected observation shape {array.shape} for {space}: it must be (n, *{space.shape}).")
        # (batch, *shape) -> (batch, dim)
        out[:] = array.reshape(len(out), -1)


def _one_hot(indices: np.ndarray, n: int, out: np.ndarray) -> None:
    if ((indices < 0) | (indices >= n)).any():
        raise ValueError(f"A discrete observation is outside its space of {n} values (counted from its start: {indices}).")
    out[:] = 0
    out[np.arange(len(out)), indices] = 1


def _add_axis(space: spaces.Space[Any], value: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _add_axis(part, value[key]) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_add_axis(part, value[i]) for i, part in enumerate(space))
    return np.asarray(value)[None]


def _batch_size(space: spaces.Space[Any], values: Any) -> int:
    while isinstance(space, (spaces.Dict, spaces.Tuple)):
        key: Any = next(iter(space.spaces)) if isinstance(space, spaces.Dict) else 0
        space, values = space[key], values[key]
    return len(values)


class Normalizer(nn.Module):
    """Standardises vectors to mean 0 and standard deviation 1 in each coordinate; a constant one is only shifted.

    Its two buffers travel with the model that holds it. Before ``fit()`` it changes nothing.

    :param dim: length of the vectors
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(dim))
        self.register_buffer("std", th.ones(dim))

    def fit(self, vectors: np.ndarray, rows_at_once: int = 65536) -> "Normalizer":
        """Take mean and standard deviation from data, in double precision.

        :param vectors: ``(n, dim)``
        :param rows_at_once: bounds the memory
        :return: itself
        """
        chunks = [vectors[start : start + rows_at_once] for start in range(0, len(vectors), rows_at_once)]
        mean = np.sum([chunk.sum(axis=0, dtype=np.float64) for chunk in chunks], axis=0) / len(vectors)
        variance = np.sum([np.square(chunk - mean).sum(axis=0) for chunk in chunks], axis=0) / len(vectors)
        # Rounding, here or in the data's single precision, leaves a constant coordinate a tiny standard deviation.
        std = np.sqrt(variance)
        is_constant = std <= CONSTANT * np.maximum(1.0, np.abs(mean))
        self.mean.copy_(th.as_tensor(mean))
        self.std.copy_(th.as_tensor(np.where(is_constant, 1.0, std)))
        return self

    def normalize(self, x: th.Tensor) -> th.Tensor:
        """``(..., dim)`` in the data's units -> standardised."""
        return (x - self.mean) / self.std

    def denormalize(self, x: th.Tensor) -> th.Tensor:
        """``(..., dim)`` standardised -> in the data's units."""
        return x * self.std + self.mean


def check_same_spaces(
    name: str,
    expected: Sequence[spaces.Space[Any]],
    other_name: str,
    others: Sequence[spaces.Space[Any]],
) -> None:
    """Check that two sources of data speak of the same observations and actions.

    :param name: what the first is, for the message
    :param expected: its observation space and action space
    :param other_name: what the second is
    :param others: its two spaces
    :raises ValueError: naming both spaces, where they differ by more than the precision of floats
    """
    for kind, space, other in zip(("observation", "action"), expected, others, strict=True):
        if not same_space(space, other):
            raise ValueError(
                f"The {kind} space of {other_name} is not that of {name}:\n  {other}\n  {space}\nUse data and an environment of "
                "the same task, with the same wrappers."
            )


def same_space(space: spaces.Space[Any], other: spaces.Space[Any]) -> bool:
    """Whether two spaces are equal, up to the precision of floats."""
    if isinstance(space, spaces.Dict) and isinstance(other, spaces.Dict):
        return space.keys() == other.keys() and all(same_space(space[key], other[key]) for key in space)
    if isinstance(space, spaces.Tuple) and isinstance(other, spaces.Tuple):
        return len(space) == len(other) and all(same_space(*pair) for pair in zip(space, other, strict=True))
    if isinstance(space, spaces.Box) and isinstance(other, spaces.Box):
        kinds = {np.issubdtype(box.dtype, np.floating) or box.dtype for box in (space, other)}
        same_bounds = space.shape == other.shape and all(
            np.allclose(*pair) for pair in ((space.low, other.low), (space.high, other.high))
        )
        return len(kinds) == 1 and same_bounds
    return bool(space == other)


def stack(space: spaces.Space[Any], samples: Any) -> Any:
    """Stack samples of a space along a new first axis, part by part, in the types of the space.

    :param samples: a list of them, or what this function returns
    :return: an array ``(n, ...)``, or a dictionary or tuple of such
    """
    if isinstance(space, spaces.Dict):
        return {key: stack(part, _parts(samples, key)) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(stack(part, _parts(samples, i)) for i, part in enumerate(space))
    if isinstance(space, spaces.Text):
        return list(samples)
    return np.asarray(samples, space.dtype).reshape(len(samples), *(space.shape or ()))


def _parts(samples: Any, key: Any) -> Any:
    return [sample[key] for sample in samples] if isinstance(samples, list) else samples[key]
