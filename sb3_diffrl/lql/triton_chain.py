"""Whole Langevin chains on a GPU in one Triton kernel, for stacked perceptrons.

A program runs sixteen chains from start to end: nothing waits for the launch of another kernel, and activations, slopes and drift
stay on the multiprocessor. Only imported where Triton, which PyTorch brings for CUDA, can be.
"""

import logging
from collections.abc import Sequence
from functools import cache

import torch as th
import triton
import triton.language as tl
from torch import nn

from sb3_diffrl.lql.langevin import GRADIENT_EPS, ChainDraws, LangevinSampler
from sb3_diffrl.lql.native import ACTIVATIONS, chain_scales, check_chain

_logger = logging.getLogger(__name__)

# Chains of a program: the smallest block that tensor cores multiply
BLOCK_ROWS = 16
# Beyond, one multiprocessor is too few for a product (not measured).
MAX_WIDTH, MAX_ACTION_DIM = 256, 64
# Rows of a weight matrix that are in flight at once, by the size of a number in bytes
BLOCK_INNER = {4: 32, 2: 64}
WARPS, STAGES = 8, 3


@triton.jit
def _activation(z, ACTIVATION: tl.constexpr):
    # Value and derivative, as in `activations.py`
    if ACTIVATION == 0:
        value = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(z > 0.0, 1.0, tl.where(z != z, z, 0.0))  # NaN stays
    elif ACTIVATION == 1:
        u = tl.exp(-2.0 * tl.abs(z))
        tanh = (1.0 - u) / (1.0 + u)
        value = tl.where(z < 0.0, -tanh, tanh)
        slope = 1.0 - tanh * tanh
    elif ACTIVATION == 2:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        value = z * sigmoid
        slope = value + sigmoid * (1.0 - value)
    else:
        u = tl.exp(tl.minimum(z, 20.0))
        m = 1.0 + u
        r = 2.0 / (1.0 + m * m)
        value = z * (1.0 - r)
        slope = (1.0 - r) + z * (u * m * r * r)
    return value, slope


@triton.jit
def _product(
    acc, inputs, matrix, WIDTH: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr
):
    # acc (rows, out) + inputs (rows, width) x matrix (width, out), both read from memory
    rows, inner, columns = tl.arange(0, ROWS), tl.arange(0, INNER), tl.arange(0, OUT)
    for start in range(0, WIDTH, INNER):
        x = tl.load(inputs + rows[:, None] * WIDTH + (start + inner)[None, :])
        w = tl.load(matrix + (start + inner)[:, None] * OUT + columns[None, :])
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _critic_gradient(
    a,  # (rows, ACTION_BLOCK)
    z,  # (rows, width), first layer without its action part
    gradient,  # (rows, ACTION_BLOCK), of the critics before
    action_weight,  # of this critic, as the next five
    action_transposed,
    hidden,
    hidden_transposed,
    biases,
    output_weight,
    stride,  # from a hidden layer to the next, in rows of width
    values,
    slopes,
    N_HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACTION_BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    FIRST_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # What is stored is read by other warps, which may still read what was there: barriers before and after
    column, dim = tl.arange(0, WIDTH), tl.arange(0, ACTION_BLOCK)
    block = tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]
    dtype = values.dtype.element_ty
    z = tl.dot(a, tl.load(action_weight + dim[:, None] * WIDTH + column[None, :]), z, input_precision="tf32x3")
    value, slope = _activation(z, ACTIVATION)
    for i in range(N_HIDDEN - 1):
        tl.debug_barrier()
        tl.store(values + block, value.to(dtype))
        tl.store(slopes + i * ROWS * WIDTH + block, slope)
        tl.debug_barrier()
        z = tl.zeros([ROWS, WIDTH], tl.float32) + tl.load(biases + i * stride * WIDTH + column)[None, :]
        matrix = hidden + i * stride * WIDTH * WIDTH
        z = _product(z, values, matrix, WIDTH, WIDTH, ROWS, INNER, PRECISION)
        value, slope = _activation(z, ACTIVATION)
    # The output layer is linear: its gradient is its weight
    back = tl.load(output_weight + column)[None, :] * slope
    for j in range(N_HIDDEN - 1):
        i = N_HIDDEN - 2 - j
        tl.debug_barrier()
        tl.store(values + block, back.to(dtype))
        tl.debug_barrier()
        matrix = hidden_transposed + i * stride * WIDTH * WIDTH
        back = _product(tl.zeros([ROWS, WIDTH], tl.float32), values, matrix, WIDTH, WIDTH, ROWS, INNER, PRECISION)
        back *= tl.load(slopes + i * ROWS * WIDTH + block)
    tl.debug_barrier()
    tl.store(slopes + block, back)
    tl.debug_barrier()
    return _product(gradient, slopes, action_transposed, WIDTH, ACTION_BLOCK, ROWS, FIRST_INNER, "tf32x3")


@triton.jit
def _chain_kernel(
    actions,  # (batch, action_dim), start and result
    noise,  # (n_levels, n_steps, batch, action_dim), standard normal
    scales,  # (2, n_levels), factors of the drift and of the noise
    first,  # (n_critics, batch, width), first layer without its action and level parts
    level_terms,  # (n_levels, n_critics, width)
    action_weight,  # (n_critics, ACTION_BLOCK, width)
    action_transposed,  # (n_critics, width, ACTION_BLOCK)
    hidden,  # (n_hidden - 1, n_critics, width, width)
    hidden_transposed,
    biases,  # (n_hidden - 1, n_critics, width)
    output_weight,  # (n_critics, width)
    values,  # (programs, rows, width), between layers
    slopes,  # (programs, n_hidden, rows, width)
    batch,
    n_levels,
    n_steps,
    n_critics,
    action_dim,
    N_HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACTION_BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    FIRST_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    column, dim = tl.arange(0, WIDTH), tl.arange(0, ACTION_BLOCK)
    is_row = row[:, None] < batch
    is_action = is_row & (dim[None, :] < action_dim)
    own = row[:, None] * action_dim + dim[None, :]
    values += program * ROWS * WIDTH
    slopes += program * N_HIDDEN * ROWS * WIDTH
    a = tl.load(actions + own, mask=is_action, other=0.0)
    for level in range(n_levels):
        drift_scale, noise_scale = tl.load(scales + level), tl.load(scales + n_levels + level)
        for step in range(n_steps):
            gradient = tl.zeros([ROWS, ACTION_BLOCK], tl.float32)
            for critic in range(n_critics):
                z = tl.load(first + (critic * batch + row[:, None]) * WIDTH + column[None, :], mask=is_row, other=0.0)
                z += tl.load(level_terms + (level * n_critics + critic) * WIDTH + column)[None, :]
                gradient = _critic_gradient(
                    a,
                    z,
                    gradient,
                    action_weight + critic * ACTION_BLOCK * WIDTH,
                    action_transposed + critic * ACTION_BLOCK * WIDTH,
                    hidden + critic * WIDTH * WIDTH,
                    hidden_transposed + critic * WIDTH * WIDTH,
                    biases + critic * WIDTH,
                    output_weight + critic * WIDTH,
                    n_critics,
                    values,
                    slopes,
                    N_HIDDEN,
                    WIDTH,
                    ROWS,
                    ACTION_BLOCK,
                    INNER,
                    FIRST_INNER,
                    ACTIVATION,
                    PRECISION,
                )
            if NORMALIZE:
                gradient /= tl.sqrt(tl.sum(gradient * gradient, axis=1))[:, None] + EPS
            z_step = tl.load(noise + (level * n_steps + step) * batch * action_dim + own, mask=is_action, other=0.0)
            a = tl.clamp(a + gradient * drift_scale + z_step * noise_scale, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(actions + own, a, mask=is_action)


def _pad(tensor: th.Tensor, *shape: int) -> th.Tensor:
    # With zeros: a unit without weights adds nothing, forwards or backwards.
    missing = [n - size for n, size in zip(shape, tensor.shape[-len(shape) :], strict=True)]
    return nn.functional.pad(tensor, [x for n in reversed(missing) for x in (0, n)]) if any(missing) else tensor


def supports(weights: Sequence[th.Tensor], action_dim: int) -> bool:
    """Whether the kernel's blocks hold these layers."""
    return len(weights) > 1 and max(weight.shape[2] for weight in weights) <= MAX_WIDTH and action_dim <= MAX_ACTION_DIM


@triton.jit
def _try_kernel(x):
    tl.store(x, 1.0)


@cache
def runs_on(device: th.device) -> bool:
    """Whether Triton compiles and runs kernels there (it needs a C compiler): an NVIDIA GPU, of the Ampere generation or later."""
    if th.version.hip is not None or th.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with th.cuda.device(device):
            x = th.zeros(1, device=device)
            _try_kernel[(1,)](x)
            return float(x) == 1.0
    except Exception as error:
        _logger.info("Langevin chains run without Triton's kernel: %s", error)
        return False


def _arrange(
    weights: Sequence[th.Tensor],
    biases: Sequence[th.Tensor],
    level_terms: th.Tensor | None,
    features: th.Tensor,
    action_dim: int,
    dtype: th.dtype,
) -> tuple[th.Tensor, ...]:
    # The kernel's arguments from `first` to `output_weight`
    n_critics, _, first_width = weights[0].shape
    width = max(16, triton.next_power_of_2(max(weight.shape[2] for weight in weights[:-1])))
    action_block = max(16, triton.next_power_of_2(action_dim))
    n_features = features.shape[1]
    from_features, from_action, _ = weights[0].tensor_split([n_features, n_features + action_dim], 1)
    # In double precision, rounded: libraries choose how they multiply by the size of the batch, and chains should not depend on it.
    inputs = features.double().expand(n_critics, -1, -1)
    first = _pad(th.baddbmm(biases[0].double(), inputs, from_features.double()).float(), width)
    if level_terms is None:
        level_terms = first.new_zeros(n_critics, 1, first_width)
    from_action = _pad(from_action, action_block, width)
    hidden = [_pad(weight, width, width) for weight in weights[1:-1]]
    stacked = (th.stack(hidden) if hidden else first).to(dtype)  # of one layer none is read
    bias = th.stack([_pad(bias, width) for bias in biases[1:-1]]) if hidden else first
    output_weight = _pad(weights[-1].squeeze(2), width)
    terms = _pad(level_terms, width).transpose(0, 1)
    arranged = (first, terms, from_action, from_action.transpose(1, 2), stacked, stacked.transpose(-1, -2), bias, output_weight)
    return tuple(tensor.contiguous() for tensor in arranged)


def sample(
    sampler: LangevinSampler,
    activation: type[nn.Module],
    weights: Sequence[th.Tensor],
    biases: Sequence[th.Tensor],
    level_terms: th.Tensor | None,
    features: th.Tensor,
    draws: ChainDraws,
    dtype: th.dtype = th.float32,
) -> th.Tensor:
    """``sampler.sample()`` on the gradient of the critics' sum, see ``native.sample()``.

    :param dtype: of what multiplies in the hidden layers; float32 is three products of 19-bit numbers, as precise as one of 32
    :raises RuntimeError: if widths do not fit, as in torch
    """
    features, noise = features.float(), draws.noise.float().contiguous()
    actions = draws.start.float().clone(memory_format=th.contiguous_format)
    check_chain(sampler, weights, biases, level_terms, features, ChainDraws(actions, noise))
    batch, action_dim = actions.shape
    arranged = _arrange(weights, biases, level_terms, features, action_dim, dtype)
    width, action_block, programs = arranged[0].shape[2], arranged[2].shape[1], triton.cdiv(batch, BLOCK_ROWS)
    with th.cuda.device_of(features):
        _chain_kernel[(programs,)](
            actions,
            noise,
            chain_scales(sampler, features.device),
            *arranged,
            features.new_empty(programs, BLOCK_ROWS, width, dtype=dtype),
            features.new_empty(programs, len(weights) - 1, BLOCK_ROWS, width),
            batch,
            sampler.n_levels,
            sampler.n_steps,
            len(weights[0]),
            action_dim,
            N_HIDDEN=len(weights) - 1,
            WIDTH=width,
            ROWS=BLOCK_ROWS,
            ACTION_BLOCK=action_block,
            INNER=min(width, BLOCK_INNER[dtype.itemsize]),
            FIRST_INNER=min(width, BLOCK_INNER[4]),
            ACTIVATION=ACTIVATIONS[activation],
            NORMALIZE=sampler.normalize_grad,
            EPS=GRADIENT_EPS,
            PRECISION="tf32x3",
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return actions
