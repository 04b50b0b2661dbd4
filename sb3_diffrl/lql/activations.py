"""Activations with their derivatives."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch as th
from torch import nn


class Constants(NamedTuple):
    """Numbers as zero-dimensional tensors: a Python number costs a torch call more than the arithmetic does."""

    zero: th.Tensor
    one: th.Tensor
    two: th.Tensor
    twenty: th.Tensor
    eighty: th.Tensor


# kernel(c, z, value, slope, scratch): writes the activation of `z` into `value` (unless None) and its derivative into `slope`.
# The tensors are of one shape and share no memory. They are reused because allocating costs as much as the arithmetic.
ActivationKernel = Callable[[Constants, th.Tensor, th.Tensor | None, th.Tensor, th.Tensor], None]


def _mish(c: Constants, z: th.Tensor, value: th.Tensor | None, slope: th.Tensor, scratch: th.Tensor) -> None:
    # With u = exp(z), m = 1 + u and r = 2 / (1 + m^2): tanh(softplus(z)) = 1 - r, of derivative u m r^2.
    # One transcendental function instead of three; beyond 20, mish(z) = z to the last bit.
    u = th.exp(th.minimum(z, c.twenty, out=scratch), out=scratch)
    m = th.add(u, c.one, out=slope)
    um = th.multiply(u, m, out=scratch)
    m_squared = th.multiply(m, m, out=slope)
    r = th.divide(c.two, th.add(m_squared, c.one, out=slope), out=slope)
    derivative = th.multiply(th.multiply(um, r, out=scratch), r, out=scratch)
    tanh = th.subtract(c.one, r, out=slope)
    if value is not None:
        th.multiply(z, tanh, out=value)
    tanh.addcmul_(z, derivative)


def _relu(c: Constants, z: th.Tensor, value: th.Tensor | None, slope: th.Tensor, scratch: th.Tensor) -> None:
    positive = th.maximum(z, c.zero, out=scratch if value is None else value)
    th.sign(positive, out=slope)


def _tanh(c: Constants, z: th.Tensor, value: th.Tensor | None, slope: th.Tensor, scratch: th.Tensor) -> None:
    tanh = th.tanh(z, out=scratch if value is None else value)
    th.subtract(c.one, th.multiply(tanh, tanh, out=slope), out=slope)


def _silu(c: Constants, z: th.Tensor, value: th.Tensor | None, slope: th.Tensor, scratch: th.Tensor) -> None:
    # silu(z) = z s with s the sigmoid, of derivative s + z s (1 - s) = z s + s (1 - z s). The bound keeps exp finite.
    exponential = th.exp(th.minimum(th.negative(z, out=scratch), c.eighty, out=scratch), out=scratch)
    sigmoid = th.divide(c.one, th.add(exponential, c.one, out=scratch), out=scratch)
    silu = th.multiply(z, sigmoid, out=slope)
    if value is not None:
        value.copy_(silu)
    th.add(silu, th.multiply(sigmoid, c.one - silu, out=scratch), out=slope)


# Elements below which torch's own Mish is faster: its cost is the call
SMALL = 4096

KERNELS: dict[type[nn.Module], ActivationKernel] = {nn.Mish: _mish, nn.ReLU: _relu, nn.Tanh: _tanh, nn.SiLU: _silu}


@cache
def constants(dtype: th.dtype, device: th.device) -> Constants:
    """The numbers that the kernels need, for tensors of the given type and place."""
    return Constants(*th.tensor([0.0, 1.0, 2.0, 20.0, 80.0], dtype=dtype, device=device))


class _MishFunction(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: th.Tensor) -> th.Tensor:
        value, slope, scratch = (th.empty_like(z) for _ in range(3))
        _mish(constants(z.dtype, z.device), z, value, slope, scratch)
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
        if z.device.type != "cpu" or z.numel() < SMALL:
            return super().forward(z)
        value: th.Tensor = _MishFunction.apply(z)  # type: ignore[no-untyped-call]
        return value


KERNELS[Mish] = _mish
