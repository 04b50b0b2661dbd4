"""What the algorithms share: checks of arguments, spaces and numbers, the way back from the scaled box, a cosine schedule."""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_diffrl.native.vectors import total_norm

#: What to do about a NaN or infinite number: raise a ``NonFiniteError``, or leave out the step that it came in.
OnNonFinite = Literal["raise", "skip"]
# After so many steps left out in a row, it is raised nevertheless.
MAX_SKIPPED = 100


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


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """The value as a finite number in [low, high].

    :raises ValueError: naming the argument
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not low <= float(value) <= high:
        bounds = "" if low == -math.inf else f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
        raise ValueError(f"`{name}` must be a finite number{bounds}, got {value!r}.")
    return float(value)


def check_on_nonfinite(value: str) -> None:
    """Check that ``on_nonfinite`` is ``"raise"`` or ``"skip"``.

    :raises ValueError: otherwise
    """
    if value not in get_args(OnNonFinite):
        raise ValueError(f"`on_nonfinite` must be 'raise' or 'skip', got {value!r}.")


def check_gradient(
    loss: th.Tensor,
    parameters: Iterable[th.Tensor],
    module: th.nn.Module,
    when: str,
    parts: Mapping[str, th.Tensor] = MappingProxyType({}),
) -> th.Tensor:
    """Check a loss and its gradient before the optimiser sees them.

    :param loss: scalar
    :param parameters: which it was differentiated by
    :param module: which has them, and knows their names
    :param when: for the message
    :param parts: scalars that the loss is made of, by name; those that are not finite are named
    :return: norm of the gradient
    :raises NonFiniteError: if the loss is not finite, or the norm of the gradient, naming the first parameter that has one
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients)
    if th.isfinite(loss.detach() + norm):
        return norm
    named = ", ".join(f"{name} {value.item()}" for name, value in parts.items() if not th.isfinite(value))
    what = f"loss is {loss.item()}" + (f" ({named})" if named else "")
    if th.isfinite(loss):
        # All may be finite and the sum of their squares infinite.
        first = next((gradient for gradient in gradients if not th.isfinite(gradient).all()), gradients[0])
        name = next((name for name, parameter in module.named_parameters() if parameter.grad is first), "a parameter")
        what = f"gradient is not finite, or too large for single precision (norm {first.norm().item():.3g} in {name})"
    weights = "the weights are as before that step, and can be saved"
    if not all(th.isfinite(parameter).all() for parameter in module.parameters()):
        weights = "the weights are not finite either: a step before was too long"
    raise NonFiniteError(
        f"The {what} at {when}; {weights}. A lower learning rate or smaller rewards usually help; "
        '`on_nonfinite="skip"` leaves such steps out.'
    )


def check_learning_rate(optimizers: Iterable[th.optim.Optimizer]) -> None:
    """Check the learning rates that a schedule gave.

    :raises ValueError: if one is negative or not finite
    """
    for rate in {float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups}:
        if not 0 <= rate < math.inf:
            raise ValueError(f"`learning_rate` gave {rate}: it must be a finite number of at least 0, at every remaining progress.")


def check_observation(obs: th.Tensor | dict[str, th.Tensor]) -> None:
    """Check observations that actions are asked for.

    :param obs: a batch, ``(batch, ...)``, or a dictionary of such
    :raises NonFiniteError: naming the row
    """
    for key, values in obs.items() if isinstance(obs, dict) else [("", obs)]:
        if values.is_floating_point() and not th.isfinite(values).all():
            index = [int(i) for i in (~th.isfinite(values)).nonzero()[0]]
            named = f" '{key}'" if key else ""
            raise NonFiniteError(f"observation{named} {index[0]} is {values[tuple(index)].item()} at index {index[1:]}")


def check_scalable(action_space: spaces.Space[Any]) -> None:
    """Check that every action coordinate has room between its bounds, so that it can be scaled to [-1, 1].

    :raises ValueError: naming the coordinates
    """
    if not isinstance(action_space, spaces.Box):
        raise ValueError(f"The action space {action_space} is not a Box: only continuous actions can be sampled.")
    if not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(f"The action space {action_space} holds integers: only floating-point actions can be sampled.")
    if action_space.dtype.itemsize > 8:
        raise ValueError(f"The action space {action_space} holds {action_space.dtype}, which torch has not: use float64.")
    if 0 in action_space.shape:
        raise ValueError(f"The action space {action_space} is empty: there is nothing to decide. Use a shape without a 0.")
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
    """Rescale actions from [-1, 1] to [low, high], never outside by a rounding error, in the space's own type.

    :raises NonFiniteError: if an action is not finite, naming its row
    """
    if not np.isfinite(scaled_action).all():
        row = int(np.argwhere(~np.isfinite(scaled_action))[0, 0])
        raise NonFiniteError(
            f"the policy's action {row} is {scaled_action[row]}: its weights or the action noise are not finite, or too large"
        )
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
