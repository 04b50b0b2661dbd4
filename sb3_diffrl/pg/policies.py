"""The prior over the planner's noise, its latent critic, and the policy that plans by them."""

import math
from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_diffrl.common import check_count
from sb3_diffrl.diffusion.process import PredictionType
from sb3_diffrl.planner.guidance import Guidance, GuidanceName, TrainedGuidance
from sb3_diffrl.planner.policies import CriticName, HorizonCritic, PlannerPolicy
from sb3_diffrl.timesteps.samplers import TimestepSampler

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
# Bound of the squashed latent.
SQUASH = 2.0


class GaussianPrior(nn.Module):
    """A Gaussian over the planner's whole noise, given the present state: a GRU that is told the state at its first step.

    It begins as N(0, I), which is what the planner was trained on.

    :param obs_dim: size of a state
    :param latent_shape: (horizon - 1, size of a latent step)
    :param width: size of the GRU
    """

    def __init__(self, obs_dim: int, latent_shape: tuple[int, int], width: int = 256) -> None:
        super().__init__()
        self.n_steps, dim = latent_shape
        self.embedding = nn.Sequential(nn.Linear(obs_dim, width), nn.LayerNorm(width), nn.ReLU())
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 2 * dim))
        nn.init.zeros_(self.head[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]

    def forward(self, state: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Mean and logarithm of the standard deviation, both ``(batch, horizon - 1, dim)``.

        :param state: standardised, ``(batch, obs_dim)``
        """
        # (batch, width) -> (batch, horizon - 1, width), zeros after the first
        inputs = nn.functional.pad(self.embedding(state)[:, None], (0, 0, 0, self.n_steps - 1))
        mean, log_std = self.head(self.gru(inputs)[0]).chunk(2, dim=2)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def gaussian_kl(mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of each entry, of the shape of ``mean``."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std


def squash(u: th.Tensor) -> th.Tensor:
    """``2 tanh(u)``"""
    return SQUASH * th.tanh(u)


def squashed_kl(u: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """One sample's estimate of the KL divergence of N(0, 1) from the law of ``2 tanh(u)``, of the shape of ``u``.

    :param u: a sample of N(mean, std^2), with the gradient of both
    """
    log_density = -0.5 * ((u - mean) / log_std.exp()).square() - log_std
    # log |d squash / du| = log 2 + log(1 - tanh(u)^2), in the form that does not cancel
    log_slope = math.log(SQUASH) + 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return log_density - log_slope + 0.5 * squash(u).square()


class PriorGuidance:
    """The plan of the prior's mean or sample: one run of the planner (PG, 2505.10881)."""

    def __call__(self, policy: PlannerPolicy, state: th.Tensor, deterministic: bool) -> th.Tensor:
        """See ``Guidance``."""
        assert isinstance(policy, PGPolicy)
        noise = policy.draw_latent(len(state), deterministic)
        return policy.denoise(policy.prior_latent(policy.prior_target, state, noise), state)


class PGPolicy(PlannerPolicy):
    """A ``PlannerPolicy`` whose noise comes from a prior that is learnt; the arguments that are not said here are that one's.

    :param observation_space: observation space, as in the dataset
    :param action_space: bounded Box
    :param lr_schedule: learning rate as a function of the remaining progress (1 to 0)
    :param prior_width: size of the prior's GRU, ``d_model`` if ``None``
    :param guidance: ``"pg"``, or another that plans are chosen by
    :param squash: bound the latent: z = 2 tanh(u) with u from the prior
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        d_model: int = 256,
        depth: int = 2,
        critic_depth: int = 2,
        head_dim: int = 64,
        time_embedding_dim: int = 128,
        net_arch: Sequence[int] = (256, 256, 256),
        activation_fn: type[nn.Module] = nn.Mish,
        prior_width: int | None = None,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        horizon: int = 4,
        num_inference_steps: int = 20,
        num_action_steps: int = 10,
        temperature: float = 0.5,
        ema_decay: float = 0.9999,
        critic: CriticName = "horizon",
        guidance: GuidanceName = "pg",
        train_for: Sequence[TrainedGuidance] = (),
        n_candidates: int = 50,
        cg_scale: float = 10.0,
        cfg_scale: float = 2.0,
        cfg_target: float = 1.0,
        timestep_sampler: str | TimestepSampler = "uniform",
        clip_sample: float | None = None,
        prediction_type: PredictionType = "epsilon",
        relative: bool = False,
        squash: bool = True,
    ) -> None:
        self.prior_width = check_count("prior_width", d_model if prior_width is None else prior_width)
        self.squash = squash
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            d_model,
            depth,
            critic_depth,
            head_dim,
            time_embedding_dim,
            net_arch,
            activation_fn,
            optimizer_class,
            optimizer_kwargs,
            horizon,
            num_inference_steps,
            num_action_steps,
            temperature,
            ema_decay,
            critic,
            guidance,
            train_for,
            n_candidates,
            cg_scale,
            cfg_scale,
            cfg_target,
            timestep_sampler,
            clip_sample,
            prediction_type,
            relative,
        )
        self.prior, self.prior_target = (GaussianPrior(self.obs_dim, self.latent_shape, self.prior_width) for _ in range(2))
        sizes = (self.obs_dim, horizon, d_model, critic_depth, head_dim)
        self.latent_critic, self.latent_critic_target = HorizonCritic(*sizes), HorizonCritic(*sizes)
        for network, target in ((self.prior, self.prior_target), (self.latent_critic, self.latent_critic_target)):
            target.load_state_dict(network.state_dict())
            target.requires_grad_(False)
        self.prior_optimizer = self.make_optimizer([*self.prior.parameters(), *self.latent_critic.parameters()])

    def _make_guidances(self) -> dict[str, Guidance]:
        return {"pg": PriorGuidance(), **super()._make_guidances()}

    def prior_latent(self, prior: nn.Module, state: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """The latent that a prior makes of standard normal noise, ``(batch, horizon - 1, free_dim)``.

        :param prior: ``self.prior`` or ``self.prior_target``
        :param state: standardised, ``(batch, obs_dim)``
        :param noise: zeros for the prior's mean, of the latent's shape
        """
        mean, log_std = prior(state)
        return self.squash_latent(mean + log_std.exp() * noise)

    def squash_latent(self, u: th.Tensor) -> th.Tensor:
        """``2 tanh(u)``, or ``u`` if the policy does not squash."""
        return squash(u) if self.squash else u

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "prior_width": self.prior_width, "squash": self.squash}


MlpPolicy = PGPolicy
