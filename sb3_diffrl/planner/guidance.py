"""Ways to get a plan of high value out of a trajectory diffusion model, each a small class.

A guidance is called as ``guidance(policy, state, deterministic)`` with standardised observations ``(batch, obs_dim)`` and gives
standardised plans ``(batch, horizon, obs_dim)``. Deterministic plans are those of the mean latent, or of fixed candidates.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import torch as th
from torch.func import functional_call

if TYPE_CHECKING:
    from sb3_diffrl.planner.policies import PlannerPolicy

GuidanceName = Literal["none", "mcss", "cg", "cfg", "pg"]
#: Those that a planner must be trained for.
TrainedGuidance = Literal["cg", "cfg"]

# Seeds the candidates of deterministic plans: part of the policy's definition, so it never changes.
DETERMINISTIC_SEED = 0


class Guidance(Protocol):
    """How a plan is chosen."""

    def __call__(self, policy: "PlannerPolicy", state: th.Tensor, deterministic: bool) -> th.Tensor:
        """Plans ``(batch, horizon, obs_dim)`` from states ``(batch, obs_dim)``, both standardised."""


class NoGuidance:
    """One sample of the model, as the data would go on."""

    def __call__(self, policy: "PlannerPolicy", state: th.Tensor, deterministic: bool) -> th.Tensor:
        """See ``Guidance``."""
        return policy.denoise(policy.draw_latent(len(state), deterministic), state)


class CandidateSelection:
    """Monte Carlo sample selection: the best of several samples, by the critic (Diffusion Veteran, 2503.00535)."""

    def __call__(self, policy: "PlannerPolicy", state: th.Tensor, deterministic: bool) -> th.Tensor:
        """See ``Guidance``."""
        n, batch_size = policy.n_candidates, len(state)
        if deterministic:
            latent = th.randn(1, n, *policy.latent_shape, generator=th.Generator().manual_seed(DETERMINISTIC_SEED))
            latent = latent.to(state.device).expand(batch_size, -1, -1, -1)
        else:
            latent = th.randn(batch_size, n, *policy.latent_shape, device=state.device)
        # (batch, n, horizon - 1, free_dim) -> (batch * n, horizon - 1, free_dim)
        plans = policy.denoise(latent.flatten(0, 1), state.repeat_interleave(n, dim=0))
        best = policy.value(plans).view(batch_size, n).argmax(dim=1)
        # (batch * n, horizon, obs_dim) -> (batch, n, horizon, obs_dim) -> (batch, horizon, obs_dim)
        best_plans: th.Tensor = plans.view(batch_size, n, *plans.shape[1:])[th.arange(batch_size, device=state.device), best]
        return best_plans


class ClassifierGuidance:
    """Samples of p(plan) exp(scale * value), by the gradient of a value predictor on noisy plans (Diffuser, 2205.09991)."""

    def __call__(self, policy: "PlannerPolicy", state: th.Tensor, deterministic: bool) -> th.Tensor:
        """See ``Guidance``."""
        predictor = policy.noisy_critic
        assert predictor is not None
        # No gradient of theirs is wanted.
        weights = {name: weight.detach() for name, weight in predictor.named_parameters()}

        def gradient(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
            with th.enable_grad():
                x = x_t.detach().requires_grad_()
                value = functional_call(predictor, weights, (x, policy.planner.process.schedule.network_time(t))).sum()
            return policy.cg_scale * th.autograd.grad(value, x)[0]

        return policy.denoise(policy.draw_latent(len(state), deterministic), state, guidance=gradient)


class ClassifierFreeGuidance:
    """Conditioned on a value, and extrapolated away from the unconditioned model (Decision Diffuser, 2211.15657)."""

    def __call__(self, policy: "PlannerPolicy", state: th.Tensor, deterministic: bool) -> th.Tensor:
        """See ``Guidance``."""
        target = th.full((1, 1), policy.cfg_target, device=state.device)
        conditioned = policy.planner.averaged_steps(policy.num_inference_steps, target)
        free = policy.planner.averaged_steps(policy.num_inference_steps)

        def at(i: int) -> Callable[[th.Tensor], th.Tensor]:
            return lambda x_t: th.lerp(free[i](x_t), conditioned[i](x_t), policy.cfg_scale)

        denoise = [at(i) for i in range(policy.num_inference_steps)]
        return policy.denoise(policy.draw_latent(len(state), deterministic), state, denoise=denoise)
