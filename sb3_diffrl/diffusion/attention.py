"""Attention over the steps of trajectories; short ones train on a CPU in compiled C."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_diffrl.diffusion.layers import is_for_torch, is_seen
from sb3_diffrl.native.library import floats, is_plain, load, longs, pointers, work_memory

# On a CPU, torch's fused kernel takes blocks of 32 steps: up to this length plain products are faster, and compiled ones more so
SHORT = 64
# Numbers from which another thread brings more than it costs
MIN_PER_THREAD = 2**14


class _Attention(ctypes.Structure):
    # struct attention of attention.c
    _fields_ = (
        *longs("batch", "n_queries", "length", "d_model", "head_dim"),
        *pointers("query", "key_value", "weights", "result", "gradient", "query_gradient", "key_value_gradient"),
    )


def attention(query: th.Tensor, key_value: th.Tensor, head_dim: int) -> th.Tensor:
    """Scaled dot-product attention, of heads side by side.

    :param query: ``(batch, n_queries, d_model)``
    :param key_value: keys, then values, ``(batch, length, 2 * d_model)``
    :param head_dim: size of a head, divides ``d_model``
    :return: of the shape of ``query``
    """
    if _is_fast(query, key_value, head_dim):
        result: th.Tensor = _AttentionFunction.apply(query, key_value, head_dim)  # type: ignore[no-untyped-call]
        return result
    return torch_attention(query, key_value, head_dim)


def torch_attention(query: th.Tensor, key_value: th.Tensor, head_dim: int) -> th.Tensor:
    """``attention()`` by torch alone."""
    n_heads = query.shape[2] // head_dim
    # (batch, n, d_model) -> (batch, n_heads, n, head_dim)
    q, k, v = (x.reshape(*x.shape[:2], n_heads, head_dim).transpose(1, 2) for x in (query, *key_value.chunk(2, dim=2)))
    if query.device.type != "cpu" or k.shape[2] > SHORT:
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        attended = (q @ k.transpose(2, 3) * head_dim**-0.5).softmax(-1) @ v
    # (batch, n_heads, n_queries, head_dim) -> (batch, n_queries, d_model)
    return attended.transpose(1, 2).flatten(2)


def _is_fast(query: th.Tensor, key_value: th.Tensor, head_dim: int) -> bool:
    batch, _, d_model = query.shape
    has_shape = key_value.shape == (batch, key_value.shape[1], 2 * d_model) and d_model % head_dim == 0
    is_short = 1 <= key_value.shape[1] <= SHORT
    return has_shape and is_short and not is_seen() and is_plain(query) and is_plain(key_value) and load() is not None


class _AttentionFunction(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: th.Tensor, key_value: th.Tensor, head_dim: int) -> th.Tensor:
        library, result = load(), th.empty_like(query)
        assert library is not None
        struct = _Attention(*query.shape[:2], key_value.shape[1], query.shape[2], head_dim)
        weights = floats(library.attention_weights_floats(ctypes.byref(struct)))
        struct.query, struct.key_value, struct.weights, struct.result = (x.data_ptr() for x in (query, key_value, weights, result))
        _run(library.attention_forward, struct)
        ctx.save_for_backward(query, key_value, weights)
        ctx.head_dim, ctx.shapes = head_dim, [query.shape, key_value.shape, weights.shape]
        return result

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:
        library, saved = load(), ctx.saved_tensors
        assert library is not None
        gradient = gradient.contiguous()
        # Hooks of the user's may have given what was saved back in another form
        is_as_saved = all(map(is_plain, saved)) and ctx.shapes == [x.shape for x in saved]
        query, key_value, weights = saved
        if is_for_torch(gradient) or not is_as_saved:
            return (*_torch_backward(query, key_value, ctx.head_dim, gradient, ctx.needs_input_grad), None)
        gradients = th.empty_like(query), th.empty_like(key_value)
        struct = _Attention(*query.shape[:2], key_value.shape[1], query.shape[2], ctx.head_dim)
        struct.query, struct.key_value, struct.weights = query.data_ptr(), key_value.data_ptr(), weights.data_ptr()
        struct.gradient, struct.query_gradient, struct.key_value_gradient = (x.data_ptr() for x in (gradient, *gradients))
        _run(library.attention_backward, struct)
        return (*gradients, None)


def _torch_backward(
    query: th.Tensor, key_value: th.Tensor, head_dim: int, gradient: th.Tensor, needed: Sequence[bool]
) -> list[th.Tensor | None]:
    create_graph = th.is_grad_enabled()
    inputs = [x for x, is_needed in zip((query, key_value), needed, strict=False) if is_needed]
    with th.enable_grad():
        gradients = iter(th.autograd.grad(torch_attention(query, key_value, head_dim), inputs, gradient, create_graph=create_graph))
    return [next(gradients) if is_needed else None for is_needed in needed[:2]]


def _run(function: Any, struct: _Attention) -> None:
    n_threads = max(1, min(th.get_num_threads(), struct.batch, struct.batch * struct.n_queries * struct.d_model // MIN_PER_THREAD))
    library = load()
    assert library is not None
    memory = work_memory(library.attention_memory_floats(ctypes.byref(struct), n_threads))
    function(ctypes.byref(struct), memory.data_ptr(), n_threads)
