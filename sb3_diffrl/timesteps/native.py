"""The draws of the adaptive sampler in compiled C, on a CPU."""

import ctypes
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_diffrl.native.library import floats, load, long_array, longs, pointer_array, pointers, work_memory

LARGEST_SEED = 2**63 - 1


class _BetaPolicy(ctypes.Structure):
    # struct beta_policy of beta_policy.c
    _fields_ = (
        *longs("batch", "n_layers", "n_cells"),
        ("seed", ctypes.c_ulong),
        *((name, ctypes.c_float) for name in ("low", "span", "uniform_floor", "importance")),
        *pointers("widths", "weights", "biases", "x0", "cumulative", "concentrations", "position", "weight"),
    )


class Drawn(NamedTuple):
    """What the policy draws.

    :param concentrations: of the Beta, ``(batch, 2)``
    :param position: in cells of the sweep, ``(batch,)``
    :param weight: of the loss, ``(batch,)``
    """

    concentrations: th.Tensor
    position: th.Tensor
    weight: th.Tensor


def supports(layers: list[nn.Linear], x0: th.Tensor) -> bool:
    """Whether the compiled code can draw: for float32 on a CPU, and data of the network's width."""
    tensors = [x0, *(tensor for layer in layers for tensor in (layer.weight, layer.bias))]
    fits = x0[0].numel() == layers[0].in_features if len(x0) else False
    return fits and all(x.device.type == "cpu" and x.dtype == th.float32 for x in tensors) and load() is not None


def draw(
    layers: list[nn.Linear],
    log_range: tuple[float, float],
    x0: th.Tensor,
    cumulative: th.Tensor,
    uniform_floor: float,
    importance: float,
    generator: th.Generator | None,
) -> Drawn:
    """Draw times from the Beta policy.

    :param layers: of the policy's network, with ReLU between them
    :param log_range: logarithms of the bounds of the concentrations
    :param x0: data, ``(batch, ...)``
    :param cumulative: mass of the base density up to the times of the sweep, ``(n_sweep + 1,)``
    :param uniform_floor: share of uniform draws
    :param importance: power of the loss's weight
    :param generator: of torch, gives the seed of the draws
    """
    library = load()
    assert library is not None, "no compiled library: see `load()`"
    x0, cumulative = x0.flatten(1).contiguous(), cumulative.float().contiguous()
    seed = int(th.randint(LARGEST_SEED, (), generator=generator))
    drawn = Drawn(*(floats(*shape) for shape in ((len(x0), 2), (len(x0),), (len(x0),))))
    low, high = log_range
    struct = _BetaPolicy(len(x0), len(layers), len(cumulative) - 1, seed, low, high - low, uniform_floor, importance)
    # The struct points into all of these
    widths = long_array([layers[0].in_features, *(layer.out_features for layer in layers)])
    weights, biases = pointer_array([layer.weight for layer in layers]), pointer_array([layer.bias for layer in layers])
    struct.widths, struct.weights, struct.biases = map(ctypes.addressof, (widths, weights, biases))
    struct.x0, struct.cumulative = x0.data_ptr(), cumulative.data_ptr()
    struct.concentrations, struct.position, struct.weight = (result.data_ptr() for result in drawn)
    memory = work_memory(library.beta_policy_memory_floats(ctypes.byref(struct)))
    library.beta_policy_run(ctypes.byref(struct), memory.data_ptr())
    return drawn
