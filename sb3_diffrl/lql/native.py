"""Compiled C for stacked perceptrons on a CPU: whole Langevin chains, and values with their gradients."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch as th
from torch import nn

from sb3_diffrl.lql.activations import Mish
from sb3_diffrl.lql.langevin import ChainDraws, LangevinSampler
from sb3_diffrl.native.library import (
    floats,
    ints,
    load,
    long_array,
    longs,
    multiplies_bfloat16,
    pointer_array,
    pointers,
    work_memory,
)

MAX_HIDDEN, MAX_CRITICS = 16, 64
# Rows of a first layer that take the embedding of the noise level, as wide as the critic makes it
LEVEL_ROWS = 16
ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 0, nn.Tanh: 1, nn.SiLU: 2, nn.Mish: 3, Mish: 3}
# Chains below which a second thread costs more than it brings
MIN_CHAINS_PER_THREAD = 8


class _Chain(ctypes.Structure):
    # struct chain of langevin.c
    _fields_ = (
        *longs("n_critics", "features_dim", "action_dim", "first_rows", "n_hidden", "n_levels", "n_steps", "batch"),
        *ints("activation", "normalize", "factors"),
        *pointers("widths", "weights", "biases", "level_terms", "drift_scales", "noise_scales", "features", "noise", "actions"),
    )


class _Mlp(ctypes.Structure):
    # struct mlp of stacked_mlp.c
    _fields_ = (
        *longs("n_models", "batch", "n_layers"),
        *ints("activation", "shared_inputs"),
        *pointers("widths", "weights", "biases", "inputs", "saved", "outputs", "output_gradient", "weight_gradients"),
        *pointers("bias_gradients", "input_gradient"),
    )


@lru_cache(maxsize=16)
def chain_scales(sampler: LangevinSampler, device: th.device | str = "cpu") -> th.Tensor:
    """Factors of the drift and of the noise at each level, ``(2, n_levels)``."""
    step_sizes = th.tensor(sampler.step_sizes, dtype=th.float64, device="cpu")
    return th.stack([0.5 * sampler.inverse_temperature * step_sizes, step_sizes.sqrt()]).float().to(device)


def _check_shape(name: str, tensor: th.Tensor, shape: tuple[int, ...]) -> None:
    # C would read beyond the end.
    if tensor.shape != shape or tensor.dtype != th.float32:
        raise RuntimeError(f"The {name} are {tensor.dtype} of shape {tuple(tensor.shape)}, the networks take float32 of {shape}.")


def _check_layers(weights: Sequence[th.Tensor], biases: Sequence[th.Tensor]) -> None:
    n_models, n_in, _ = weights[0].shape
    for weight, bias in zip(weights, biases, strict=True):
        n_out = weight.shape[-1]
        _check_shape("weights", weight, (n_models, n_in, n_out))
        _check_shape("biases", bias, (n_models, 1, n_out))
        n_in = n_out


def check_chain(
    sampler: LangevinSampler,
    weights: Sequence[th.Tensor],
    biases: Sequence[th.Tensor],
    level_terms: th.Tensor | None,
    features: th.Tensor,
    draws: ChainDraws,
) -> None:
    """Check what kernels read without looking, see ``sample()``.

    :raises RuntimeError: if types or widths do not fit
    """
    _check_layers(weights, biases)
    n_critics, _, width = weights[0].shape
    batch, action_dim = draws.start.shape
    taken = weights[0].shape[1] - (0 if level_terms is None else LEVEL_ROWS)
    _check_shape("start", draws.start, (batch, action_dim))
    _check_shape("features", features, (batch, taken - action_dim))
    _check_shape("noise", draws.noise, (sampler.n_levels, sampler.n_steps, batch, action_dim))
    if level_terms is not None:
        _check_shape("terms of the noise levels", level_terms, (n_critics, sampler.n_levels, width))


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
    """``sampler.sample()`` on the gradient of the critics' sum.

    What a chain does depends on its own features, start and noise alone, to the last bit.

    :param activation: one of ``ACTIVATIONS``
    :param weights: of each layer, float32, ``(n_critics, in, out)``; the rows of the first are features, action, anything else
    :param biases: of each layer, ``(n_critics, 1, out)``
    :param level_terms: what each noise level adds to the first layer, ``(n_critics, n_levels, width)``
    :param features: ``(batch, features_dim)``
    :param draws: start and noise of ``batch`` chains
    :param dtype: of what multiplies in the hidden layers, float32 or, where ``multiplies_bfloat16()``, bfloat16; sums, activations
        and the layer that sees the actions are in float32
    :return: actions in the scaled box [-1, 1], ``(batch, action_dim)``
    :raises RuntimeError: if widths do not fit, as in torch
    """
    library = load()
    assert library is not None, "no compiled library: see `load()`"
    assert dtype == th.float32 or multiplies_bfloat16()
    weights, biases = ([tensor.detach().contiguous() for tensor in tensors] for tensors in (weights, biases))
    scales = chain_scales(sampler)
    features, noise = features.float().contiguous(), draws.noise.float().contiguous()
    actions = draws.start.float().clone(memory_format=th.contiguous_format)
    level_terms = None if level_terms is None else level_terms.float().contiguous()
    check_chain(sampler, weights, biases, level_terms, features, ChainDraws(actions, noise))
    widths = [weight.shape[2] for weight in weights[:-1]]
    n_critics, (batch, action_dim) = len(weights[0]), actions.shape
    arrays = (long_array(widths), pointer_array(weights), pointer_array(biases))
    chain = _Chain(
        n_critics,
        features.shape[1],
        action_dim,
        weights[0].shape[1],
        len(widths),
        sampler.n_levels,
        sampler.n_steps,
        batch,
        ACTIVATIONS[activation],
        sampler.normalize_grad,
        dtype == th.bfloat16,
        *map(ctypes.addressof, arrays),
        None if level_terms is None else level_terms.data_ptr(),
        scales[0].data_ptr(),
        scales[1].data_ptr(),
        features.data_ptr(),
        noise.data_ptr(),
        actions.data_ptr(),
    )
    n_threads = max(1, min(th.get_num_threads(), len(features) // MIN_CHAINS_PER_THREAD))
    memory = work_memory(library.langevin_memory_floats(ctypes.byref(chain), n_threads))
    library.langevin_run(ctypes.byref(chain), memory.data_ptr(), n_threads)
    return actions


class _StackedMlp(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: type[nn.Module], learns: bool, inputs: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        library = load()
        assert library is not None, "no compiled library: see `load()`"
        weights = [weight.detach().contiguous() for weight in parameters[::2]]
        biases = [bias.detach().contiguous() for bias in parameters[1::2]]
        inputs = inputs.detach().contiguous()
        _check_layers(weights, biases)
        n_models, batch = len(weights[0]), inputs.shape[-2]
        _check_shape("inputs", inputs, (*((n_models,) if inputs.ndim == 3 else ()), batch, weights[0].shape[1]))
        outputs = floats(n_models, batch, weights[-1].shape[2])
        widths = [weights[0].shape[1], *(weight.shape[2] for weight in weights)]
        arrays = [long_array(widths), pointer_array(weights), pointer_array(biases)]
        pointers = [*map(ctypes.addressof, arrays), inputs.data_ptr()]
        mlp = _Mlp(n_models, batch, len(weights), ACTIVATIONS[activation], inputs.ndim == 2, *pointers)
        saved = floats(library.mlp_saved_floats(ctypes.byref(mlp)) if learns else 0)
        mlp.saved, mlp.outputs = saved.data_ptr() if learns else None, outputs.data_ptr()
        memory = work_memory(library.mlp_memory_floats(ctypes.byref(mlp)))
        library.mlp_forward(ctypes.byref(mlp), memory.data_ptr(), min(th.get_num_threads(), n_models))
        # The struct points into all of these
        ctx.mlp, ctx.kept = mlp, (weights, biases, inputs, saved, arrays)
        return outputs

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, output_gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:
        library, mlp = load(), ctx.mlp
        assert library is not None
        weights, biases, inputs, *_ = ctx.kept
        output_gradient = output_gradient.float().contiguous()
        gradients = [th.empty_like(tensor) for tensor in (*weights, *biases)]
        weight_gradients, bias_gradients = gradients[: len(weights)], gradients[len(weights) :]
        input_gradient = floats(mlp.n_models, *inputs.shape[-2:]) if ctx.needs_input_grad[2] else None
        arrays = [pointer_array(weight_gradients), pointer_array(bias_gradients)]
        mlp.output_gradient = output_gradient.data_ptr()
        mlp.weight_gradients, mlp.bias_gradients = map(ctypes.addressof, arrays)
        mlp.input_gradient = None if input_gradient is None else input_gradient.data_ptr()
        memory = work_memory(library.mlp_memory_floats(ctypes.byref(mlp)))
        library.mlp_backward(ctypes.byref(mlp), memory.data_ptr(), min(th.get_num_threads(), mlp.n_models))
        if input_gradient is not None and mlp.shared_inputs:
            input_gradient = input_gradient.sum(0)
        parameters = [gradient for pair in zip(weight_gradients, bias_gradients, strict=True) for gradient in pair]
        return (None, None, input_gradient, *parameters)


def stacked_mlp(
    activation: type[nn.Module], inputs: th.Tensor, weights: Sequence[th.Tensor], biases: Sequence[th.Tensor]
) -> th.Tensor:
    """Independent perceptrons on one batch; differentiable once.

    :param activation: one of ``ACTIVATIONS``, after every layer but the last
    :param inputs: float32, ``(batch, in)`` for all models, or ``(n_models, batch, in)``
    :param weights: of each layer, ``(n_models, in, out)``
    :param biases: of each layer, ``(n_models, 1, out)``
    :return: ``(n_models, batch, out)``
    :raises RuntimeError: if widths do not fit, as in torch
    """
    parameters = [parameter for pair in zip(weights, biases, strict=True) for parameter in pair]
    outputs: th.Tensor = _StackedMlp.apply(activation, th.is_grad_enabled(), inputs, *parameters)  # type: ignore[no-untyped-call]
    return outputs
