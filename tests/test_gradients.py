"""The hand-written gradient of the critics against automatic differentiation."""

import itertools

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_diffrl.lql import gradients
from sb3_diffrl.lql.activations import Mish
from sb3_diffrl.lql.critic import LangevinCritic, StackedLinear
from sb3_diffrl.lql.gradients import AutogradQGradient, StackedMlpQGradient, has_fast_gradient, make_q_gradient
from sb3_diffrl.lql.langevin import LangevinSampler


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


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("activation_fn", [nn.Mish, nn.ReLU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize(
    ("net_arch", "n_critics", "n_levels", "action_dim", "batch"),
    [([], 2, 3, 2, 4), ([8], 1, 1, 1, 1), ([16, 8, 32], 3, 10, 6, 33), ([24, 24, 24, 24], 2, 2, 17, 5)],
)
def test_hand_written_gradient_equals_autograd(
    backend: str,
    activation_fn: type[nn.Module],
    net_arch: list[int],
    n_critics: int,
    n_levels: int,
    action_dim: int,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "SMALL", 10**9 if backend == "numpy" else -1)
    critic = make_critic(5, action_dim, net_arch, n_critics, n_levels, activation_fn)
    features, actions = th.randn(batch, 5), th.rand(batch, action_dim) * 2 - 1
    plain = AutogradQGradient(critic, features)
    for dtype, tolerance in ((th.float32, 1e-5), (th.float64, 1e-5)):
        fast = StackedMlpQGradient(critic, features, dtype)
        assert fast.xp.__name__ == backend
        # Back to an earlier level, too: what is kept for a level must not leak into another.
        for level in (*range(n_levels), 0):
            expected = plain(actions, level)
            result = th.as_tensor(fast(fast.array(actions.to(dtype)), level))
            assert result.dtype == dtype
            scale = expected.abs().max()
            th.testing.assert_close(result.to(th.float32), expected, atol=float(tolerance * (1 + scale)), rtol=0)


@pytest.mark.parametrize("activation_fn", [nn.Mish, nn.ReLU, nn.Tanh, nn.SiLU])
def test_hand_written_gradient_is_finite_and_right_far_out(activation_fn: type[nn.Module]) -> None:
    critic = make_critic(1, 1, [32], n_critics=1, n_levels=1, activation_fn=activation_fn)
    # Pre-activations from -1000 to 1000
    features = th.linspace(-1000, 1000, 101)[:, None]
    actions = th.zeros(101, 1)
    fast = StackedMlpQGradient(critic, features)
    result = th.as_tensor(fast(fast.array(actions), 0))
    th.testing.assert_close(result, AutogradQGradient(critic, features)(actions, 0), atol=1e-4, rtol=1e-4)


def test_whole_chains_agree() -> None:
    critic = make_critic(17, 6, [64, 64, 64], n_levels=10)
    features, sampler = th.randn(256, 17), LangevinSampler()
    draws = sampler.draw(256, 6)
    fast = sampler.sample(make_q_gradient(critic, features), draws)
    plain = sampler.sample(AutogradQGradient(critic, features), draws)
    # A chain may turn a rounding difference into another mode; nearly all must not.
    assert ((fast - plain).abs().amax(dim=1) < 1e-3).float().mean() > 0.98


class LayerNormCritic(LangevinCritic):
    """A user's own critic."""

    def q_values(self, features: th.Tensor, actions: th.Tensor, levels: th.Tensor | int | None = None) -> th.Tensor:
        return super().q_values(nn.functional.layer_norm(features, features.shape[1:]), actions, levels)


def test_a_subclass_or_unknown_activation_takes_the_automatic_gradient() -> None:
    space, action_space = spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,))
    own = LayerNormCritic(space, action_space, [8], FlattenExtractor(space), 4, n_levels=2)
    for critic in (own, make_critic(activation_fn=nn.ELU)):
        assert not has_fast_gradient(critic)
        assert isinstance(make_q_gradient(critic, th.randn(3, 4)), AutogradQGradient)
    assert has_fast_gradient(make_critic())


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


def test_fast_mish_is_twice_differentiable() -> None:
    z = th.linspace(-8, 30, 200, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(Mish(), z)
    assert th.autograd.gradgradcheck(Mish(), z)
    th.testing.assert_close(Mish()(z), nn.functional.mish(z))
