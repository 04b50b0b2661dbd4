"""The planner's networks: trajectory diffusion, inverse dynamics and critics."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffrl.common import check_count, check_number
from sb3_diffrl.diffusion.denoisers import DiT1d, MlpDenoiser
from sb3_diffrl.diffusion.embeddings import FourierEmbedding, TimeEmbedding
from sb3_diffrl.diffusion.model import DiffusionModel
from sb3_diffrl.diffusion.process import DenoiseSteps, DiffusionProcess, Fixed, PredictionType
from sb3_diffrl.diffusion.process import Guidance as ScoreGuidance
from sb3_diffrl.diffusion.schedules import make_schedule
from sb3_diffrl.diffusion.transformer import Transformer1d
from sb3_diffrl.offline.policies import OfflinePolicy
from sb3_diffrl.planner.guidance import (
    CandidateSelection,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Guidance,
    GuidanceName,
    NoGuidance,
    TrainedGuidance,
)
from sb3_diffrl.timesteps.factory import make_timestep_sampler
from sb3_diffrl.timesteps.mixin import TimestepSamplerMixin
from sb3_diffrl.timesteps.samplers import TimestepSampler

CriticName = Literal["horizon", "td"]

# Displacements of a smaller standard deviation, in those of the observations, do not set a unit.
MIN_DISPLACEMENT = 1e-3
# Noise levels that the inverse dynamics is trained at.
ACTION_TIMESTEPS = 50


class HorizonCritic(nn.Module):
    """The value of a plan, read at its first state, ``(batch, horizon, obs_dim) -> (batch,)`` (Diffusion Veteran, 2503.00535).

    :param obs_dim: size of a state
    :param horizon: states of a plan
    :param d_model: width
    :param depth: number of blocks
    :param head_dim: size of an attention head
    """

    def __init__(self, obs_dim: int, horizon: int, d_model: int, depth: int, head_dim: int) -> None:
        super().__init__()
        self.transformer = Transformer1d(obs_dim, 1, horizon, d_model=d_model, depth=depth, head_dim=head_dim)

    def forward(self, plan: th.Tensor) -> th.Tensor:
        """``(batch, horizon, obs_dim) -> (batch,)``"""
        output: th.Tensor = self.transformer(plan, steps=slice(1))
        return output[:, 0, 0]


class NoisyCritic(nn.Module):
    """The expected value of a noisy plan (Diffuser, 2205.09991, section 3.2); arguments as ``HorizonCritic``."""

    def __init__(self, obs_dim: int, horizon: int, d_model: int, depth: int, head_dim: int, time_embedding_dim: int) -> None:
        super().__init__()
        dim = time_embedding_dim
        self.time_embedding = TimeEmbedding(FourierEmbedding(dim), dim, d_model, d_model, nn.SiLU)
        self.transformer = Transformer1d(
            obs_dim, 1, horizon, condition_dim=d_model, d_model=d_model, depth=depth, head_dim=head_dim
        )

    def forward(self, x_t: th.Tensor, time: th.Tensor) -> th.Tensor:
        """``(batch, horizon, obs_dim)``, network times ``(batch,)`` ``-> (batch,)``"""
        output: th.Tensor = self.transformer(x_t, self.time_embedding(time), steps=slice(1))
        return output[:, 0, 0]


class StateValue(nn.Module):
    """V(s), whose mean over a plan's states to come is the plan's value; arguments as ``create_mlp``'s.

    :param obs_dim: size of a state
    :param width: of its two hidden layers
    """

    def __init__(self, obs_dim: int, width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, width),
            nn.LayerNorm(width),
            nn.Mish(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.Mish(),
            nn.Linear(width, 1),
        )

    def states(self, states: th.Tensor) -> th.Tensor:
        """``(..., obs_dim) -> (...)``"""
        output: th.Tensor = self.net(states)
        return output[..., 0]

    def forward(self, plan: th.Tensor) -> th.Tensor:
        """``(batch, horizon, obs_dim) -> (batch,)``"""
        return self.states(plan[:, 1:]).mean(dim=1)


class PlannerPolicy(TimestepSamplerMixin, OfflinePolicy):
    """Plans the states to come by diffusion, and acts so that the second of them is reached.

    The sampler's settings may be changed on a trained policy: ``model.num_inference_steps = 10``, likewise
    ``num_action_steps``, ``temperature``, ``n_candidates``, ``cg_scale``, ``cfg_scale``, ``cfg_target`` and ``guidance``.

    :param observation_space: observation space, as in the dataset
    :param action_space: bounded Box
    :param lr_schedule: learning rate as a function of the remaining progress (1 to 0)
    :param d_model: width of the transformers
    :param depth: blocks of the planner
    :param critic_depth: blocks of the critics
    :param head_dim: size of an attention head
    :param time_embedding_dim: size of the planner's time encoding
    :param net_arch: hidden layers of the inverse dynamics
    :param activation_fn: activation of the inverse dynamics
    :param optimizer_class: optimiser
    :param optimizer_kwargs: its keyword arguments, without the learning rate
    :param horizon: states of a plan, the present one included
    :param num_inference_steps: denoising steps of a plan
    :param num_action_steps: denoising steps of an action
    :param temperature: standard deviation of the noise that actions start from
    :param ema_decay: decay of the moving averages of the weights, which act
    :param critic: ``"horizon"`` or ``"td"``
    :param guidance: ``"none"``, ``"mcss"``, ``"cg"`` or ``"cfg"``
    :param train_for: which of ``"cg"`` and ``"cfg"`` to make networks for
    :param n_candidates: candidates of ``"mcss"``
    :param cg_scale: weight of the value's gradient in ``"cg"``
    :param cfg_scale: weight of the conditioned model in ``"cfg"``: 1 conditions, more extrapolates
    :param cfg_target: scaled value, in [-1, 1], that ``"cfg"`` asks for
    :param timestep_sampler: which times the planner and the inverse dynamics are trained on: a name or an object; each has its own
    :param clip_sample: bound of what is denoised, see ``DiffusionPlanner``
    :param prediction_type: what the denoiser of plans predicts, see ``DiffusionPlanner``
    :param relative: denoise displacements, see ``DiffusionPlanner``
    """

    fixed_mask: th.Tensor
    plan_scale: th.Tensor
    value_center: th.Tensor
    value_scale: th.Tensor

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
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        horizon: int = 4,
        num_inference_steps: int = 20,
        num_action_steps: int = 10,
        temperature: float = 0.5,
        ema_decay: float = 0.9999,
        critic: CriticName = "horizon",
        guidance: GuidanceName = "none",
        train_for: Sequence[TrainedGuidance] = (),
        n_candidates: int = 50,
        cg_scale: float = 10.0,
        cfg_scale: float = 2.0,
        cfg_target: float = 1.0,
        timestep_sampler: str | TimestepSampler = "uniform",
        clip_sample: float | None = None,
        prediction_type: PredictionType = "epsilon",
        relative: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, optimizer_class, optimizer_kwargs)
        self.d_model, self.depth, self.critic_depth, self.head_dim = d_model, depth, critic_depth, head_dim
        self.time_embedding_dim, self.net_arch, self.activation_fn = time_embedding_dim, net_arch, activation_fn
        self.horizon, self.ema_decay, self.critic_name, self.train_for = horizon, ema_decay, critic, tuple(train_for)
        self.num_inference_steps = check_count("num_inference_steps", num_inference_steps)
        self.num_action_steps = check_count("num_action_steps", num_action_steps)
        self.n_candidates = check_count("n_candidates", n_candidates)
        self.temperature = check_number("temperature", temperature, 0)
        self.cg_scale, self.cfg_scale = check_number("cg_scale", cg_scale), check_number("cfg_scale", cfg_scale)
        self.cfg_target = check_number("cfg_target", cfg_target, -1, 1)
        #: Entries of an observation that a plan changes; a goal stays.
        self.free_dim = self.obs_dim - self.flatten.goal_dim
        self.latent_shape = (horizon - 1, self.free_dim)
        self.clip_sample, self.prediction_type, self.relative = clip_sample, prediction_type, relative
        #: Entries of a step of what is denoised; a displacement says nothing of walls without the state that it is from.
        self.encoded_dim = self.obs_dim + (self.free_dim if relative else 0)
        self._make_networks()
        self._guidances = self._make_guidances()
        self.guidance = guidance
        self.optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        self._setup_timestep_sampler(timestep_sampler, self.planner.process, (horizon, self.encoded_dim))
        self.action_timestep_sampler = make_timestep_sampler(
            copy.deepcopy(timestep_sampler), self.inverse_dynamics.process, (self.action_dim,)
        )

    def _make_networks(self) -> None:
        fixed_mask = th.ones(self.horizon, self.encoded_dim, dtype=th.bool)
        fixed_mask[1:, : self.free_dim] = False
        self.register_buffer("fixed_mask", fixed_mask, persistent=False)
        self.register_buffer("plan_scale", th.ones(self.horizon, self.obs_dim))
        self.register_buffer("value_center", th.zeros(()))
        self.register_buffer("value_scale", th.ones(()))
        sizes = (self.d_model, self.critic_depth, self.head_dim)
        self.planner = DiffusionModel(
            DiT1d(
                self.encoded_dim,
                self.horizon,
                int("cfg" in self.train_for),
                self.d_model,
                self.depth,
                self.head_dim,
                self.time_embedding_dim,
                n_given=1,
            ),
            DiffusionProcess(make_schedule("vp", 0), self.prediction_type, self.clip_sample),
            self.ema_decay,
        )
        action_process = DiffusionProcess(make_schedule("squaredcos_cap_v2", ACTION_TIMESTEPS), clip_sample=1.0)
        if self.num_action_steps > ACTION_TIMESTEPS:
            raise ValueError(f"`num_action_steps` must be at most {ACTION_TIMESTEPS}, got {self.num_action_steps}.")
        denoiser = MlpDenoiser(self.action_dim, 2 * self.free_dim, self.net_arch, self.activation_fn)
        self.inverse_dynamics = DiffusionModel(denoiser, action_process, self.ema_decay)
        if self.critic_name not in get_args(CriticName):
            raise ValueError(f"Unknown `critic` {self.critic_name!r}, choose 'horizon' or 'td'.")
        self.critic: HorizonCritic | StateValue
        self.critic_target: StateValue | None = None
        if self.critic_name == "horizon":
            self.critic = HorizonCritic(self.obs_dim, self.horizon, *sizes)
        else:
            self.critic, self.critic_target = StateValue(self.obs_dim), StateValue(self.obs_dim)
            self.critic_target.load_state_dict(self.critic.state_dict())
            self.critic_target.requires_grad_(False)
        self.noisy_critic = (
            NoisyCritic(self.encoded_dim, self.horizon, *sizes, self.time_embedding_dim) if "cg" in self.train_for else None
        )

    # ------------------------------------------------------------------ guidance

    def _make_guidances(self) -> dict[str, Guidance]:
        guidances: dict[str, Guidance] = {"none": NoGuidance(), "mcss": CandidateSelection()}
        if "cg" in self.train_for:
            guidances["cg"] = ClassifierGuidance()
        if "cfg" in self.train_for:
            guidances["cfg"] = ClassifierFreeGuidance()
        return guidances

    @property
    def guidance(self) -> str:
        """How plans are chosen; may be changed to any for which the model is trained.

        :raises ValueError: if there is no such guidance, or the model is not trained for it
        """
        return self._guidance

    @guidance.setter
    def guidance(self, name: str) -> None:
        if name not in get_args(GuidanceName):
            raise ValueError(f"Unknown `guidance` {name!r}, choose {', '.join(map(repr, get_args(GuidanceName)))}.")
        if name not in self._guidances:
            remedy = "use the class `PG`" if name == "pg" else f"make one with guidance={name!r} or train_for=({name!r},)"
            raise ValueError(
                f"This model is not trained for the guidance {name!r}, but for {', '.join(map(repr, self._guidances))}: {remedy}."
            )
        self._guidance = name

    # ------------------------------------------------------------------ what is denoised

    def fit_plan_scale(self, windows: th.Tensor) -> None:
        """Take the standard deviation of the displacement at each step from windows.

        :param windows: standardised, ``(n, horizon, obs_dim)``
        """
        std = (windows - windows[:, :1]).std(dim=0, correction=0)
        # What never moves keeps its unit
        self.plan_scale.copy_(th.where(self._is_given | (std < MIN_DISPLACEMENT), 1.0, std))

    @property
    def _is_given(self) -> th.Tensor:
        # Which entries of a plan are known: (horizon, obs_dim)
        return self.fixed_mask[:, : self.obs_dim]

    def encode(self, plan: th.Tensor) -> th.Tensor:
        """What is denoised: with ``relative``, displacements from the present state in their own standard deviations, and beside
        each the present state itself.

        :param plan: standardised, ``(batch, horizon, obs_dim)``
        :return: ``(batch, horizon, encoded_dim)``; the present state and the goal are as they were
        """
        if not self.relative:
            return plan
        displacements = th.where(self._is_given, plan, (plan - plan[:, :1]) / self.plan_scale)
        return self._beside_present(displacements, plan[:, 0])

    def decode(self, encoded: th.Tensor) -> th.Tensor:
        """The plan, standardised, that ``encode()`` makes ``encoded`` of."""
        if not self.relative:
            return encoded
        encoded = encoded[..., : self.obs_dim]
        return th.where(self._is_given, encoded, encoded * self.plan_scale + encoded[:, :1])

    def _beside_present(self, steps: th.Tensor, state: th.Tensor) -> th.Tensor:
        # (batch, horizon, obs_dim), (batch, obs_dim) -> (batch, horizon, encoded_dim)
        if not self.relative:
            return steps
        return th.cat([steps, state[:, None, : self.free_dim].expand(-1, self.horizon, -1)], dim=2)

    # ------------------------------------------------------------------ losses

    def planner_loss(
        self, windows: th.Tensor, t: th.Tensor, noise: th.Tensor, cond: th.Tensor | None = None, cond_mask: th.Tensor | None = None
    ) -> th.Tensor:
        """Denoising loss of plans, whose first state stays clean, ``(batch,)``.

        :param windows: encoded, ``(batch, horizon, encoded_dim)``
        :param t: diffusion times, ``(batch,)``
        :param noise: standard normal, of the shape of ``windows``
        :param cond: scaled values, ``(batch, 1)``, if the model is trained for ``"cfg"``
        :param cond_mask: ``(batch,)``, false in the rows that learn without
        """
        return self.planner.loss(windows, cond, t, noise, self.fixed_mask, cond_mask)

    def inverse_dynamics_loss(self, windows: th.Tensor, actions: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """Denoising loss of the first action, given the first two states, ``(batch,)``.

        :param windows: standardised, ``(batch, horizon, obs_dim)``
        :param actions: in the scaled box, ``(batch, action_dim)``
        :param t: diffusion times, ``(batch,)``
        :param noise: standard normal, ``(batch, action_dim)``
        """
        return self.inverse_dynamics.loss(actions, self._action_condition(windows), t, noise)

    def inverse_dynamics_bound_terms(self, windows: th.Tensor, actions: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """Terms of the variational bound of the actions, ``(batch,)``; arguments as ``inverse_dynamics_loss()``."""
        return self.inverse_dynamics.bound_terms(actions, self._action_condition(windows), t, noise)

    def noisy_critic_loss(self, windows: th.Tensor, values: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """Squared error of the value predicted from noisy plans, ``(batch,)``; arguments as ``planner_loss()``."""
        assert self.noisy_critic is not None
        noisy = th.where(self.fixed_mask, windows, self.planner.process.add_noise(windows, noise, t))
        predicted: th.Tensor = self.noisy_critic(noisy, self.planner.process.schedule.network_time(t))
        return (predicted - values).square()

    # ------------------------------------------------------------------ planning

    def draw_latent(self, batch_size: int, deterministic: bool = False, generator: th.Generator | None = None) -> th.Tensor:
        """What a plan is denoised from, ``(batch, horizon - 1, free_dim)``: standard normal, or its mean."""
        shape = (batch_size, *self.latent_shape)
        return th.zeros(shape, device=self.device) if deterministic else th.randn(shape, device=self.device, generator=generator)

    def join(self, latent: th.Tensor, state: th.Tensor) -> th.Tensor:
        """A state and the latent of what follows, in the shape of a plan, ``(batch, horizon, obs_dim)``.

        :param latent: ``(batch, horizon - 1, free_dim)``
        :param state: standardised, ``(batch, obs_dim)``
        """
        goal = state[:, None, self.free_dim :].expand(-1, self.horizon - 1, -1)
        return th.cat([state[:, None], th.cat([latent, goal], dim=2)], dim=1)

    def denoise(
        self,
        latent: th.Tensor,
        state: th.Tensor,
        num_inference_steps: int | None = None,
        denoise: DenoiseSteps | None = None,
        guidance: ScoreGuidance | None = None,
    ) -> th.Tensor:
        """What the planner makes of a latent: a deterministic map (DDIM), in which the present state and the goal are held.

        :param latent: ``(batch, horizon - 1, free_dim)``
        :param state: standardised, ``(batch, obs_dim)``
        :param num_inference_steps: the policy's own by default
        :param denoise: what denoises at each step, the averaged network by default
        :param guidance: gradient added to the score
        :return: plans, standardised, ``(batch, horizon, obs_dim)``
        """
        # Present state and goal are the same encoded
        start = self._beside_present(self.join(latent, state), state)
        n_steps = num_inference_steps or self.num_inference_steps
        fixed = Fixed(self.fixed_mask, self._beside_present(state[:, None].expand(-1, self.horizon, -1), state))
        if denoise is None:
            return self.decode(self.planner.sample(start, None, n_steps, fixed=fixed, guidance=guidance))
        return self.decode(self.planner.process.sample(denoise, start, n_steps, fixed=fixed, guidance=guidance))

    def value(self, plan: th.Tensor) -> th.Tensor:
        """The critic's value of plans, scaled so that the dataset's are in [-1, 1].

        :param plan: standardised, ``(batch, horizon, obs_dim)``
        :return: ``(batch,)``
        """
        output: th.Tensor = self.critic(plan)
        return output

    @th.no_grad()
    def plan(self, obs: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Plan by the policy's guidance.

        :param obs: flattened, in the env's units, ``(batch, obs_dim)``
        :return: standardised, ``(batch, horizon, obs_dim)``
        """
        return self._guidances[self._guidance](self, self.normalizer.normalize(obs), deterministic)

    @th.no_grad()
    def act(self, plan: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Actions that begin a plan, in the scaled box, ``(batch, action_dim)``.

        :param plan: standardised, ``(batch, horizon, obs_dim)``
        """
        start = th.zeros(len(plan), self.action_dim, device=self.device)
        if not deterministic:
            start.normal_(std=self.temperature)
        return self.inverse_dynamics.sample(start, self._action_condition(plan), self.num_action_steps).clamp(-1.0, 1.0)

    def _action_condition(self, windows: th.Tensor) -> th.Tensor:
        # The difference, since a network cannot tell two nearly equal inputs apart well.
        here, there = windows[:, 0, : self.free_dim], windows[:, 1, : self.free_dim]
        return th.cat([here, there - here], dim=1)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Actions in the scaled box [-1, 1], ``(batch, action_dim)``."""
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        assert isinstance(observation, th.Tensor)
        return self.act(self.plan(observation, deterministic), deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ["d_model", "depth", "critic_depth", "head_dim", "time_embedding_dim", "net_arch", "activation_fn", "horizon"]
        names += ["num_inference_steps", "num_action_steps", "temperature", "ema_decay", "guidance", "train_for", "n_candidates"]
        names += ["cg_scale", "cfg_scale", "cfg_target", "timestep_sampler", "clip_sample", "prediction_type", "relative"]
        own = {name: getattr(self, name) for name in names}
        return {**super()._get_constructor_parameters(), **own, "critic": self.critic_name}


MlpPolicy = PlannerPolicy
