"""What the algorithms share: checks of arguments and spaces, the way back from the scaled box, a cosine schedule."""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
from gymnasium import spaces


class NonFiniteError(ValueError):
    """A NaN or infinite number where learning would spread it: from the environment, or in a loss."""


def check_count(name: str, value: Any) -> int:
    """The value as an integer of at least one.

    :raises ValueError: naming the argument
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    return int(value)


def check_positive(name: str, value: Any) -> float:
    """The value as a positive finite number.

    :raises ValueError: naming the argument
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"`{name}` must be a positive, finite number, got {value!r}.")
    return float(value)


def check_scalable(action_space: spaces.Space[Any]) -> None:
    """Check that every action coordinate has room between its bounds, so that it can be scaled to [-1, 1].

    :raises ValueError: naming the coordinates
    """
    if not isinstance(action_space, spaces.Box):
        raise ValueError(f"The action space {action_space} is not a Box: only continuous actions can be sampled.")
    if not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(f"The action space {action_space} holds integers: only floating-point actions can be sampled.")
    if not action_space.is_bounded():
        raise ValueError(f"The action space {action_space} is not bounded: wrap the env in a `gymnasium.wrappers.RescaleAction`.")
    with np.errstate(over="ignore"):
        if not np.isfinite(action_space.high - action_space.low).all():
            raise ValueError(f"The action space {action_space} is too wide for its type: high - low overflows.")
    if not (action_space.low < action_space.high).all():
        where = [tuple(int(i) for i in index) for index in zip(*(~(action_space.low < action_space.high)).nonzero(), strict=True)]
        raise ValueError(
            f"The action space {action_space} has coordinates whose low is not below their high, at {where}: a sampler "
            "needs room to move. Remove those coordinates with an action wrapper."
        )


def unscale_action(action_space: spaces.Box, scaled_action: np.ndarray) -> np.ndarray:
    """Rescale actions from [-1, 1] to [low, high], never outside by a rounding error, in the space's own type."""
    low, high = action_space.low, action_space.high
    action = low + 0.5 * (scaled_action + 1.0) * (high - low)
    result: np.ndarray = np.clip(action, low, high).astype(action_space.dtype)
    return result


class CosineSchedule:
    """Learning rate that falls from ``initial_value`` to 0 along half a cosine wave.

    :param initial_value: value at the start of training
    """

    def __init__(self, initial_value: float) -> None:
        self.initial_value = check_positive("initial_value", initial_value)

    def __call__(self, progress_remaining: float) -> float:
        """Value at a remaining progress, from 1 (start) to 0 (end)."""
        return self.initial_value * 0.5 * (1 - math.cos(math.pi * progress_remaining))

    def __repr__(self) -> str:
        return f"CosineSchedule({self.initial_value})"
