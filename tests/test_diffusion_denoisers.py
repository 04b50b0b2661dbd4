"""The denoising networks: what they start as, what they see, and that they learn."""

import math
from collections.abc import Callable

import pytest
import torch as th
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from sb3_diffrl.diffusion import (
    Denoise,
    DiffusionModel,
    DiffusionProcess,
    DiscreteSchedule,
    DiT1d,
    Fixed,
    FourierEmbedding,
    MlpDenoiser,
    SinusoidalEmbedding,
    Transformer1d,
    VPSchedule,
    make_schedule,
    native,
)
from sb3_diffrl.diffusion.layers import Linear, TanhGELU
from sb3_diffrl.diffusion.transformer import BLOCK_VECTORS, Block
from sb3_diffrl.native import library


def randomised(module: nn.Module) -> nn.Module:
    """The module with no weight at the zero it starts from."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def block_vectors(n: int, d_model: int) -> tuple[th.Tensor, ...]:
    return tuple(th.randn(BLOCK_VECTORS, n, 1, d_model))


def test_a_block_with_its_gates_at_zero_is_the_identity() -> None:
    block, x = randomised(Block(16, 8)), 5 + 3 * th.randn(4, 6, 16)
    shift, scale, _, shift_mlp, scale_mlp, _ = block_vectors(4, 16)
    closed = th.zeros(4, 1, 16)
    # Not the identity of the normed input: its mean is 0 and its variance 1
    assert th.equal(block(x, (shift, scale, closed, shift_mlp, scale_mlp, closed)), x)


def test_a_transformer_starts_with_every_block_the_identity() -> None:
    model = Transformer1d(3, 2, max_length=6, condition_dim=5, d_model=16, depth=3, head_dim=8)
    x, condition = th.randn(4, 6, 3), th.randn(4, 5)
    vectors = model.modulation(condition)
    hidden = model.embedding(x) + model.positions
    for i, block in enumerate(model.blocks):
        assert th.equal(block(hidden, vectors[BLOCK_VECTORS * i : BLOCK_VECTORS * (i + 1)]), hidden)
    assert not model(x, condition).any()


def test_a_block_is_its_formula() -> None:
    # Spelt with matrix products, softmax and loops over heads
    block, x = randomised(Block(8, 4)), th.randn(2, 5, 8)
    vectors = block_vectors(2, 8)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors

    def norm(h: th.Tensor) -> th.Tensor:
        return (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-6).sqrt()

    assert isinstance(block, Block)
    normed = norm(x) * (1 + scale) + shift
    q, (k, v) = block.query(normed), block.key_value(normed).split(8, dim=2)
    heads = [th.softmax(q[..., i : i + 4] @ k[..., i : i + 4].mT / math.sqrt(4), dim=2) @ v[..., i : i + 4] for i in range(0, 8, 4)]
    hidden = x + gate * block.attention_out(th.cat(heads, dim=2))
    expected = hidden + gate_mlp * block.mlp(norm(hidden) * (1 + scale_mlp) + shift_mlp)
    th.testing.assert_close(block(x, vectors), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("condition_dim", [0, 5])
def test_reading_some_steps_alone_gives_the_same_as_reading_all(condition_dim: int) -> None:
    model = randomised(Transformer1d(3, 2, 6, condition_dim, d_model=16, depth=2, head_dim=8))
    x, condition = th.randn(4, 6, 3), th.randn(4, condition_dim) if condition_dim else None
    full = model(x, condition)
    assert full.shape == (4, 6, 2)
    for steps in (slice(1), slice(3), slice(2, None), slice(6, None)):
        th.testing.assert_close(model(x, condition, steps), full[:, steps], rtol=1e-4, atol=1e-5)
    # What is read at the first step depends on the last one, and on the order
    moved = x.clone()
    moved[:, -1] += 1
    for other in (moved, x[:, [0, 2, 1, 3, 4, 5]]):
        assert not th.isclose(model(other, condition, slice(1)), full[:, :1], rtol=1e-3).all(dim=2).any()


def test_every_weight_of_a_critic_learns() -> None:
    # A layer without a condition has no weights for one
    model = randomised(Transformer1d(3, 1, 6, d_model=16, depth=2, head_dim=8))
    model(th.randn(4, 6, 3), steps=slice(1)).sum().backward()
    for name, parameter in model.named_parameters():
        # A bias of the keys moves all the scores of a query alike, and is the one that cannot matter
        gradient = parameter.grad[16:] if name.endswith("key_value.bias") and parameter.grad is not None else parameter.grad
        assert gradient is not None
        assert bool(gradient.any()), name


def test_a_trajectory_shorter_than_the_longest_is_taken_and_a_longer_one_refused() -> None:
    model = DiT1d(3, max_length=6, d_model=16, head_dim=8)
    assert model(th.randn(2, 4, 3), th.rand(2)).shape == (2, 4, 3)
    with pytest.raises(ValueError, match="max_length"):
        model(th.randn(2, 7, 3), th.rand(2))


@pytest.mark.parametrize("n_given", [0, 1, 3, 4, 6])
def test_given_steps_come_out_as_zero_and_the_others_as_they_are(n_given: int) -> None:
    model = DiT1d(3, max_length=4, cond_dim=2, d_model=16, head_dim=8, n_given=n_given)
    randomised(model)
    x, time, cond = th.randn(5, 4, 3), th.rand(5), th.randn(5, 2)
    output = model(x, time, cond)
    assert output.shape == x.shape
    assert not output[:, :n_given].any()
    at_times = [model.at_times(time[:1], c)[0](x) for c in (cond, cond[:1], None)]
    all_steps = randomised(DiT1d(3, max_length=4, cond_dim=2, d_model=16, head_dim=8))
    all_steps.load_state_dict(model.state_dict())
    th.testing.assert_close(output[:, n_given:], all_steps(x, time, cond)[:, n_given:], rtol=1e-4, atol=1e-5)
    for here, c in zip(at_times, (cond, cond[:1].expand(5, -1), None), strict=True):
        th.testing.assert_close(here, model(x, time[:1].expand(5), c), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("n_given", -1), ("n_given", 1.0), ("head_dim", -8), ("head_dim", 0)])
def test_sizes_that_are_none_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        DiT1d(3, max_length=4, **{"d_model": 16, "head_dim": 8, name: value})  # type: ignore[arg-type]


@pytest.mark.skipif(library.load() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [th.float16, th.float64])
def test_compiled_chains_do_not_depend_on_torchs_default_type(dtype: th.dtype) -> None:
    times, coefficients = th.tensor([1.0, 0.5]), [(1.0, -0.5, 0.4, 0.6), (1.0, -0.2, 0.0, 1.0)]
    dit, mlp = DiT1d(3, 4, d_model=16, head_dim=8), MlpDenoiser(3, 0, [16, 16])
    randomised(dit)
    vectors, terms = dit.vectors_at(times).detach(), mlp.time_terms(times).detach()
    results = []
    for default in (th.float32, dtype):
        native._remembered.clear()
        th.set_default_dtype(default)
        try:
            plans = native.ddim_transformer(dit.transformer, vectors, coefficients, th.ones(5, 4, 3, dtype=th.float32), None, None)
            actions = native.ddim_perceptron(mlp, terms, None, coefficients, th.ones(5, 3, dtype=th.float32), None)
        finally:
            th.set_default_dtype(th.float32)
        results.append((plans, actions))
    assert all(map(th.equal, *results))


def test_dit_depends_on_time_and_condition_row_by_row() -> None:
    model = randomised(DiT1d(3, max_length=4, cond_dim=2, d_model=16, head_dim=8))
    x, time, cond = th.randn(5, 4, 3), th.rand(5), th.randn(5, 2)
    output = model(x, time, cond)
    for i in range(5):
        th.testing.assert_close(model(x[i : i + 1], time[i : i + 1], cond[i : i + 1]), output[i : i + 1], rtol=1e-4, atol=1e-4)
    other_time, other_cond = time.clone(), cond.clone()
    other_time[2] += 0.3
    other_cond[3] += 1
    changed = [
        (row != 0).any(dim=(1, 2)).tolist() for row in (model(x, other_time, cond) - output, model(x, time, other_cond) - output)
    ]
    assert changed == [[False, False, True, False, False], [False, False, False, True, False]]


def test_masked_rows_leave_the_condition_out() -> None:
    model = randomised(DiT1d(3, max_length=4, cond_dim=2, d_model=16, head_dim=8))
    x, time, cond = th.randn(2, 4, 3), th.full((2,), 0.3), th.randn(2, 2)
    output = model(x, time, cond, cond_mask=th.tensor([True, False]))
    th.testing.assert_close(output[0], model(x, time, cond)[0])
    th.testing.assert_close(output[1], model(x, time)[1])
    assert not th.isclose(model(x, time), model(x, time, cond)).all()
    with pytest.raises(ValueError, match="cond_dim"):
        DiT1d(3, max_length=4, d_model=16, head_dim=8)(x, time, cond)


def test_one_time_for_all_rows_gives_the_same_as_a_time_each() -> None:
    time = th.tensor([0.4])
    models = (randomised(DiT1d(3, 4, d_model=16, head_dim=8)), randomised(MlpDenoiser(3, 0, [16])))
    for model, x in zip(models, (th.randn(5, 4, 3), th.randn(5, 3)), strict=True):
        th.testing.assert_close(model(x, time.expand(5)), model(x, time.repeat(5)), rtol=1e-4, atol=1e-4)


def test_mlp_takes_vector_time_and_condition() -> None:
    model = randomised(MlpDenoiser(3, 5, [16, 8], nn.ReLU, time_embedding_dim=12))
    assert [layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)] == [12, 24, 3 + 12 + 5, 16, 8]
    x, time, cond = th.randn(7, 3), th.rand(7), th.randn(7, 5)
    output = model(x, time, cond)
    assert output.shape == (7, 3)
    for changed in (model(x + 1, time, cond), model(x, time / 2, cond), model(x, time, cond + 1)):
        assert not th.isclose(changed, output).all(dim=1).any()
    assert MlpDenoiser(3, 0)(x, time).shape == (7, 3)


@pytest.mark.parametrize("cond_dim", [0, 30])
def test_the_parts_of_the_mlps_input_start_with_equal_weight(cond_dim: int) -> None:
    model = MlpDenoiser(1, cond_dim, [20_000, 8], time_embedding_dim=6)
    sizes = [size for size in (1, 6, cond_dim) if size]
    first = next(layer for layer in model.net if isinstance(layer, nn.Linear))
    # He's variance of 2, in equal shares; standard error 1% of a share where it is one column
    shares = [float(columns.square().sum(1).mean()) for columns in th.split(first.weight.detach(), sizes, dim=1)]
    assert shares == pytest.approx([2 / len(sizes)] * len(sizes), rel=0.05)


def test_embeddings_are_their_formulas() -> None:
    time = th.tensor([0.0, 0.25, 1.0])
    embedding = SinusoidalEmbedding(4)(time)
    expected = th.stack([f(1000 * time * w) for f in (th.sin, th.cos) for w in (1.0, 0.01)], dim=1)
    th.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)
    fourier = FourierEmbedding(6, scale=2.0)
    angles = time[:, None] * fourier.frequencies
    th.testing.assert_close(fourier(time), th.cat([angles.sin(), angles.cos()], dim=1))
    # Random frequencies are part of the model
    assert list(fourier.state_dict()) == ["frequencies"]
    assert not SinusoidalEmbedding(4).state_dict()
    assert float(FourierEmbedding(20_000, scale=2.0).frequencies.std()) == pytest.approx(2 * math.pi * 2.0, rel=0.05)
    with pytest.raises(ValueError, match="even"):
        FourierEmbedding(5)
    with pytest.raises(ValueError, match="even"):
        SinusoidalEmbedding(5)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="head_dim"):
        Transformer1d(3, 3, 4, d_model=16, head_dim=5)
    with pytest.raises(ValueError, match="depth"):
        Transformer1d(3, 3, 4, d_model=16, head_dim=8, depth=0)
    with pytest.raises(ValueError, match="condition_dim"):
        Transformer1d(3, 3, 4, condition_dim=2, d_model=16, head_dim=8)(th.randn(2, 4, 3))
    with pytest.raises(ValueError, match="condition_dim"):
        Transformer1d(3, 3, 4, d_model=16, head_dim=8)(th.randn(2, 4, 3), th.randn(2, 2))


def test_a_trained_mlp_samples_both_modes() -> None:
    # x0 = +-m with equal chance, where the condition is m: a net that has learned no more than the mean would sample near 0
    process = DiffusionProcess(DiscreteSchedule("squaredcos_cap_v2", 50), clip_sample=1.0)
    model = MlpDenoiser(1, 1, [64, 64])
    optimizer = th.optim.Adam(model.parameters(), lr=3e-3)

    def denoiser(cond: th.Tensor) -> Denoise:
        return lambda x_t, t: model(x_t, process.schedule.network_time(t), cond)

    for _ in range(400):
        cond = 0.3 + 0.5 * th.rand(128, 1)
        x0, t = cond * (th.randint(2, (128, 1)) * 2 - 1), process.schedule.sample_timesteps(128)
        loss = process.denoising_loss(denoiser(cond), x0, t, th.randn(128, 1)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    cond = 0.3 + 0.5 * th.rand(500, 1)
    with th.no_grad():
        samples = process.sample(denoiser(cond), th.randn(500, 1), 10)
    for mode in (cond, -cond):
        assert float(((samples - mode).abs() < 0.2).float().mean()) > 0.3


def test_a_trained_transformer_samples_trajectories() -> None:
    # Straight lines whose slope is the condition, from a start that is inpainted
    process = DiffusionProcess(VPSchedule(), "v_prediction")
    model = DiT1d(1, max_length=4, cond_dim=1, d_model=32, head_dim=16)
    optimizer = th.optim.Adam(model.parameters(), lr=3e-3)
    first = th.tensor([True, False, False, False])[:, None]

    def denoiser(cond: th.Tensor) -> Denoise:
        return lambda x_t, t: model(x_t, process.schedule.network_time(t), cond)

    def lines(n: int) -> tuple[th.Tensor, th.Tensor]:
        start, slope = th.randn(2, n, 1)
        # (n, 4, 1)
        return slope, start[:, None] + slope[:, None] * th.linspace(0, 1, 4)[:, None]

    for _ in range(200):
        slope, x0 = lines(64)
        loss = process.denoising_loss(denoiser(slope), x0, process.schedule.sample_timesteps(64), th.randn_like(x0), first).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    slope, x0 = lines(300)
    with th.no_grad():
        samples = process.sample(denoiser(slope), th.randn_like(x0), 20, fixed=Fixed(first, x0[:, :1]))
    # The end has variance 2: a net that ignores start, slope or position misses it by at least 1
    assert float((samples - x0)[:, -1].square().mean().sqrt()) < 0.4


@pytest.mark.parametrize(
    ("kind", "cond_dim", "cond_rows"), [("mlp", 0, 0), ("mlp", 2, 5), ("dit", 0, 0), ("dit", 2, 1), ("dit", 2, 5)]
)
def test_at_the_times_of_a_chain_the_network_is_as_at_each_alone(kind: str, cond_dim: int, cond_rows: int) -> None:
    th.manual_seed(0)
    model = randomised(MlpDenoiser(3, cond_dim, [16, 16]) if kind == "mlp" else DiT1d(3, 4, cond_dim, d_model=16, head_dim=8))
    x = th.randn(5, 3) if kind == "mlp" else th.randn(5, 4, 3)
    cond = th.randn(cond_rows, cond_dim) if cond_rows else None
    times = th.tensor([0.9, 0.5, 0.1])
    steps = model.at_times(times, cond)  # type: ignore[operator]
    for time, step in zip(times, steps, strict=True):
        th.testing.assert_close(step(x), model(x, time.expand(5), cond))


@pytest.mark.parametrize(
    ("in_dim", "length", "d_model", "head_dim", "depth", "batch"),
    [(4, 32, 64, 32, 2, 3), (17, 4, 96, 16, 1, 30), (3, 2, 32, 16, 3, 1), (29, 50, 64, 64, 2, 2), (1, 9, 48, 12, 1, 11)],
)
@pytest.mark.parametrize("is_inpainting", [False, True])
@pytest.mark.parametrize("n_given", [0, 1, 2])
def test_compiled_chains_are_those_of_torch(
    in_dim: int, length: int, d_model: int, head_dim: int, depth: int, batch: int, is_inpainting: bool, n_given: int
) -> None:
    th.manual_seed(0)
    network = DiT1d(in_dim, length, d_model=d_model, depth=depth, head_dim=head_dim, n_given=n_given)
    process = DiffusionProcess(make_schedule("vp", 0), clip_sample=3.0 if is_inpainting else None)
    model = DiffusionModel(randomised(network), process)
    model.update_ema()
    start = th.randn(batch, length, in_dim)
    mask = th.rand(length, in_dim) < 0.3
    fixed = Fixed(mask, th.randn(batch, length, in_dim)) if is_inpainting else None
    compiled = model.sample(start, None, 6, fixed=fixed)
    model.use_native = False
    plain = model.sample(start, None, 6, fixed=fixed)
    exact = model.double().sample(start.double(), None, 6, fixed=fixed and Fixed(mask, fixed.values.double()))
    # The first steps multiply rounding errors by 1 / alpha, about 150: no further from exact numbers than torch's float32
    error, torchs_error = (float((sample - exact).abs().max()) for sample in (compiled, plain))
    assert error < 5 * torchs_error + 1e-5
    if fixed is not None:
        assert th.equal(compiled[:, mask], fixed.values[:, mask])


@pytest.mark.skipif(library.load() is None, reason="no C compiler")
def test_compiled_chains_see_weights_that_change_and_do_not_depend_on_the_batch() -> None:
    network = DiT1d(3, 8, d_model=64, head_dim=32, n_given=1)
    randomised(network)
    model = DiffusionModel(network, DiffusionProcess(make_schedule("vp", 0)))
    model.update_ema()
    assert native.supports(network.transformer)
    start = th.randn(20, 8, 3)
    before = model.sample(start, None, 4)
    assert th.equal(model.sample(start[7:8], None, 4), before[7:8])
    assert th.equal(model.sample(start.flip(0), None, 4).flip(0), before)
    model.denoiser_ema.module.load_state_dict({k: 1.1 * v for k, v in network.state_dict().items()})
    after = model.sample(start, None, 4)
    assert not th.allclose(after, before, rtol=1e-2)
    exact = model.double().sample(start.double(), None, 4)
    th.testing.assert_close(after, exact.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(library.load() is None, reason="no C compiler")
@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh, nn.SiLU, nn.Mish])
@pytest.mark.parametrize(
    ("x_dim", "cond_dim", "net_arch", "batch", "clip"),
    [(2, 8, (128, 128), 1, 1.0), (6, 34, (256, 256, 256), 5, None), (1, 0, (7,), 300, 0.5), (23, 3, (40, 90), 97, 1.0)],
)
def test_compiled_chains_of_a_perceptron_are_those_of_torch(
    activation_fn: type[nn.Module], x_dim: int, cond_dim: int, net_arch: tuple[int, ...], batch: int, clip: float | None
) -> None:
    th.manual_seed(0)
    network = MlpDenoiser(x_dim, cond_dim, net_arch, activation_fn)
    model = DiffusionModel(network, DiffusionProcess(make_schedule("squaredcos_cap_v2", 50), clip_sample=clip))
    model.update_ema()
    assert native.supports(model.denoiser_ema.module)
    start, cond = th.randn(batch, x_dim), th.randn(batch, cond_dim) if cond_dim else None
    compiled = model.sample(start, cond, 10)
    if cond is None:
        assert th.equal(model.sample(start[-1:], None, 10), compiled[-1:]), "a row depends on its batch"
    else:
        assert th.equal(model.sample(start.flip(0), cond.flip(0), 10).flip(0), compiled), "a row depends on its place"
    model.use_native = False
    plain = model.sample(start, cond, 10)
    exact = model.double().sample(start.double(), None if cond is None else cond.double(), 10)
    error, torchs_error = (float((sample - exact).abs().max()) for sample in (compiled, plain))
    assert error < 5 * torchs_error + 1e-5


@pytest.mark.skipif(library.load() is None, reason="no C compiler")
def test_compiled_chains_of_a_perceptron_see_weights_that_change() -> None:
    network = MlpDenoiser(3, 2, (32, 32))
    model = DiffusionModel(network, DiffusionProcess(make_schedule("squaredcos_cap_v2", 50), clip_sample=1.0))
    model.update_ema()
    start, cond = th.randn(20, 3), th.randn(20, 2)
    before = model.sample(start, cond, 4)
    model.denoiser_ema.module.load_state_dict({k: 1.3 * v for k, v in network.state_dict().items()})
    after = model.sample(start, cond, 4)
    assert not th.allclose(after, before, rtol=1e-2)
    model.use_native = False
    th.testing.assert_close(after, model.sample(start, cond, 4), rtol=1e-3, atol=1e-3)


def test_perceptrons_that_the_compiled_code_does_not_know_run_in_torch() -> None:
    assert not native.supports(MlpDenoiser(3, 2, (32, 32), nn.ELU))
    assert not native.supports(MlpDenoiser(3, 2, (32, 32)).double())
    linear = MlpDenoiser(3, 2, ())
    assert not native.supports(linear)
    model = DiffusionModel(linear, DiffusionProcess(make_schedule("squaredcos_cap_v2", 50), clip_sample=1.0))
    assert model.sample(th.randn(4, 3), th.randn(4, 2), 5).shape == (4, 3)


@pytest.mark.skipif(library.load() is None, reason="no C compiler")
def test_a_subclass_of_a_denoiser_computes_what_it_says() -> None:
    class Silent(DiT1d):
        def vectors_at(self, times: th.Tensor, cond: th.Tensor | None = None) -> th.Tensor:
            raise AssertionError("compiled")

    assert native.supports(DiT1d(3, 8, d_model=32, head_dim=16).transformer)
    assert not native.supports(type("Other", (MlpDenoiser,), {})(3, 2, (32, 32)))
    model = DiffusionModel(Silent(3, 8, d_model=32, head_dim=16), DiffusionProcess(make_schedule("vp", 0)))
    assert not model._can_compile(th.randn(2, 8, 3), None, "ddim", None, None)


@pytest.mark.parametrize("shape", [(3, 5), (1100, 30), (40, 32, 96)])
@pytest.mark.parametrize("make", [lambda n: Linear(n, 33), lambda _: TanhGELU()], ids=["linear", "gelu"])
def test_fast_layers_equal_torchs(make: Callable[[int], nn.Module], shape: tuple[int, ...]) -> None:
    fast = make(shape[-1])
    if isinstance(fast, Linear):
        plain: nn.Module = nn.Linear(shape[-1], 33)
        plain.load_state_dict(fast.state_dict())
    else:
        plain = nn.GELU(approximate="tanh")
    x = (3 * th.randn(shape)).requires_grad_()
    results = []
    for layer, double in ((plain, True), (fast, False)):
        inputs = x.double() if double else x
        layer = layer.double() if double else layer
        y = layer(inputs)
        weights = th.cos(th.arange(y.numel())).view_as(y)
        sources, loss = [x, *layer.parameters()], (y * weights).sum()
        gradients = th.autograd.grad(loss, sources, retain_graph=True)
        (first,) = th.autograd.grad(loss, x, create_graph=True)
        results.append([y.detach(), *gradients, *th.autograd.grad(loss + first.square().sum(), sources)])
        with th.no_grad():
            th.testing.assert_close(layer(inputs), y, rtol=1e-5, atol=1e-5)
    for expected, result in zip(*results, strict=True):
        th.testing.assert_close(result, expected.float(), rtol=1e-4, atol=2e-5 * float(1 + expected.abs().max()))


def test_fast_layers_compute_other_layouts_and_types() -> None:
    linear, gelu = Linear(20, 8), TanhGELU()
    x = th.randn(20, 1200).T
    th.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    th.testing.assert_close(gelu(x), nn.functional.gelu(x, approximate="tanh"))
    assert gelu(x.double()).dtype == linear.double()(x.double()).dtype == th.float64
    spread = th.randn(400, 2, 64)[:, 0].requires_grad_()  # and a gradient that is not contiguous
    (expected,) = th.autograd.grad(nn.functional.gelu(spread, approximate="tanh").T.cos().sum(), spread)
    th.testing.assert_close(th.autograd.grad(gelu(spread).T.cos().sum(), spread)[0], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", [Linear(64, 64), TanhGELU()], ids=["linear", "gelu"])
def test_fast_layers_leave_what_transforms_tensors_to_torch(layer: nn.Module) -> None:
    x = th.randn(2048, 64)

    def loss(x: th.Tensor) -> th.Tensor:
        result: th.Tensor = layer(x).square().sum()
        return result

    y = x.clone().requires_grad_()
    (expected,) = th.autograd.grad(loss(y), y)
    th.testing.assert_close(th.func.grad(loss)(x), expected, rtol=1e-4, atol=1e-4)
    th.testing.assert_close(th.vmap(layer)(x[None].expand(2, -1, -1))[1], layer(x))
    th.testing.assert_close(th.func.jvp(loss, (x,), (x,))[1], (expected * x).sum(), rtol=1e-3, atol=1e-2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)  # type: ignore[no-untyped-call]
        slope = forward_ad.unpack_dual(loss(dual)).tangent  # type: ignore[no-untyped-call]
        th.testing.assert_close(slope, (expected * x).sum(), rtol=1e-3, atol=1e-2)
    output = layer(y)
    (batched,) = th.autograd.grad(output, y, th.stack([2 * output.detach()] * 2), is_grads_batched=True)
    th.testing.assert_close(batched[0], expected, rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(th.empty(2048, 64)).shape == x.shape
    with th.autocast("cpu", th.bfloat16):
        assert layer(x).dtype == (th.bfloat16 if isinstance(layer, Linear) else th.float32)
    traced = th.jit.trace(layer, x)  # type: ignore[no-untyped-call]
    th.testing.assert_close(traced(x), layer(x))


def test_fast_layers_compute_the_gradients_that_are_asked_for() -> None:
    layer, x = Linear(64, 64), th.randn(2048, 64)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    th.testing.assert_close(layer.bias.grad, th.full((64,), 2048.0))
    y = x.clone().requires_grad_()
    layer.bias.requires_grad_(False)
    layer(y).sum().backward()
    th.testing.assert_close(y.grad, layer.weight.sum(0).expand(2048, -1), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(th.randn(2048, 65))
