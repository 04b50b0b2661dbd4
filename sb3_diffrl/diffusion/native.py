"""DDIM chains of a ``DiT1d`` in compiled C on a CPU: a block of trajectories goes through all its steps in the cache."""

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch as th
from torch import nn

from sb3_diffrl.diffusion.transformer import Block, Transformer1d
from sb3_diffrl.native.library import load, longs, pointer_array, pointers, work_memory

# Widths must be whole vectors of the C code, on any processor.
LANES = 16


class _Transformer(ctypes.Structure):
    # struct transformer of transformer.c
    _fields_ = (
        *longs("in_dim", "length", "d_model", "head_dim", "depth", "n_steps", "batch"),
        ("clip", ctypes.c_float),
        *pointers("packed", "positions", "vectors", "coefficients", "is_fixed", "plans"),
    )


class _Packed(NamedTuple):
    versions: list[tuple[int, int]]
    floats: th.Tensor


_packed: WeakKeyDictionary[Transformer1d, _Packed] = WeakKeyDictionary()


def supports(network: Transformer1d) -> bool:
    """Whether the compiled code can run this network: float32 on a CPU, of a width that fills vector registers."""
    weight = network.output.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == th.float32
        and network.output.out_features == network.embedding.in_features
        and weight.shape[1] % LANES == 0
        and load() is not None
    )


def _linears(network: Transformer1d) -> list[nn.Linear]:
    layers = [network.embedding]
    for block in network.blocks:
        assert isinstance(block, Block)
        expand, _, contract = block.mlp
        assert isinstance(expand, nn.Linear)
        assert isinstance(contract, nn.Linear)
        layers += [block.query, block.key_value, block.attention_out, expand, contract]
    return [*layers, network.output]


def _pack(network: Transformer1d, struct: _Transformer) -> th.Tensor:
    library = load()
    assert library is not None, "no compiled library: see `load()`"
    layers = _linears(network)
    # Every change of a tensor in place counts its version up.
    versions = [(tensor.data_ptr(), tensor._version) for layer in layers for tensor in (layer.weight, layer.bias)]
    known = _packed.get(network)
    if known is not None and known.versions == versions:
        return known.floats
    weights, biases = ([tensor.detach().contiguous() for tensor in tensors] for tensors in zip(*map(_of, layers), strict=True))
    floats = th.empty(library.transformer_packed_floats(ctypes.byref(struct)))
    library.transformer_pack(ctypes.byref(struct), pointer_array(weights), pointer_array(biases), floats.data_ptr())
    _packed[network] = _Packed(versions, floats)
    return floats


def _of(layer: nn.Linear) -> tuple[th.Tensor, th.Tensor]:
    return layer.weight, layer.bias


def ddim(
    network: Transformer1d,
    vectors: th.Tensor,
    coefficients: Sequence[tuple[float, float, float, float]],
    start: th.Tensor,
    fixed_mask: th.Tensor | None,
    clip_sample: float | None,
) -> th.Tensor:
    """Denoise by DDIM; what a trajectory becomes depends on its own start alone.

    :param network: a transformer for which ``supports()`` holds
    :param vectors: what sets the network at each step, ``(n_steps, n_vectors, d_model)``, see ``Transformer1d.modulated()``
    :param coefficients: of each step: ``x0 = c0 x + c1 output``, ``next x = c2 x + c3 x0``
    :param start: ``(batch, length, in_dim)``, clean where ``fixed_mask`` is true
    :param fixed_mask: boolean, ``(length, in_dim)``, true where ``start`` is held
    :param clip_sample: x0 is held in [-clip_sample, clip_sample]
    :return: float32, of the shape of ``start``
    """
    library = load()
    assert library is not None, "no compiled library: see `load()`"
    plans = start.detach().float().clone(memory_format=th.contiguous_format)
    batch, length, in_dim = plans.shape
    is_fixed = th.zeros(length, in_dim) if fixed_mask is None else fixed_mask.float().expand(length, in_dim).contiguous()
    # The struct points into all of these
    kept = (vectors.detach().float().contiguous(), th.tensor(coefficients), network.positions.contiguous(), is_fixed, plans)
    vectors_, coefficients_, positions, *_ = kept
    d_model, depth = network.output.in_features, len(network.blocks)
    struct = _Transformer(in_dim, length, d_model, network.head_dim, depth, len(vectors_), batch, clip_sample or math.inf)
    packed = _pack(network, struct)
    struct.packed, struct.positions, struct.vectors = packed.data_ptr(), positions.data_ptr(), vectors_.data_ptr()
    struct.coefficients, struct.is_fixed, struct.plans = coefficients_.data_ptr(), is_fixed.data_ptr(), plans.data_ptr()
    n_threads = max(1, min(th.get_num_threads(), batch))
    memory = work_memory(library.transformer_memory_floats(ctypes.byref(struct), n_threads))
    library.transformer_run(ctypes.byref(struct), memory.data_ptr(), n_threads)
    return plans
