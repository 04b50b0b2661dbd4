"""The hand-written gradient of the critics against automatic differentiation."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_diffrl.lql import activations
from sb3_diffrl.lql.activations import Mish
from sb3_diffrl.lql.critic import LangevinCritic, StackedLinear
from sb3_diffrl.lql.gradients import AutogradQGradient, StackedMlpQGradient
from sb3_diffrl.lql.langevin import ChainDraws, LangevinSampler
from sb3_diffrl.lql.policies import LangevinPolicy
from sb3_diffrl.native import library


def make_critic(
    obs_dim: int = 4,
    action_dim: int = 3,
    net_arch: list[int] | None = None,
    n_critics: int = 2,
    n_levels: int = 5,
    activation_fn: type[nn.Module] = nn.Mish,
) -> LangevinCritic:
    space = spaces.Box(-1, 1, (obs_dim,))
    critic = LangevinCritic(
        space,
        spaces.Box(-1, 1, (action_dim,)),
        [16, 16] if net_arch is None else net_arch,
        FlattenExtractor(space),
        obs_dim,
        activation_fn,
        n_critics=n_critics,
        n_levels=n_levels,
    )
    for parameter in critic.parameters():  # biases start at zero: give them something to show
        nn.init.normal_(parameter, std=0.5)
    return critic


SIZES = pytest.mark.parametrize(
    ("net_arch", "n_critics", "n_levels", "action_dim", "batch"),
    [([8], 1, 1, 1, 1), ([16, 8, 32], 3, 10, 6, 33), ([24, 24, 24, 24], 2, 2, 17, 5), ([100, 37], 4, 3, 40, 130)],
)
ACTIVATIONS = pytest.mark.parametrize("activation_fn", [nn.Mish, nn.ReLU, nn.Tanh, nn.SiLU])


@ACTIVATIONS
@SIZES
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_hand_written_gradient_equals_autograd(
    dtype: th.dtype, activation_fn: type[nn.Module], net_arch: list[int], n_critics: int, n_levels: int, action_dim: int, batch: int
) -> None:
    critic = make_critic(5, action_dim, net_arch, n_critics, n_levels, activation_fn)
    features, actions = th.randn(batch, 5), th.rand(batch, action_dim) * 2 - 1
    plain, fast = AutogradQGradient(critic, features), StackedMlpQGradient(critic, features, dtype)
    # Back to an earlier level, too: what is kept for a level must not leak into another.
    for level in (*range(n_levels), 0):
        expected = plain(actions, level)
        result = fast(actions.to(dtype), level)
        assert result.dtype == dtype
        scale = expected.abs().max()
        th.testing.assert_close(result.to(th.float32), expected, atol=float(1e-5 * (1 + scale)), rtol=0)


def test_a_critic_without_hidden_layers_has_a_constant_gradient() -> None:
    critic = make_critic(5, 2, [], 3, n_levels=2)
    fast = StackedMlpQGradient(critic, th.randn(4, 5))
    layer = critic.layers[0]
    assert isinstance(layer, StackedLinear)
    expected = layer.weight[:, 5:7, 0].sum(0).detach()
    th.testing.assert_close(fast(th.rand(4, 2), 1), expected.expand(4, -1))
    assert not critic.can_compile


@ACTIVATIONS
@SIZES
def test_compiled_chain_equals_the_plain_one(
    activation_fn: type[nn.Module], net_arch: list[int], n_critics: int, n_levels: int, action_dim: int, batch: int
) -> None:
    critic = make_critic(5, action_dim, net_arch, n_critics, n_levels, activation_fn)
    features = th.randn(batch, 5)
    for normalize_grad in (False, True):
        # Short steps: a chain must not turn a rounding difference into another mode.
        sampler = LangevinSampler(n_levels, n_steps=3, step_size=1e-5, sigma_max=0.003, normalize_grad=normalize_grad)
        draws = sampler.draw(batch, action_dim)
        expected = sampler.sample(AutogradQGradient(critic, features), draws)
        actions = critic.sample(sampler, features, draws)
        assert (expected - draws.start).abs().mean() > 1e-4  # it moved
        th.testing.assert_close(actions, expected, atol=2e-5, rtol=0)


needs_bfloat16 = pytest.mark.skipif(not library.multiplies_bfloat16(), reason="the processor does not multiply bfloat16")
PRODUCTS = pytest.mark.parametrize("dtype", [th.float32, pytest.param(th.bfloat16, marks=needs_bfloat16)])


def rounded_gradient(critic: LangevinCritic, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Gradient of the critics' sum with what multiplies in the hidden layers rounded, in torch."""

    def rounded(x: th.Tensor) -> th.Tensor:
        return x.detach().bfloat16().float()

    layers = [layer for layer in critic.layers if isinstance(layer, StackedLinear)]
    z, slopes = layers[0](th.cat([features, actions], dim=1).expand(critic.n_critics, -1, -1)).detach(), []
    for layer in layers[1:]:
        z = z.requires_grad_()
        value = critic.activation(z)
        slopes.append(th.autograd.grad(value.sum(), z)[0])
        z = th.baddbmm(layer.bias, rounded(value), rounded(layer.weight)).detach()
    gradient = rounded(slopes[-1] * layers[-1].weight.transpose(1, 2))
    for layer, slope in zip(layers[-2:0:-1], slopes[-2::-1], strict=True):
        gradient = rounded((gradient @ rounded(layer.weight).transpose(1, 2)) * slope)
    from_action = layers[0].weight[:, critic.features_dim : critic.features_dim + critic.action_dim]
    return (gradient @ rounded(from_action).transpose(1, 2)).sum(0)


@needs_bfloat16
@ACTIVATIONS
@pytest.mark.parametrize(
    ("net_arch", "n_critics", "n_levels", "action_dim", "batch"),
    [([8], 1, 1, 1, 1), ([16, 8, 32], 3, 10, 6, 33), ([100, 37, 70], 3, 1, 20, 9), ([64, 64], 2, 1, 1, 1)],
)
def test_rounded_products_change_a_step_by_the_rounding(
    activation_fn: type[nn.Module], net_arch: list[int], n_critics: int, n_levels: int, action_dim: int, batch: int
) -> None:
    batch = 200 + batch
    critic = make_critic(5, action_dim, net_arch, n_critics, n_levels, activation_fn)
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.3)
    features, draws = th.randn(batch, 5), LangevinSampler(n_levels, n_steps=1).draw(batch, action_dim)
    sampler = LangevinSampler(n_levels, n_steps=1, inverse_temperature=1.0, normalize_grad=False)
    draws = ChainDraws(th.zeros_like(draws.start), th.zeros_like(draws.noise))
    exact, rounded = (critic.sample(sampler, features, draws, dtype) for dtype in (th.float32, th.bfloat16))
    if n_levels == 1:
        expected = (0.5 * sampler.step_size * rounded_gradient(critic, features, draws.start)).clip(-1, 1)
        assert (rounded - expected).norm() < 5e-3 * expected.norm()
    # bfloat16 has 8 significant bits; terms that cancel, and slopes of ReLU that jump, leave more of an error
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.2


@PRODUCTS
@ACTIVATIONS
def test_compiled_chain_does_not_depend_on_its_batch(activation_fn: type[nn.Module], dtype: th.dtype) -> None:
    critic = make_critic(5, 3, [41, 24], n_levels=4, activation_fn=activation_fn)
    features, sampler = th.randn(50, 5), LangevinSampler(4)
    draws = sampler.draw(50, 3)
    together = critic.sample(sampler, features, draws, dtype)
    for rows in ([0], [49], [3, 17], list(range(8, 21))):
        alone = critic.sample(sampler, features[rows], ChainDraws(draws.start[rows], draws.noise[:, :, rows]), dtype)
        assert th.equal(alone, together[rows])


def test_products_are_rounded_where_asked_for_and_where_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    space, box = spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,))

    def make(**kwargs: Any) -> LangevinPolicy:
        return LangevinPolicy(space, box, lambda _: 1e-3, net_arch=[64, 64], **kwargs)

    assert make().product_dtype == th.float32
    assert make(chain_dtype="bfloat16", backend="torch").product_dtype == th.float32
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: False)
    assert make(chain_dtype="bfloat16").product_dtype == th.float32
    with pytest.raises(ValueError, match="`chain_dtype` must be one of float32, bfloat16; got 'half'"):
        make(chain_dtype="half")


class Weighted(FlattenExtractor):
    """An extractor with weights."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__(space)
        self.scale = nn.Parameter(th.ones(()))


@needs_bfloat16
@pytest.mark.parametrize("extractor", [FlattenExtractor, Weighted])
def test_deterministic_actions_are_not_rounded(extractor: Any) -> None:
    space, box = spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,))
    policies = []
    for chain_dtype in ("float32", "bfloat16"):
        th.manual_seed(0)
        kwargs: Any = {"chain_dtype": chain_dtype, "features_extractor_class": extractor}
        policies.append(LangevinPolicy(space, box, lambda _: 1e-3, net_arch=[64, 64], **kwargs))
    obs = th.randn(30, 4)
    exact, rounded = (policy.deterministic_actions(obs) for policy in policies)
    assert th.equal(exact, rounded)
    draws = policies[0].sampler.draw(30, 2)
    exact, rounded = (policy.sample_actions(obs, draws) for policy in policies)
    assert not th.equal(exact, rounded)


@ACTIVATIONS
def test_gradients_are_finite_and_right_far_out(activation_fn: type[nn.Module]) -> None:
    critic = make_critic(1, 1, [32], n_critics=1, n_levels=1, activation_fn=activation_fn)
    # Pre-activations from -1000 to 1000
    features, actions = th.linspace(-1000, 1000, 101)[:, None], th.zeros(101, 1)
    expected = AutogradQGradient(critic, features)(actions, 0)
    th.testing.assert_close(StackedMlpQGradient(critic, features)(actions, 0), expected, atol=1e-4, rtol=1e-4)
    # One step without noise is the gradient times step_size / 2 * w = 0.01
    sampler = LangevinSampler(1, n_steps=1, step_size=0.02, inverse_temperature=1.0, normalize_grad=False)
    step = critic.sample(sampler, features, ChainDraws(actions, th.zeros(1, 1, 101, 1)))
    th.testing.assert_close(step, (0.01 * expected).clip(-1, 1), atol=1e-6, rtol=1e-4)


def test_compiled_chain_lets_nan_through() -> None:
    critic, sampler = make_critic(n_levels=2), LangevinSampler(2)
    features = th.zeros(3, 4)
    features[1] = th.nan
    actions = critic.sample(sampler, features, sampler.draw(3, 3))
    assert actions.isnan().any(dim=1).tolist() == [False, True, False]


def test_whole_chains_agree() -> None:
    critic = make_critic(17, 6, [64, 64, 64], n_levels=10)
    features, sampler = th.randn(256, 17), LangevinSampler()
    draws = sampler.draw(256, 6)
    plain = sampler.sample(AutogradQGradient(critic, features), draws)
    for fast in (sampler.sample(StackedMlpQGradient(critic, features), draws), critic.sample(sampler, features, draws)):
        # A chain may turn a rounding difference into another mode; nearly all must not.
        assert ((fast - plain).abs().amax(dim=1) < 1e-3).float().mean() > 0.98


@ACTIVATIONS
@SIZES
@pytest.mark.parametrize("features_learn", [False, True])
def test_compiled_values_and_gradients_equal_autograd(
    features_learn: bool,
    activation_fn: type[nn.Module],
    net_arch: list[int],
    n_critics: int,
    n_levels: int,
    action_dim: int,
    batch: int,
) -> None:
    critic = make_critic(5, action_dim, net_arch, n_critics, n_levels, activation_fn)
    features = th.randn(batch, 5, requires_grad=features_learn)
    actions, levels = th.rand(batch, action_dim) * 2 - 1, th.randint(n_levels, (batch,))
    targets = th.randn(n_critics, batch)
    results = []
    for compiled in (False, True):
        critic.use_native = compiled
        assert critic.compiled == compiled
        q_values = critic.q_values(features, actions, levels)
        sources = [*critic.parameters(), *([features] if features_learn else [])]
        gradients = th.autograd.grad((q_values - targets).square().mean(), sources)
        results.append((q_values.detach(), gradients))
    (expected, expected_gradients), (q_values, gradients) = results
    th.testing.assert_close(q_values, expected, atol=1e-4, rtol=1e-5)
    for mine, others in zip(gradients, expected_gradients, strict=True):
        th.testing.assert_close(mine, others, atol=float(2e-5 * (1 + others.abs().max())), rtol=1e-4)


def test_compiled_values_can_be_differentiated_twice_at_once() -> None:
    """Two graphs at a time keep their own activations."""
    critic = make_critic(n_levels=1)
    critic.use_native = True
    batches = [(th.randn(7, 4), th.rand(7, 3)) for _ in range(2)]
    losses = [critic.q_values(*batch).square().sum() for batch in batches]
    together = th.autograd.grad(losses[0] + losses[1], list(critic.parameters()))
    alone = [th.autograd.grad(critic.q_values(*batch).square().sum(), list(critic.parameters())) for batch in batches]
    for total, first, second in zip(together, *alone, strict=True):
        th.testing.assert_close(total, first + second)


class LayerNormCritic(LangevinCritic):
    """A user's own critic."""

    def q_values(self, features: th.Tensor, actions: th.Tensor, levels: th.Tensor | int | None = None) -> th.Tensor:
        return super().q_values(nn.functional.layer_norm(features, features.shape[1:]), actions, levels)


def make_policy(policy_class: type[LangevinPolicy] = LangevinPolicy, **kwargs: Any) -> LangevinPolicy:
    return policy_class(spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,)), lambda _: 1e-3, [8], sampler=LangevinSampler(2), **kwargs)


class LayerNormPolicy(LangevinPolicy):
    critic_class = LayerNormCritic


def test_the_fastest_backend_that_is_right_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_policy(LayerNormPolicy).chain_backend == "autograd"
    assert make_policy(activation_fn=nn.ELU).chain_backend == "autograd"
    assert make_policy().chain_backend == "native"
    assert make_policy().double().chain_backend == "torch"
    for backend in ("native", "torch", "autograd"):
        assert make_policy(backend=backend).chain_backend == backend
    with pytest.raises(RuntimeError, match="cannot compute this critic"):
        _ = make_policy(LayerNormPolicy, backend="native").chain_backend
    with pytest.raises(ValueError, match="must be one of auto, native"):
        make_policy(backend="fast")


def test_without_a_compiler_chains_run_in_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load.cache_clear()
    try:
        policy = make_policy()
        assert policy.chain_backend == "torch"
        actions, _ = policy.predict(np.zeros((3, 4), np.float32), deterministic=True)
    finally:
        library.load.cache_clear()
    monkeypatch.undo()
    np.testing.assert_allclose(policy.predict(np.zeros((3, 4), np.float32), deterministic=True)[0], actions, atol=1e-4)


def test_a_failing_compiler_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert library.load() is None
    finally:
        library.load.cache_clear()
    assert "`false` failed" in caplog.text
    assert list((tmp_path / "sb3_diffrl").iterdir()) == []  # nothing half-made is left


def test_autograd_gradient_works_where_sb3_predicts() -> None:
    critic = make_critic()
    with th.no_grad():
        gradient = AutogradQGradient(critic, th.randn(2, 4))(th.zeros(2, 3), 0)
    assert gradient.abs().min() > 0
    assert not gradient.requires_grad


def test_critics_are_independent() -> None:
    critic = make_critic(n_critics=2)
    features, actions = th.randn(3, 4), th.randn(3, 3)
    before = critic.q_values(features, actions)
    with th.no_grad():
        for parameter in critic.parameters():
            parameter[1] += 1.0
    after = critic.q_values(features, actions)
    th.testing.assert_close(before[0], after[0])
    assert not th.allclose(before[1], after[1])


def test_weights_start_within_two_sigma() -> None:
    critic = make_critic(net_arch=[64])
    fresh = type(critic)(critic.observation_space, critic.action_space, [64, 64], critic.features_extractor, 4, n_levels=3)  # type: ignore[arg-type]
    for layer in fresh.layers:
        assert isinstance(layer, StackedLinear)
        weight, bias = layer.weight.detach(), layer.bias
        sigma = weight.shape[1] ** -0.5
        assert weight.abs().max() <= 2 * sigma
        if weight.numel() > 1000:
            # A normal cut at two sigma has 0.88 of its standard deviation.
            assert float(weight.std()) == pytest.approx(0.88 * sigma, rel=0.05)
        assert not bias.any()
    names = [name for name, _ in fresh.named_parameters()]
    assert list(itertools.chain(fresh.state_dict())) == names  # weights alone: SB3 expects no other entries


def test_fast_mish_is_twice_differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALL", 0)
    z = th.linspace(-8, 30, 200, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(Mish(), z)
    assert th.autograd.gradgradcheck(Mish(), z)
    th.testing.assert_close(Mish()(z), nn.functional.mish(z))


@pytest.mark.skipif(library.load() is None, reason="no C compiler")
def test_values_are_the_same_whether_gradients_follow_or_not() -> None:
    critic = make_critic(5, 3, [100, 37, 70], n_critics=3)
    critic.use_native = True
    features, actions = th.randn(130, 5), th.rand(130, 3)
    assert critic.compiled
    with th.no_grad():
        alone = critic.q_values(features, actions, 2)
    assert th.equal(alone, critic.q_values(features, actions, 2))


def test_an_embedding_of_ones_own_is_used_for_any_number_of_rows() -> None:
    class Embedding(nn.Module):
        def forward(self, levels: th.Tensor) -> th.Tensor:
            return levels[None, :, None].expand(2, -1, 16) / 10

    critic = make_critic(5, 2, [8], 2, 3)
    critic.level_embedding = Embedding()  # type: ignore[assignment]
    features, actions, levels = th.randn(200, 5), th.rand(200, 2), th.randint(3, (200,))
    results = []
    for critic.use_native in (False, True):
        results.append(critic.q_values(features, actions, levels))
    th.testing.assert_close(*results)
