"""Attention: its formula, its gradients, and that compiled code computes what torch does."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch as th
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_diffrl.diffusion import attention as attention_module
from sb3_diffrl.diffusion.attention import SHORT, attention, torch_attention
from sb3_diffrl.native import library

Attention = Callable[[th.Tensor, th.Tensor, int], th.Tensor]
Transform = Callable[[th.Tensor], th.Tensor]
WAYS = pytest.mark.parametrize("attend", [attention, torch_attention], ids=["compiled", "torch"])


def inputs(batch: int, n_queries: int, length: int, d_model: int, seed: int = 0) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    query = th.randn(batch, n_queries, d_model, generator=generator)
    return query, th.randn(batch, length, 2 * d_model, generator=generator)


@WAYS
def test_a_query_between_two_steps_takes_their_values_by_its_products(attend: Attention) -> None:
    # One head of 4 numbers: scores are products / sqrt(4). Keys 2 log 3 and 0 along the query weigh 3 to 1.
    query = th.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    keys = th.tensor([[[2 * math.log(3), 5.0, 0.0, 0.0], [0.0, 0.0, -7.0, 0.0]]])
    values = th.tensor([[[4.0, 0.0, 8.0, 1.0], [0.0, 4.0, 8.0, 2.0]]])
    expected = th.tensor([[[3.0, 1.0, 8.0, 1.25]]])
    th.testing.assert_close(attend(query, th.cat([keys, values], dim=2), 4), expected)


@WAYS
def test_heads_do_not_see_one_another(attend: Attention) -> None:
    query, key_value = inputs(2, 3, 5, 32)
    heads = [(query[..., i : i + 8], th.cat([key_value[..., j : j + 8] for j in (i, 32 + i)], dim=2)) for i in range(0, 32, 8)]
    alone = [attend(q, kv, 8) for q, kv in heads]
    th.testing.assert_close(attend(query, key_value, 8), th.cat(alone, dim=2))


@WAYS
@pytest.mark.parametrize("length", [1, 7, SHORT, SHORT + 1])
def test_attention_of_any_length_is_torchs(attend: Attention, length: int) -> None:
    query, key_value = inputs(3, 5, length, 16)
    # (batch, n, 16) -> (batch, 2, n, 8)
    q, k, v = (x.reshape(3, -1, 2, 8).transpose(1, 2) for x in (query, *key_value.chunk(2, dim=2)))
    expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    th.testing.assert_close(attend(query, key_value, 8), expected)


@pytest.mark.skipif(library.load() is None, reason="no C compiler")
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(
    ("batch", "n_queries", "length", "d_model", "head_dim"),
    [(128, 4, 4, 64, 32), (5, 3, 4, 48, 12), (7, 1, 17, 36, 36), (2, 33, 33, 10, 5), (3, 9, SHORT, 40, 20), (1, 2, 1, 3, 1)],
)
def test_compiled_attention_and_its_gradient_are_as_exact_as_torchs(
    batch: int, n_queries: int, length: int, d_model: int, head_dim: int, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "MIN_PER_THREAD", 1)
    before = th.get_num_threads()
    th.set_num_threads(n_threads)
    results = []
    for attend, dtype in ((torch_attention, th.float64), (torch_attention, th.float32), (attention, th.float32)):
        query, key_value = (3 * x.to(dtype) for x in inputs(batch, n_queries, length, d_model))
        query.requires_grad_()
        key_value.requires_grad_()
        result = attend(query, key_value, head_dim)
        assert (attend is attention) == (type(result.grad_fn).__name__ == "_AttentionFunctionBackward")
        gradient = th.cos(th.arange(result.numel(), dtype=dtype)).view_as(result)
        results.append([result.detach(), *th.autograd.grad(result, (query, key_value), gradient)])
    th.set_num_threads(before)
    for exact, plain, compiled in zip(*results, strict=True):
        error, torchs_error = (float((x - exact).abs().max()) for x in (compiled, plain))
        assert error < 5 * torchs_error + 1e-6


@pytest.mark.skipif(library.load() is None, reason="no C compiler")
def test_compiled_attention_of_a_sequence_does_not_depend_on_its_batch() -> None:
    query, key_value = inputs(9, 6, 11, 32)
    result = attention(query, key_value, 16)
    assert th.equal(attention(query[4:5], key_value[4:5], 16), result[4:5])
    assert th.equal(attention(query[:, 2:3].contiguous(), key_value, 16), result[:, 2:3])


@WAYS
def test_a_number_that_is_none_stays_in_its_sequence(attend: Attention) -> None:
    query, key_value = inputs(3, 2, 5, 16)
    key_value[1, 3, 0] = th.nan  # a key of the first head
    result = attend(query, key_value, 8)
    assert result.isnan().any(dim=2).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert not result[1, :, 8:].isnan().any()


def test_second_derivatives_are_torchs() -> None:
    results = []
    for attend in (torch_attention, attention):
        query, key_value = (x.requires_grad_() for x in inputs(3, 4, 5, 16))
        (first,) = th.autograd.grad(attend(query, key_value, 8).sin().sum(), query, create_graph=True)
        results.append(th.autograd.grad(first.square().sum(), (query, key_value)))
    for expected, result in zip(*results, strict=True):
        th.testing.assert_close(result, expected)


@pytest.mark.parametrize("needed", [0, 1])
def test_one_of_the_gradients_can_be_asked_for(needed: int) -> None:
    results = []
    for attend in (torch_attention, attention):
        both = inputs(3, 4, 5, 16)
        both[needed].requires_grad_()
        (first,) = th.autograd.grad(attend(*both, 8).sin().sum(), both[needed])
        (again,) = th.autograd.grad(attend(*both, 8).sin().sum(), both[needed], create_graph=True)
        results.append((first, again.detach()))
    for expected, result in zip(*results, strict=True):
        th.testing.assert_close(result, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_transforms_tensors_is_left_to_torch() -> None:
    query, key_value = inputs(8, 4, 5, 16)

    def loss(query: th.Tensor, attend: Attention = attention) -> th.Tensor:
        return attend(query, key_value, 8).square().sum()

    y = query.clone().requires_grad_()
    (expected,) = th.autograd.grad(loss(y, torch_attention), y)
    th.testing.assert_close(th.func.grad(loss)(query), expected)
    th.testing.assert_close(th.func.jvp(loss, (query,), (query,))[1], (expected * query).sum())
    th.testing.assert_close(
        th.vmap(lambda q: attention(q, key_value, 8))(query[None].expand(2, -1, -1, -1))[1], attention(query, key_value, 8)
    )
    output = attention(y, key_value, 8)
    (batched,) = th.autograd.grad(output, y, th.stack([2 * output.detach()] * 2), is_grads_batched=True)
    th.testing.assert_close(batched[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, query)  # type: ignore[no-untyped-call]
        slope = forward_ad.unpack_dual(loss(dual)).tangent  # type: ignore[no-untyped-call]
        th.testing.assert_close(slope, (expected * query).sum())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert attention(th.empty(8, 4, 16), th.empty(8, 5, 32), 8).shape == query.shape
    with th.autocast("cpu", th.bfloat16):
        assert attention(query, key_value, 8).dtype == th.bfloat16
    traced = th.jit.trace(lambda q: attention(q, key_value, 8), query)  # type: ignore[no-untyped-call]
    th.testing.assert_close(traced(query), attention(query, key_value, 8))


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda x: x.transpose(0, -1).contiguous(), lambda x: x.transpose(0, -1)),
        (lambda x: x.bfloat16(), lambda x: x.float()),
        (lambda x: x.double(), lambda x: x),
    ],
    ids=["turned", "rounded", "another type"],
)
def test_saved_tensors_may_come_back_in_another_form(pack: Transform, unpack: Transform) -> None:
    gradients = []
    for attend, hooks in ((torch_attention, nullcontext()), (attention, th.autograd.graph.saved_tensors_hooks(pack, unpack))):
        query, key_value = (x.requires_grad_() for x in inputs(5, 4, 6, 16))
        with hooks:
            result = attend(query, key_value, 8)
        gradients.append(th.autograd.grad(result, (query, key_value), result.detach().cos()))
    for expected, gradient in zip(*gradients, strict=True):
        th.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [th.float16, th.float64])
def test_torchs_default_type_and_device_do_not_matter(dtype: th.dtype) -> None:
    query, key_value = (x.requires_grad_() for x in inputs(50, 32, 32, 64))
    expected = attention(query, key_value, 8)
    expected_gradient = th.autograd.grad(expected.sum(), query)[0]
    th.set_default_dtype(dtype)
    try:
        with th.device("meta"):
            result = attention(query, key_value, 8)
            (gradient,) = th.autograd.grad(result, query, th.ones_like(result, device="cpu"))
    finally:
        th.set_default_dtype(th.float32)
    assert th.equal(result, expected)
    th.testing.assert_close(gradient, expected_gradient)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dispatch_modes_see_what_is_computed() -> None:
    query, key_value = inputs(3, 4, 5, 16)
    graph = make_fx(lambda q: attention(q, key_value, 8))(query)
    other = query + 1
    th.testing.assert_close(graph(other), attention(other, key_value, 8))


def test_tensors_that_torch_has_yet_to_negate_or_to_fill() -> None:
    query, key_value = inputs(3, 4, 5, 16)
    negative = th._neg_view(query)
    assert negative.is_neg()
    th.testing.assert_close(attention(negative, key_value, 8), attention(-query, key_value, 8))
    y = query.clone().requires_grad_()
    (expected,) = th.autograd.grad(attention(y, key_value, 8), y, -query)
    th.testing.assert_close(th.autograd.grad(attention(y, key_value, 8), y, negative)[0], expected)
    nothing = th._efficientzerotensor(query.shape)
    assert not th.autograd.grad(attention(y, key_value, 8), y, nothing)[0].any()


def test_a_gradient_that_is_differentiated_forwards_keeps_its_tangent() -> None:
    query, key_value = inputs(3, 4, 5, 16)
    y = query.clone().requires_grad_()
    tangents = []
    for attend in (torch_attention, attention):
        result = attend(y, key_value, 8)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(query, 2 * query)  # type: ignore[no-untyped-call]
            (gradient,) = th.autograd.grad(result, y, dual)
            tangents.append(forward_ad.unpack_dual(gradient).tangent)  # type: ignore[no-untyped-call]
    th.testing.assert_close(*tangents)


def test_other_layouts_and_types() -> None:
    query, key_value = inputs(8, 4, 5, 16)
    expected = attention(query, key_value, 8)
    spread = th.stack([query, query], dim=3)[..., 0].requires_grad_()
    result = attention(spread, key_value, 8)
    th.testing.assert_close(result, expected)
    (gradient,) = th.autograd.grad(result, spread, th.ones(16, 4, 8).transpose(0, 2))  # not contiguous
    assert gradient.abs().sum() > 0
    assert attention(query.double(), key_value.double(), 8).dtype == th.float64
    assert attention(query[:0], key_value[:0], 8).shape == (0, 4, 16)
    assert attention(query[:, :0], key_value, 8).shape == (8, 0, 16)
    assert not attention(query, key_value[:, :0], 8).any()


@pytest.mark.parametrize(
    ("query", "key_value", "head_dim"),
    [((3, 4, 16), (2, 5, 32), 8), ((3, 4, 16), (3, 5, 16), 8), ((3, 4, 16), (3, 5, 48), 8), ((3, 4, 16), (3, 5, 32), 6)],
)
def test_shapes_that_do_not_fit_are_refused(query: tuple[int, ...], key_value: tuple[int, ...], head_dim: int) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        attention(th.randn(query), th.randn(key_value), head_dim)
