"""Weights and optimiser states from a file, compared with what they are put into before they are."""

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn

from sb3_diffrl.saving.allowed import name_of_class

# States of optimisers that are counts, sums of squares or scales: a negative one makes weights NaN.
NEVER_NEGATIVE = {
    *("step", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "row_var", "col_var", "variance"),
}


def checked(target: nn.Module | th.optim.Optimizer, state: Any, name: str) -> Any:
    """The state to load into a network or an optimiser.

    Of an optimiser, its settings are those of the one there is: the file gives its moments and counts alone.

    :param state: as ``state_dict()`` gives it
    :param name: what it is, for messages
    :raises RuntimeError: if it does not fit, is not finite, or takes more room than it has in the file
    """
    if isinstance(target, th.optim.Optimizer):
        return _of_optimizer(target, state, name)
    if not isinstance(state, Mapping):
        raise RuntimeError(f"{name} is no dictionary of tensors")
    for key, ours in target.state_dict().items():
        # What is missing or too much is the network's own business.
        if isinstance(ours, th.Tensor) and key in state:
            _check(state[key], ours, f"{key} of {name}")
    return _with_extra_states(target, state, name)


def _with_extra_states(target: nn.Module, state: Any, name: str) -> Any:
    # Modules that are trained by an optimiser of their own, such as timestep samplers, keep it there, beside counters.
    state = copy.copy(state)
    for path, module in target.named_modules():
        key, optimizer = f"{path}._extra_state".removeprefix("."), getattr(module, "optimizer", None)
        if isinstance(optimizer, th.optim.Optimizer) and state.get(key):
            theirs, ours = state[key], module.get_extra_state()
            if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
                raise RuntimeError(f"{key} of {name} is of another module")
            for part in ours.keys() - {"optimizer"}:
                _check(theirs[part], ours[part], f"{part} of {key}", never_negative=True)
            state[key] = {**theirs, "optimizer": _of_optimizer(optimizer, theirs["optimizer"], f"the optimiser in {key}")}
    return state


def _of_optimizer(optimizer: th.optim.Optimizer, state: Any, name: str) -> Any:
    # load_state_dict() takes states of any shape, and compiled optimisers write by the shape of the weights.
    if name_of_class(type(optimizer)) is None:  # the user's own, which a file that is not trusted cannot name
        return state
    here = optimizer.state_dict()["param_groups"]
    try:
        groups = [list(group["params"]) for group in state["param_groups"]]
        states = dict(state["state"])
    except (TypeError, KeyError) as error:
        raise RuntimeError(f"{name} is no state of an optimiser") from error
    if groups != [group["params"] for group in here]:
        raise RuntimeError(f"{name} is of other weights")
    expected = _after_a_step(optimizer) if states else {}
    if not states.keys() <= expected.keys():
        raise RuntimeError(f"{name} is of other weights")
    taken = {}
    for index, theirs in states.items():
        ours = expected[index]
        if not isinstance(theirs, Mapping) or theirs.keys() != ours.keys():
            raise RuntimeError(f"{name} is of another optimiser than {type(optimizer).__name__}")
        for key in ours:
            _check(theirs[key], ours[key], f"{key} of {name}", key in NEVER_NEGATIVE)
        # Copies: in the file, tensors may be parts of each other.
        taken[index] = {key: _copy(value, ours[key]) for key, value in theirs.items()}
    return {"state": taken, "param_groups": here}


def _copy(value: Any, like: Any) -> Any:
    return th.empty_like(like).copy_(value) if isinstance(value, th.Tensor) else value


def _after_a_step(optimizer: th.optim.Optimizer) -> dict[int, dict[str, Any]]:
    # The state that the optimiser itself makes of weights of these shapes
    twin = copy.deepcopy(optimizer)
    twin.state = defaultdict(dict)
    parameters = list(itertools.chain.from_iterable(group["params"] for group in twin.param_groups))
    for parameter in parameters:
        parameter.grad = th.zeros_like(parameter)
    twin.step()
    states: dict[int, dict[str, Any]] = twin.state_dict()["state"]
    return states


def _check(value: Any, like: Any, name: str, never_negative: bool = False) -> None:
    if isinstance(like, th.Tensor):
        if type(value) not in (th.Tensor, nn.Parameter) or value.layout != th.strided or value.is_quantized or value.is_meta:
            raise RuntimeError(f"{name} is no dense tensor")
        if value.shape != like.shape or value.is_floating_point() != like.is_floating_point() or value.is_complex():
            raise RuntimeError(
                f"{name} is of shape {tuple(value.shape)} and {value.dtype}, it should be {tuple(like.shape)} and {like.dtype}"
            )
        bad = value.is_floating_point() and not bool(value.isfinite().all()) and bool(like.isfinite().all())
        if bad or (never_negative and bool((value < 0).any())):
            raise RuntimeError(f"{name} is not finite, or negative where it cannot be")
    elif type(value) is not type(like) or (isinstance(value, float) and not math.isfinite(value)):
        raise RuntimeError(f"{name} is {type(value).__name__}, it should be {type(like).__name__}")
    elif never_negative and value is not None and value < 0:
        raise RuntimeError(f"{name} is negative")
