"""Prior Guidance."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import polyak_update

from sb3_diffrl.common import OnNonFinite, check_count, check_number
from sb3_diffrl.diffusion.process import PredictionType
from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.offline_algorithm import Metrics
from sb3_diffrl.offline.reading import DatasetSource
from sb3_diffrl.pg.policies import MlpPolicy, PGPolicy, gaussian_kl, squashed_kl
from sb3_diffrl.planner.data import Pad
from sb3_diffrl.planner.diffusion_planner import DiffusionPlanner
from sb3_diffrl.planner.guidance import GuidanceName, TrainedGuidance
from sb3_diffrl.planner.policies import CriticName
from sb3_diffrl.saving.archive import saved_class
from sb3_diffrl.timesteps.samplers import TimestepSampler

SelfPG = TypeVar("SelfPG", bound="PG")

KLReduction = Literal["sum", "mean"]
KLOf = Literal["latent", "unsquashed"]
ValueNormalization = Literal["std", "abs", "none"]

# What PG takes over from a trained planner: its networks' sizes, and what they have learnt from.
TAKEN: tuple[str, ...] = (
    "horizon",
    "stride",
    "discount",
    "pad",
    "velocity_indices",
    "terminal_reward",
    "value_weight",
    "critic",
    "train_for",
)
TAKEN += ("prediction_type", "relative")
# What of the policy is not the planner's
OWN = {"prior_width", "optimizer_class", "optimizer_kwargs"}


def load_planner(path: str | Path, device: th.device) -> DiffusionPlanner:
    """A saved planner, or a ``PG`` for its planner."""
    # torch's random state stays as it is: loading sets the seed that the file has, and every prior would begin alike.
    with th.random.fork_rng(devices=[]):
        return (PG if saved_class(path) == "PG" else DiffusionPlanner).load(path, device=device)


def same(mine: Any, theirs: Any) -> bool:
    """Whether two settings are equal, as a list or as a tuple."""
    return bool(mine == theirs or (isinstance(mine, list | tuple) and isinstance(theirs, list | tuple) and [*mine] == [*theirs]))


class PG(DiffusionPlanner):
    """Prior Guidance: a diffusion planner whose noise comes from a learnt prior, trained for the value of the plans it becomes.

    Paper: Prior-Guided Diffusion Planning for Offline Reinforcement Learning, https://arxiv.org/abs/2505.10881, code:
    ku-dmlab/PG. The deviations are listed on the documentation's page.

    ``learn()`` trains the planner first, then, with the planner as it is, the prior. What is not said here is as in
    ``DiffusionPlanner``.

    :param policy: ``"MlpPolicy"`` or a subclass of ``PGPolicy``
    :param dataset: by default the given planner's
    :param guidance: ``"pg"``; a trained model takes others, see ``DiffusionPlanner``
    :param planner: trained planner (or ``PG``, for its planner), or a path it was saved at: its weights and settings are taken
        over, and ``learn()`` trains the prior alone. How it samples may be given anew. An argument that has its default counts as
        not given; set the attribute afterwards to sample by a default from a planner that has another value.
    :param planner_fraction: share of ``learn()``'s gradient steps that train the planner, unless one is given
    :param alpha: weight of the KL divergence of the latent's law from N(0, I)
    :param kl_reduction: ``"sum"`` over the entries of the latent, as a KL divergence is, or ``"mean"`` over its steps: alpha is
        then divided by horizon - 1 (the reference)
    :param kl_of: with ``squash``, which law is held near N(0, I): that of the latent z = 2 tanh(u) which the planner gets, by one
        sample, or that of ``"unsquashed"`` u (the reference)
    :param squash: bound the latent, z = 2 tanh(u) (the reference)
    :param normalize_value: divide the value in the prior's loss by the minibatch's standard deviation, which does not depend on
        where the values' zero is, by its mean ``"abs"`` (the reference), or by nothing
    :param tau: how fast the targets of the prior, which acts, and of the latent critic follow
    :param prior_inference_steps: denoising steps of a plan while the prior learns
    :param on_nonfinite: see ``DiffusionPlanner``
    :raises ValueError: if an argument is outside its range, or the planner has other sizes or learnt from another dataset; the
        message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    policy: PGPolicy

    def __init__(
        self,
        policy: str | type[PGPolicy],
        env: GymEnv | str | None = None,
        dataset: DatasetSource | OfflineDataset | Sequence[DatasetSource] | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 128,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        horizon: int = 4,
        stride: int = 1,
        discount: float = 0.997,
        pad: Pad = "none",
        velocity_indices: Sequence[int] = (),
        terminal_reward: float | None = None,
        value_weight: float = 0.0,
        critic: CriticName = "horizon",
        guidance: GuidanceName = "pg",
        train_for: Sequence[TrainedGuidance] = (),
        n_candidates: int = 50,
        cg_scale: float = 10.0,
        cfg_scale: float = 2.0,
        cfg_target: float = 1.0,
        cfg_dropout: float = 0.25,
        num_inference_steps: int = 20,
        num_action_steps: int = 10,
        temperature: float = 0.5,
        ema_decay: float = 0.9999,
        timestep_sampler: str | TimestepSampler = "uniform",
        clip_sample: float | None = None,
        prediction_type: PredictionType = "epsilon",
        relative: bool = False,
        planner: DiffusionPlanner | str | Path | None = None,
        planner_fraction: float = 0.5,
        alpha: float = 0.01,
        kl_reduction: KLReduction = "sum",
        kl_of: KLOf = "latent",
        squash: bool = True,
        normalize_value: ValueNormalization = "std",
        tau: float = 0.005,
        prior_inference_steps: int = 5,
        on_nonfinite: OnNonFinite = "raise",
        _init_setup_model: bool = True,
    ) -> None:
        self.planner_fraction = planner_fraction
        self.alpha, self.kl_reduction, self.kl_of, self.squash = alpha, kl_reduction, kl_of, squash
        self.normalize_value, self.tau, self.prior_inference_steps = normalize_value, tau, prior_inference_steps
        self.trains_prior = False
        super().__init__(
            policy,
            None,  # comes with the dataset, which may be the planner's
            None,
            learning_rate,
            batch_size,
            policy_kwargs,
            stats_window_size,
            tensorboard_log,
            verbose,
            seed,
            device,
            horizon,
            stride,
            discount,
            pad,
            velocity_indices,
            terminal_reward,
            value_weight,
            critic,
            guidance,
            train_for,
            n_candidates,
            cg_scale,
            cfg_scale,
            cfg_target,
            cfg_dropout,
            num_inference_steps,
            num_action_steps,
            temperature,
            ema_decay,
            timestep_sampler,
            clip_sample,
            prediction_type,
            relative,
            on_nonfinite,
            _init_setup_model=False,
        )
        if isinstance(planner, (str, Path)):
            planner = load_planner(planner, self.device)
        if not isinstance(planner, DiffusionPlanner | None):
            raise ValueError(f"`planner` is a DiffusionPlanner, a PG, or the path of one, not a {type(planner).__name__}.")
        if planner is not None:
            self._take_settings(planner)
            dataset = planner.dataset if dataset is None else dataset
        if dataset is not None:
            self._take_dataset(OfflineDataset.load(dataset))
        elif _init_setup_model:
            raise ValueError("Give a `dataset`: the id of a Minari dataset on disk, a `MinariDataset`, or a list of them.")
        if planner is not None:
            self._check_dataset(planner)
        if env is not None:
            self._take_env(env)
        if _init_setup_model:
            self._setup_model()
        if planner is not None:
            self._take_weights(planner)

    # ------------------------------------------------------------------ set-up

    def _take_settings(self, planner: DiffusionPlanner) -> None:
        parameters = inspect.signature(DiffusionPlanner.__init__).parameters
        for name in TAKEN:
            mine, theirs, default = getattr(self, name), getattr(planner, name), parameters[name].default
            fits = set(mine) <= set(theirs) if name == "train_for" else same(mine, theirs)
            if not fits and not same(mine, default):
                raise ValueError(
                    f"`{name}` is {mine!r}, and the planner was trained with {theirs!r}: leave `{name}` out, or train a planner."
                )
            setattr(self, name, theirs)
        for name in {*DiffusionPlanner.settings_of_policy, "clip_sample"} - {"guidance"}:
            if getattr(self, name) == parameters[name].default:
                setattr(self, name, getattr(planner, name))
        made_with = planner.policy._get_constructor_parameters()
        for name, mine in self.policy_kwargs.items():
            if name in made_with and name not in OWN and not same(mine, made_with[name]):
                raise ValueError(
                    f"policy_kwargs[{name!r}] is {mine!r}, and the planner was made with {made_with[name]!r}: leave it out, or "
                    "train a planner."
                )
        self.policy_kwargs = {**planner.policy_kwargs, **self.policy_kwargs}
        self.planner_fraction = 0.0

    def _check_dataset(self, planner: DiffusionPlanner) -> None:
        same_numbers = planner.dataset_checksum in (0, self.dataset_checksum)
        if self.dataset_ids == tuple(planner.dataset_ids) and self.dataset_steps == planner.dataset_steps and not same_numbers:
            raise ValueError(
                "The planner learnt from other data of the same name and size: their checksum differs. Train a planner on these, "
                "or give the data that it learnt from as `dataset`."
            )
        if (self.dataset_ids, self.dataset_steps) != (tuple(planner.dataset_ids), planner.dataset_steps):
            mine, theirs = (str(model.dataset_ids or "data without an id") for model in (self, planner))
            raise ValueError(
                f"The planner learnt from {planner.dataset_steps} steps of {theirs}, not from {self.dataset_steps} of {mine}: leave"
                " `dataset` out to learn from the planner's."
            )

    def _take_weights(self, planner: DiffusionPlanner) -> None:
        # The prior's networks and what else is PG's own stay as they are, also where the planner is a PG.
        own = self.policy.state_dict()
        prior = ("prior.", "prior_target.", "latent_critic.", "latent_critic_target.")
        shared = {n: value for n, value in planner.policy.state_dict().items() if n in own and not n.startswith(prior)}
        # A timestep sampler has done its work.
        theirs = {name: value for name, value in shared.items() if "timestep_sampler" not in name}
        others = [name for name, value in theirs.items() if value.shape != own[name].shape]
        if others:
            raise ValueError(
                f"The planner's networks have other sizes: leave `policy_kwargs` out. The first that differs is {others[0]}."
            )
        self.policy.load_state_dict({**own, **theirs})

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if not 0 <= self.planner_fraction <= 1:
            raise ValueError(f"`planner_fraction` must be in [0, 1], got {self.planner_fraction!r}.")
        self.alpha = check_number("alpha", self.alpha, 0)
        if self.normalize_value == "std" and self.batch_size == 1:
            raise ValueError('One window has no standard deviation: with `batch_size` = 1 take `normalize_value` "abs" or "none".')
        choices = {"kl_reduction": KLReduction, "kl_of": KLOf, "normalize_value": ValueNormalization}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"Unknown `{name}` {getattr(self, name)!r}, choose {' or '.join(map(repr, get_args(kind)))}.")
        if not 0 < self.tau <= 1:
            raise ValueError(f"`tau` must be above 0 and at most 1, got {self.tau!r}.")
        self.prior_inference_steps = check_count("prior_inference_steps", self.prior_inference_steps)

    def _policy_arguments(self) -> dict[str, Any]:
        return {**super()._policy_arguments(), "squash": self.squash}

    # ------------------------------------------------------------------ learning

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # Each stage has the learning rate's schedule to itself.
        split = round(self.planner_fraction * total_timesteps)
        self.trains_prior = num_timesteps >= split
        start, end = (split, total_timesteps) if self.trains_prior else (0, split)
        super()._update_current_progress_remaining(num_timesteps - start, end - start)

    def update(self) -> Metrics:
        """One gradient step: of the planner and what belongs to it at first, then of the prior and the latent critic."""
        if not self.trains_prior:
            return super().update()
        data = self.data
        indices = th.randint(len(data.first_rows), (self.batch_size,), device=self.device, generator=self.generator)
        states = self.policy.normalizer.normalize(data.observations[data.first_rows[indices]])
        (critic_loss, critic_info), (prior_loss, prior_info) = self._latent_critic_loss(states), self._prior_loss(states)
        metrics = {**critic_info, **prior_info}
        # They share no weights, so one optimiser steps down their sum.
        metrics["prior_grad_norm"] = self._optimise(critic_loss + prior_loss, self.policy.prior_optimizer, metrics)
        polyak_update(self.policy.prior.parameters(), self.policy.prior_target.parameters(), self.tau)
        polyak_update(self.policy.latent_critic.parameters(), self.policy.latent_critic_target.parameters(), self.tau)
        return metrics

    def _latent_critic_loss(self, states: th.Tensor) -> tuple[th.Tensor, Metrics]:
        """Squared error of the latent critic to the value of what the planner makes of the target prior's latents.

        :param states: standardised, ``(batch, obs_dim)``
        """
        policy = self.policy
        with th.no_grad():
            noise = policy.draw_latent(len(states), generator=self.generator)
            latent = policy.prior_latent(policy.prior_target, states, noise)
            target = policy.value(policy.denoise(latent, states, self.prior_inference_steps))
        loss = (policy.latent_critic(policy.join(latent, states)) - target).square().mean()
        return loss, {"latent_critic_loss": loss.detach(), "plan_value": target.mean()}

    def _prior_loss(self, states: th.Tensor) -> tuple[th.Tensor, Metrics]:
        """The latent critic's value of the prior's samples, downwards, and alpha times the KL divergence.

        :param states: standardised, ``(batch, obs_dim)``
        """
        policy = self.policy
        mean, log_std = policy.prior(states)
        u = mean + log_std.exp() * policy.draw_latent(len(states), generator=self.generator)
        latent = policy.squash_latent(u)
        value = policy.latent_critic_target(policy.join(latent, states))
        # (batch, horizon - 1, free_dim) -> (batch, horizon - 1)
        kl = (squashed_kl(u, mean, log_std) if self.squash and self.kl_of == "latent" else gaussian_kl(mean, log_std)).sum(dim=2)
        divergence = (kl.sum(dim=1) if self.kl_reduction == "sum" else kl.mean(dim=1)).mean()
        loss = -value.mean() / self._value_norm(value.detach()) + self.alpha * divergence
        return loss, {"prior_loss": loss.detach(), "latent_value": value.detach().mean(), "kl": divergence.detach()}

    def _value_norm(self, value: th.Tensor) -> th.Tensor:
        if self.normalize_value == "none":
            return th.ones_like(value[0])
        return (value.std() if self.normalize_value == "std" else value.abs().mean()).clamp(min=1e-3)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [*super()._optimizers(), self.policy.prior_optimizer]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, tensors = super()._get_torch_save_params()
        return [*names, "policy.prior_optimizer"], tensors

    def learn(
        self: SelfPG,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 500,
        tb_log_name: str = "PG",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPG:
        """Learn for ``total_timesteps`` gradient steps, planner then prior, see ``OfflineAlgorithm.learn()``."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
