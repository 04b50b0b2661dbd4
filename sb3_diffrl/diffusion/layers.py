"""Layers of the transformer that train faster on a CPU than torch's own, with the same numbers up to rounding."""

from typing import Any

import torch as th
from torch import nn
from torch.autograd import forward_ad

from sb3_diffrl.native.library import is_plain, load

# Rows from which oneDNN's products are faster, numbers from which GELU is, and from which another thread brings more than it costs
MIN_ROWS, MIN_NUMBERS, MIN_PER_THREAD = 256, 2**14, 2**15
# oneDNN's product with its bias, which torch's own compiler uses, too; `torch.nn.functional.linear` copies the bias first and then
# adds MKL's product.
_linear = getattr(th.ops.mkldnn, "_linear_pointwise", None) if th.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


def is_seen() -> bool:
    """Whether tracing, a compiler, a dispatch mode, autocast or forward differentiation has to see what is computed now."""
    is_traced = bool(th._C._get_tracing_state()) or th.compiler.is_compiling() or th._C._len_torch_dispatch_stack() > 0
    return is_traced or th.is_autocast_enabled("cpu") or forward_ad._current_level >= 0


def is_for_torch(gradient: th.Tensor) -> bool:
    """Whether torch has to compute what this gradient becomes: a derivative of it may be asked for, or something has to see it."""
    return th.is_grad_enabled() or is_seen() or not is_plain(gradient)


def _is_fast(x: th.Tensor, size: int, least: int) -> bool:
    return size >= least and not is_seen() and is_plain(x)


class _LinearFunction(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(x, weight)
        assert _linear is not None
        y: th.Tensor = _linear(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:
        (x, weight), rows = ctx.saved_tensors, gradient.reshape(-1, gradient.shape[-1])
        x_gradient, weight_gradient, bias_gradient = None, None, None
        if ctx.needs_input_grad[0]:
            if is_for_torch(gradient) or _linear is None:
                x_gradient = (rows @ weight).view(x.shape)
            else:
                x_gradient = _linear(rows, weight.T, None, "none", [], "").view(x.shape)
        if ctx.needs_input_grad[1]:
            weight_gradient = rows.T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            bias_gradient = rows.sum(0)
        return x_gradient, weight_gradient, bias_gradient


class Linear(nn.Linear):
    """``torch.nn.Linear``, with a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """``(..., in_features) -> (..., out_features)``"""
        learns = th.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        is_fast = _linear is not None and learns and _is_fast(x, x.numel() // self.in_features, MIN_ROWS)
        if not is_fast or x.shape[-1] != self.in_features or self.weight.dtype != x.dtype:
            return super().forward(x)
        y: th.Tensor = _LinearFunction.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


class _GeluFunction(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        library, y = load(), th.empty_like(x)
        assert library is not None
        ctx.save_for_backward(x)
        library.gelu(x.data_ptr(), y.data_ptr(), x.numel(), _n_threads(x))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        library, (x,) = load(), ctx.saved_tensors
        # Hooks of the user's may have given x back in another form
        if is_for_torch(gradient) or not is_plain(x) or x.shape != gradient.shape:
            result: th.Tensor = th.ops.aten.gelu_backward(gradient, x, approximate="tanh")
            return result
        assert library is not None
        result = th.empty_like(x)
        library.gelu_backward(x.data_ptr(), gradient.data_ptr(), result.data_ptr(), x.numel(), _n_threads(x))
        return result


def _n_threads(x: th.Tensor) -> int:
    return max(1, min(th.get_num_threads(), x.numel() // MIN_PER_THREAD))


class TanhGELU(nn.GELU):
    """``torch.nn.GELU(approximate="tanh")``."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Elementwise, any shape."""
        if not _is_fast(x, x.numel(), MIN_NUMBERS) or load() is None:
            return super().forward(x)
        value: th.Tensor = _GeluFunction.apply(x)  # type: ignore[no-untyped-call]
        return value
