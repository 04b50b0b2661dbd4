"""DDIM chains in compiled C on a CPU: a block of samples goes through all its steps in the cache."""

import ctypes
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch as th
from torch import nn

from sb3_diffrl.diffusion.denoisers import MlpDenoiser
from sb3_diffrl.diffusion.transformer import Block, Transformer1d
from sb3_diffrl.native.library import floats, ints, load, long_array, longs, pointer_array, pointers, work_memory

# Widths of a transformer must be whole vectors of the C code, on any processor.
LANES = 16
ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 0, nn.Tanh: 1, nn.SiLU: 2, nn.Mish: 3}
# Rows below which a second thread costs more than it brings
MIN_ROWS_PER_THREAD = 8
#: Of each step of a chain: ``x0 = c0 x + c1 output``, ``next x = c2 x + c3 x0``.
Coefficients = Sequence[tuple[float, float, float, float]]


class _Transformer(ctypes.Structure):
    # struct transformer of transformer.c
    _fields_ = (
        *longs("in_dim", "length", "d_model", "head_dim", "depth", "n_steps", "batch", "n_given"),
        ("clip", ctypes.c_float),
        *pointers("packed", "positions", "vectors", "coefficients", "is_fixed", "plans"),
    )


class _Perceptron(ctypes.Structure):
    # struct perceptron of perceptron.c
    _fields_ = (
        *longs("x_dim", "n_hidden", "n_steps", "batch"),
        *ints("activation"),
        ("clip", ctypes.c_float),
        *pointers("widths", "packed", "base", "time_terms", "coefficients", "x"),
    )


class _Remembered(NamedTuple):
    versions: list[tuple[int, int]]
    value: th.Tensor


_remembered: WeakKeyDictionary[nn.Module, dict[Hashable, _Remembered]] = WeakKeyDictionary()


def remember(network: nn.Module, key: Hashable, sources: Iterable[th.Tensor], make: Callable[[], th.Tensor]) -> th.Tensor:
    """What ``make()`` gives, made anew when a tensor that it comes from has changed.

    :param network: whose it is
    :param key: what it is
    :param sources: weights of the network
    """
    # Every change of a tensor in place counts its version up.
    versions = [(tensor.data_ptr(), tensor._version) for tensor in sources]
    of_network = _remembered.setdefault(network, {})
    known = of_network.get(key)
    if known is None or known.versions != versions:
        known = of_network[key] = _Remembered(versions, make())
    return known.value


def _float32_on_cpu(weight: th.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == th.float32 and load() is not None


def _as_floats(coefficients: Coefficients) -> th.Tensor:
    return th.tensor(coefficients, dtype=th.float32, device="cpu")


def supports(network: nn.Module) -> bool:
    """Whether the compiled code can run this network: float32 on a CPU, a transformer of a width that fills vector registers, or a
    perceptron with hidden layers and activations of ``ACTIVATIONS``. A subclass may compute something else.
    """
    if type(network) is Transformer1d:
        weight = network.output.weight
        is_square = network.output.out_features == network.embedding.in_features
        return is_square and weight.shape[1] % LANES == 0 and _float32_on_cpu(weight)
    if type(network) is MlpDenoiser and len(network.net) > 0:
        return type(list(network.net)[1]) in ACTIVATIONS and _float32_on_cpu(network.output.weight)
    return False


def _linears(network: Transformer1d) -> list[nn.Linear]:
    layers = [network.embedding]
    for block in network.blocks:
        assert isinstance(block, Block)
        expand, _, contract = block.mlp
        assert isinstance(expand, nn.Linear)
        assert isinstance(contract, nn.Linear)
        layers += [block.query, block.key_value, block.attention_out, expand, contract]
    return [*layers, network.output]


def _pack(
    network: nn.Module,
    struct: ctypes.Structure,
    kind: str,
    layers: Sequence[nn.Linear],
    part_of: Callable[[int, th.Tensor], th.Tensor] = lambda _, weight: weight,
) -> th.Tensor:
    """Weights as the C code wants them, made anew when they have changed.

    :param kind: of network, as the C functions' names begin
    :param part_of: the part of a layer's weight that the C code takes
    """

    def pack() -> th.Tensor:
        library = load()
        assert library is not None, "no compiled library: see `load()`"
        weights = [part_of(i, layer.weight.detach()).contiguous() for i, layer in enumerate(layers)]
        biases = [layer.bias.detach().contiguous() for layer in layers]
        packed = floats(getattr(library, f"{kind}_packed_floats")(ctypes.byref(struct)))
        getattr(library, f"{kind}_pack")(ctypes.byref(struct), pointer_array(weights), pointer_array(biases), packed.data_ptr())
        return packed

    return remember(network, "packed", [tensor for layer in layers for tensor in (layer.weight, layer.bias)], pack)


def ddim_perceptron(
    network: MlpDenoiser,
    time_terms: th.Tensor,
    cond: th.Tensor | None,
    coefficients: Coefficients,
    start: th.Tensor,
    clip: float | None,
) -> th.Tensor:
    """Denoise vectors by DDIM; what a vector becomes depends on its own start and condition alone.

    :param network: a perceptron for which ``supports()`` holds
    :param time_terms: of the steps, ``(n_steps, width)``, see ``MlpDenoiser.time_terms()``
    :param cond: condition, ``(batch, cond_dim)``, ``None`` if ``cond_dim`` is 0
    :param coefficients: of each step
    :param start: ``(batch, x_dim)``
    :param clip: x0 is held in [-clip, clip]
    :return: float32, of the shape of ``start``
    """
    library = load()
    assert library is not None, "no compiled library: see `load()`"
    x = start.detach().float().clone(memory_format=th.contiguous_format)
    batch, x_dim = x.shape
    hidden = list(network.net)
    first, *others = (*(layer for layer in hidden if isinstance(layer, nn.Linear)), network.output)
    with th.no_grad():
        base = network.condition_terms(cond)
    # The struct points into all of these
    kept = (base.expand(batch, -1).contiguous(), time_terms.detach().contiguous(), _as_floats(coefficients))
    widths = long_array([layer.in_features for layer in others])
    activation = ACTIVATIONS[type(hidden[1])]
    struct = _Perceptron(x_dim, len(others), len(coefficients), batch, activation, clip or math.inf, ctypes.addressof(widths))
    packed = _pack(network, struct, "perceptron", (first, *others), lambda i, weight: weight if i else weight[:, :x_dim])
    struct.packed, struct.x = packed.data_ptr(), x.data_ptr()
    struct.base, struct.time_terms, struct.coefficients = (tensor.data_ptr() for tensor in kept)
    n_threads = max(1, min(th.get_num_threads(), batch // MIN_ROWS_PER_THREAD))
    memory = work_memory(library.perceptron_memory_floats(ctypes.byref(struct), n_threads))
    library.perceptron_run(ctypes.byref(struct), memory.data_ptr(), n_threads)
    return x


def ddim_transformer(
    network: Transformer1d,
    vectors: th.Tensor,
    coefficients: Coefficients,
    start: th.Tensor,
    fixed_mask: th.Tensor | None,
    clip: float | None,
    n_given: int = 0,
) -> th.Tensor:
    """Denoise trajectories by DDIM; what a trajectory becomes depends on its own start alone.

    :param network: a transformer for which ``supports()`` holds
    :param vectors: what sets the network at each step, ``(n_steps, n_vectors, d_model)``, see ``Transformer1d.modulated()``
    :param coefficients: of each step
    :param start: ``(batch, length, in_dim)``, clean where ``fixed_mask`` is true
    :param fixed_mask: boolean, ``(length, in_dim)``, true where ``start`` is held
    :param clip: x0 is held in [-clip, clip]
    :param n_given: leading steps for which the network's output is zero
    :return: float32, of the shape of ``start``
    """
    library = load()
    assert library is not None, "no compiled library: see `load()`"
    plans = start.detach().float().clone(memory_format=th.contiguous_format)
    batch, length, in_dim = plans.shape
    is_fixed = floats(length, in_dim).zero_()
    if fixed_mask is not None:
        is_fixed.copy_(fixed_mask)
    # The struct points into all of these
    kept = (vectors.detach().float().contiguous(), _as_floats(coefficients), network.positions.contiguous(), is_fixed, plans)
    vectors_, coefficients_, positions, *_ = kept
    d_model, depth = network.output.in_features, len(network.blocks)
    sizes = (in_dim, length, d_model, network.head_dim, depth, len(vectors_), batch, min(n_given, length))
    struct = _Transformer(*sizes, clip or math.inf)
    packed = _pack(network, struct, "transformer", _linears(network))
    struct.packed, struct.positions, struct.vectors = packed.data_ptr(), positions.data_ptr(), vectors_.data_ptr()
    struct.coefficients, struct.is_fixed, struct.plans = coefficients_.data_ptr(), is_fixed.data_ptr(), plans.data_ptr()
    n_threads = max(1, min(th.get_num_threads(), batch))
    memory = work_memory(library.transformer_memory_floats(ctypes.byref(struct), n_threads))
    library.transformer_run(ctypes.byref(struct), memory.data_ptr(), n_threads)
    return plans
