"""Activations with their derivatives, written once for torch and numpy."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch import nn

# The kernels are spelt in the names that torch and numpy share: `xp` is the module and arrays are its own. On small batches the
# time goes into calls rather than arithmetic, and numpy's are three times cheaper.
Array = Any


class Constants(NamedTuple):
    """Numbers as zero-dimensional arrays: a Python number costs a torch call more than the arithmetic does."""

    zero: Array
    one: Array
    two: Array
    twenty: Array
    eighty: Array


# kernel(xp, c, z, value, slope, scratch): writes the activation of `z` into `value` (unless None) and its derivative into `slope`.
# The arrays are of one shape and share no memory. They are reused because allocating costs as much as the arithmetic.
ActivationKernel = Callable[[Any, Constants, Array, Array, Array, Array], None]


def _mish(xp: Any, c: Constants, z: Array, value: Array, slope: Array, scratch: Array) -> None:
    # With u = exp(z), m = 1 + u and r = 2 / (1 + m^2): tanh(softplus(z)) = 1 - r, of derivative u m r^2.
    # One transcendental function instead of three; beyond 20, mish(z) = z to the last bit.
    u = xp.exp(xp.minimum(z, c.twenty, out=scratch), out=scratch)
    m = xp.add(u, c.one, out=slope)
    um = xp.multiply(u, m, out=scratch)
    m_squared = xp.multiply(m, m, out=slope)
    r = xp.divide(c.two, xp.add(m_squared, c.one, out=slope), out=slope)
    derivative = xp.multiply(xp.multiply(um, r, out=scratch), r, out=scratch)
    tanh = xp.subtract(c.one, r, out=slope)
    if value is not None:
        xp.multiply(z, tanh, out=value)
    if xp is th:
        tanh.addcmul_(z, derivative)
    else:
        xp.add(tanh, xp.multiply(z, derivative, out=scratch), out=slope)


def _relu(xp: Any, c: Constants, z: Array, value: Array, slope: Array, scratch: Array) -> None:
    positive = xp.maximum(z, c.zero, out=scratch if value is None else value)
    xp.sign(positive, out=slope)


def _tanh(xp: Any, c: Constants, z: Array, value: Array, slope: Array, scratch: Array) -> None:
    tanh = xp.tanh(z, out=scratch if value is None else value)
    xp.subtract(c.one, xp.multiply(tanh, tanh, out=slope), out=slope)


def _silu(xp: Any, c: Constants, z: Array, value: Array, slope: Array, scratch: Array) -> None:
    # silu(z) = z s with s the sigmoid, of derivative s + z s (1 - s) = z s + s (1 - z s). The bound keeps exp finite.
    exponential = xp.exp(xp.minimum(xp.negative(z, out=scratch), c.eighty, out=scratch), out=scratch)
    sigmoid = xp.divide(c.one, xp.add(exponential, c.one, out=scratch), out=scratch)
    silu = xp.multiply(z, sigmoid, out=slope)
    if value is not None:
        value[...] = silu
    xp.add(silu, xp.multiply(sigmoid, c.one - silu, out=scratch), out=slope)


KERNELS: dict[type[nn.Module], ActivationKernel] = {nn.Mish: _mish, nn.ReLU: _relu, nn.Tanh: _tanh, nn.SiLU: _silu}


@cache
def constants(xp: Any, dtype: th.dtype, device: th.device) -> Constants:
    """The numbers that the kernels need, for arrays of ``xp`` of the given type and place."""
    numbers = th.tensor([0.0, 1.0, 2.0, 20.0, 80.0], dtype=dtype, device=device)
    return Constants(*(number.numpy() if xp is np else number for number in numbers))


class _MishFunction(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: th.Tensor) -> th.Tensor:
        value, slope, scratch = (th.empty_like(z) for _ in range(3))
        _mish(th, constants(th, z.dtype, z.device), z, value, slope, scratch)
        ctx.save_for_backward(z, slope)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        z, slope = ctx.saved_tensors
        if th.is_grad_enabled():  # a second derivative may be asked for: spell the first one for autograd
            tanh = th.tanh(nn.functional.softplus(z))
            slope = tanh + z * (1 - tanh.square()) * th.sigmoid(z)
        result: th.Tensor = gradient * slope
        return result


class Mish(nn.Mish):
    """``torch.nn.Mish``, faster on a CPU: torch's own spends three transcendental functions on each of value and derivative."""

    def forward(self, z: th.Tensor) -> th.Tensor:
        """Elementwise, any shape."""
        if z.device.type != "cpu":
            return super().forward(z)
        value: th.Tensor = _MishFunction.apply(z)  # type: ignore[no-untyped-call]
        return value


KERNELS[Mish] = _mish
