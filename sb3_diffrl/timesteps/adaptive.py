"""The learned timestep sampler."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Self

import torch as th
from torch import nn

from sb3_diffrl.common import check_count, check_positive
from sb3_diffrl.diffusion.process import DiffusionProcess
from sb3_diffrl.timesteps import native
from sb3_diffrl.timesteps.distributed import broadcast, mean_over_processes
from sb3_diffrl.timesteps.samplers import BoundTerms, Draw, TimestepSampler
from sb3_diffrl.timesteps.weightings import LossWeighting, WeightingName

# Added to the masses on both sides of a draw; as in native/beta_policy.c
EDGE = 1e-4
# Times in a cell of the sweep at which the bound's weight is read, in continuous time
CELL_POINTS = 16


class BetaPolicy(nn.Module):
    """Concentrations of a Beta distribution, from the data.

    Images ``(channels, height, width)`` go through three blocks of convolution and pooling first; vectors, and trajectories
    ``(length, dim)``, are flattened. It starts near the uniform distribution, whatever the data.

    :param x0_shape: shape of one row of the data
    :param net_arch: sizes of the hidden layers
    :param concentration_range: bounds of both concentrations; ``None``: any above 1e-5, as published
    """

    def __init__(self, x0_shape: tuple[int, ...], net_arch: Sequence[int], concentration_range: tuple[float, float] | None) -> None:
        super().__init__()
        self.concentration_range = concentration_range
        layers: list[nn.Module] = []
        if len(x0_shape) == 3:
            channels = (x0_shape[0], 16, 32, 32)
            for i in range(3):
                layers += [nn.Conv2d(channels[i], channels[i + 1], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            # Each pooling halves a side, rounded up
            n_features = channels[-1] * math.prod(math.ceil(side / 8) for side in x0_shape[1:])
        else:
            n_features = math.prod(x0_shape)
        layers.append(nn.Flatten())
        sizes = (n_features, *net_arch)
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        last = nn.Linear(sizes[-1], 2)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, self._bias())
        self.net = nn.Sequential(*layers, last)

    def _bias(self) -> float:
        if self.concentration_range is None:
            return 0.5  # softplus(0.5) = 0.974
        low, high = (math.log(bound) for bound in self.concentration_range)
        return math.log(-low / high) if low < 0 < high else 0.0

    def linears(self) -> list[nn.Linear] | None:
        """The layers, with ReLU between them; ``None`` for images, which have others."""
        if any(isinstance(layer, nn.Conv2d) for layer in self.net):
            return None
        return [layer for layer in self.net if isinstance(layer, nn.Linear)]

    def concentrations(self, x0: th.Tensor) -> th.Tensor:
        """Both concentrations for a minibatch, ``(batch, ...) -> (batch, 2)``."""
        output: th.Tensor = self.net(x0)
        if self.concentration_range is None:
            return nn.functional.softplus(output) + 1e-5
        low, high = (math.log(bound) for bound in self.concentration_range)
        return th.exp(low + (high - low) * output.sigmoid())

    def forward(self, x0: th.Tensor) -> th.distributions.Beta:
        """The distributions for a minibatch, ``(batch, ...)``."""
        concentrations = self.concentrations(x0)
        return th.distributions.Beta(concentrations[:, 0], concentrations[:, 1], validate_args=False)


class AdaptiveTimestepSampler(TimestepSampler):
    """Times drawn from a Beta policy pi(t | x0), trained by REINFORCE on how much the model's step lowers the variational bound.

    Paper: Adaptive Non-uniform Timestep Sampling for Accelerating Diffusion Model Training, https://arxiv.org/abs/2411.09998;
    reference: https://github.com/ku-dmlab/Adaptive-Timestep-Sampler. Every ``update_frequency`` steps:

    1. the bound's terms of one row of the minibatch at many times, before and after the model's step, give a vector of drops; the
       last ``queue_size`` vectors are kept (*sweep*);
    2. the ``n_selected`` times whose drops are most correlated with the summed drop are chosen (*selection*);
    3. each row's reward is the drop of its own terms at the chosen times;
    4. the policy takes a step up ``log pi(t | x0) * advantage``.

    The published settings are ``AdaptiveTimestepSampler.published()``. They collapse in our measurements; the defaults are those
    that were found to be robust. Where the two differ:

    * the terms before and after a step are measured with the same noise, so that their difference shows the step alone;
    * the reward is divided by its running standard deviation, and compared with its running mean;
    * the entropy is differentiated, and not part of the reward;
    * the Beta is not over the schedule, but over the mass of a base density that the sweeps measure: ``w^p e^q`` of the weight w
      and the denoising error e, whose product is the bound's term. It is uniform before training, when all errors are 1, and moves
      as they differ; the reward shifts the policy from there, and the entropy draws it back;
    * the loss has the weight ``pi^-0.5``, between none and the unbiasing ``pi^-1``: draws where the error is large lower the
      variance of the gradient, and the weight leaves those times some of the emphasis that the bound puts on them;
    * concentrations are bounded and some draws are uniform, so that no time is ever left out for good;
    * the sweep goes over ``sweep_size`` times, and the policy learns from ``reward_batch_size`` rows of the minibatch, which bounds
      the cost;
    * times are chosen by the sweeps before this one (the terms before the step are measured while the model has not made it), and
      by at least three of them (two are always perfectly correlated). The F-test of one feature orders times as the absolute
      correlation does.

    :param learning_rate: learning rate of the policy (Adam)
    :param update_frequency: model steps between two updates of the policy
    :param queue_size: number of sweeps that the selection looks at
    :param n_selected: number of times whose drops make the reward
    :param sweep_size: number of times in a sweep, spread evenly; ``None``: all, in discrete time
    :param reward_batch_size: number of rows of the minibatch, drawn at random, that are rewarded; ``None``: all
    :param chunk_size: largest number of rows given to ``bound_terms`` at once, ``None`` for no limit; bounds memory
    :param common_noise: the same noise before and after the model's step
    :param baseline: what rewards are compared with: ``"moving_average"``, ``"batch"`` (the minibatch's mean) or ``None``
    :param normalize_reward: divide the reward by its running standard deviation
    :param entropy: how the entropy of the Beta keeps the policy wide: ``"bonus"``, differentiated, or ``"reward"``, as part of the
        reward, as published
    :param ent_coef: its coefficient
    :param base: what the Beta's [0, 1] is: the schedule (``"uniform"``), or the mass of the swept density (``"sweep"``)
    :param sweep_powers: powers p of the bound's weight and q of the denoising error in the swept density. With (1, 1) and no
        ``importance`` times are drawn in proportion to the bound's terms, for schedules that have most of the bound in a few times
    :param max_grad_norm: largest norm of the policy's gradient
    :param concentration_range: bounds of the Beta's concentrations, ``None`` for none
    :param uniform_floor: share of uniform draws
    :param importance: power of the loss's weight ``pi(t | x0)^-importance``: 0 for none, as published, 1 to leave the expected
        loss as under uniform times
    :param net_arch: sizes of the policy's hidden layers
    :param statistics_decay: decay of the running mean and standard deviation of the reward, at each update
    :param weighting: weight of the loss: ``"min_snr"``, ``"p2"`` or a ``LossWeighting``; ``None``: none
    :raises ValueError: if an argument is outside its range; the message names it
    """

    queue: th.Tensor
    sweep_timesteps: th.Tensor
    cell_weights: th.Tensor
    reward_moments: th.Tensor
    terms: th.Tensor
    cumulative: th.Tensor
    selected: th.Tensor

    def __init__(
        self,
        learning_rate: float = 1e-2,
        update_frequency: int = 40,
        queue_size: int = 20,
        n_selected: int = 3,
        sweep_size: int | None = 100,
        reward_batch_size: int | None = 32,
        chunk_size: int | None = None,
        common_noise: bool = True,
        baseline: Literal["moving_average", "batch"] | None = "moving_average",
        normalize_reward: bool = True,
        entropy: Literal["bonus", "reward"] = "bonus",
        ent_coef: float = 1.0,
        base: Literal["uniform", "sweep"] = "sweep",
        sweep_powers: tuple[float, float] = (0.0, 1.0),
        max_grad_norm: float = 1.0,
        concentration_range: tuple[float, float] | None = (0.2, 5.0),
        uniform_floor: float = 0.05,
        importance: float = 0.5,
        net_arch: Sequence[int] = (32, 32),
        statistics_decay: float = 0.9,
        weighting: WeightingName | LossWeighting | None = None,
    ) -> None:
        super().__init__(weighting)
        _check_choice("base", base, "uniform", "sweep")
        _check_choice("baseline", baseline, "moving_average", "batch", None)
        _check_choice("entropy", entropy, "bonus", "reward")
        if not 0 <= uniform_floor < 1:
            raise ValueError(f"`uniform_floor` must be in [0, 1), got {uniform_floor!r}.")
        if not 0 <= importance <= 1:
            raise ValueError(f"`importance` must be in [0, 1], got {importance!r}.")
        if not 0 <= statistics_decay < 1:
            raise ValueError(f"`statistics_decay` must be in [0, 1), got {statistics_decay!r}.")
        if concentration_range is not None and not 0 < concentration_range[0] < concentration_range[1] < math.inf:
            raise ValueError(f"`concentration_range` must be two rising positive numbers or None, got {concentration_range!r}.")
        if ent_coef < 0:
            raise ValueError(f"`ent_coef` must not be negative, got {ent_coef!r}.")
        if min(sweep_powers) < 0:
            raise ValueError(f"`sweep_powers` must not be negative, got {sweep_powers!r}.")
        self.learning_rate = check_positive("learning_rate", learning_rate)
        self.update_frequency = check_count("update_frequency", update_frequency)
        self.queue_size = check_count("queue_size", queue_size)
        self.n_selected = check_count("n_selected", n_selected)
        self.sweep_size = None if sweep_size is None else check_count("sweep_size", sweep_size)
        self.reward_batch_size = None if reward_batch_size is None else check_count("reward_batch_size", reward_batch_size)
        self.chunk_size = None if chunk_size is None else check_count("chunk_size", chunk_size)
        self.common_noise, self.baseline, self.normalize_reward = common_noise, baseline, normalize_reward
        self.entropy, self.ent_coef = entropy, float(ent_coef)
        self.sweep_powers, self.base = sweep_powers, base
        self.max_grad_norm = check_positive("max_grad_norm", max_grad_norm)
        self.concentration_range, self.uniform_floor = concentration_range, uniform_floor
        self.importance = float(importance)
        self.net_arch, self.statistics_decay = tuple(net_arch), statistics_decay
        #: Draw in compiled C where it can; ``False``: always in torch
        self.use_native = True

    @classmethod
    def published(cls, weighting: WeightingName | LossWeighting | None = None) -> Self:
        """The settings of the paper and its released code."""
        return cls(
            learning_rate=1e-2,
            sweep_size=None,
            reward_batch_size=None,
            common_noise=False,
            baseline=None,
            normalize_reward=False,
            entropy="reward",
            ent_coef=0.01,
            base="uniform",
            concentration_range=None,
            uniform_floor=0.0,
            importance=0.0,
            net_arch=(256, 256),
            weighting=weighting,
        )

    def setup(self, process: DiffusionProcess, x0_shape: tuple[int, ...]) -> Self:
        """See ``TimestepSampler``.

        :raises ValueError: if ``sweep_size`` is ``None`` in continuous time
        """
        device = process.schedule.device
        self.policy = BetaPolicy(x0_shape, self.net_arch, self.concentration_range).to(device)
        broadcast(self.policy.parameters())
        self._linears = self.policy.linears()
        self.optimizer = th.optim.Adam(self.policy.parameters(), lr=self.learning_rate)
        sweep = self._sweep_timesteps(process).to(device)
        self.n_selected = min(self.n_selected, len(sweep))
        self.register_buffer("sweep_timesteps", sweep, persistent=False)
        # The bound's weight, its mean over the times for which each time of the sweep stands
        every = math.ceil((process.schedule.num_train_timesteps or CELL_POINTS * len(sweep)) / len(sweep))
        inside = (th.arange(every * len(sweep), device=device) + 0.5) / (every * len(sweep))
        weights = process.schedule.bound_coefficients(process.schedule.timesteps_at(inside)).weight
        # (n_sweep * every,) -> (n_sweep,)
        self.register_buffer("cell_weights", weights.view(len(sweep), every).mean(1), persistent=False)
        self.register_buffer("queue", th.zeros(self.queue_size, len(sweep), device=device))
        # Decayed weight, sum and sum of squares of the rewards
        self.register_buffer("reward_moments", th.zeros(3, device=device))
        # Decayed sum of the swept terms
        self.register_buffer("terms", th.zeros(len(sweep), device=device))
        # Mass of the base density up to the times of the sweep
        self.register_buffer("cumulative", th.linspace(0, 1, len(sweep) + 1, device=device))
        # Columns of the sweep
        self.register_buffer("selected", th.arange(self.n_selected, device=device))
        self._n_steps = self._n_sweeps = 0
        self._metrics: dict[str, th.Tensor] = {}
        self._seconds, self._start = 0.0, math.nan
        return super().setup(process, x0_shape)

    def _sweep_timesteps(self, process: DiffusionProcess) -> th.Tensor:
        n = self.sweep_size or process.schedule.num_train_timesteps
        if n is None:
            raise ValueError("Continuous time cannot be swept whole: give the number of times as `sweep_size`.")
        n = min(n, process.schedule.num_train_timesteps or n)
        return process.schedule.timesteps_at((th.arange(n, device=process.schedule.device) + 0.5) / n)

    # ------------------------------------------------------------------ drawing

    def _draw(self, x0: th.Tensor, generator: th.Generator | None) -> Draw:
        begin = time.perf_counter()
        position, weight = self._draw_compiled(x0, generator) or self._draw_in_torch(x0, generator)
        self._seconds += time.perf_counter() - begin
        return Draw(self.process.schedule.timesteps_at(position / (len(self.cumulative) - 1)), weight, position)

    def _draw_compiled(self, x0: th.Tensor, generator: th.Generator | None) -> tuple[th.Tensor, th.Tensor] | None:
        """What ``_draw_in_torch`` gives, with other random numbers; ``None`` where the compiled code cannot."""
        layers, bounds = self._linears, self.concentration_range
        if not self.use_native or layers is None or bounds is None or not native.supports(layers, x0):
            return None
        log_range = math.log(bounds[0]), math.log(bounds[1])
        drawn = native.draw(layers, log_range, x0, self.cumulative, self.uniform_floor, self.importance, generator)
        return drawn.position, drawn.weight

    def _draw_in_torch(self, x0: th.Tensor, generator: th.Generator | None) -> tuple[th.Tensor, th.Tensor]:
        """Where the draws are in the schedule, in cells of the sweep, and the weights of their losses; each ``(batch,)``."""
        concentrations, n = self.policy.concentrations(x0), len(self.cumulative) - 1
        # (batch, 2): a Beta variable is the first part of a Dirichlet one, which takes a generator
        mass = th._sample_dirichlet(concentrations, generator)[:, 0].contiguous()
        cell = th.searchsorted(self.cumulative[1:-1], mass, right=True)
        below = self.cumulative[cell]
        position = cell + (mass - below) / (self.cumulative[cell + 1] - below)
        if self.uniform_floor > 0:
            # One uniform number says whether the floor draws, and what.
            u = th.rand(len(x0), device=x0.device, generator=generator)
            position = th.where(u < self.uniform_floor, u * (n / self.uniform_floor), position)
        position = position.clip(0, n * (1 - 2**-20))  # rounding may have taken it to n
        if self.importance == 0:
            return position, th.ones_like(position)
        return position, th.exp(-self.importance * self._log_density(concentrations, position))

    def _log_density(self, concentrations: th.Tensor, position: th.Tensor) -> th.Tensor:
        """Of draws, with the uniform share, ``(batch,)``.

        :param concentrations: of the Beta, ``(batch, 2)``
        :param position: in cells of the sweep, ``(batch,)``
        """
        n, cell = len(self.cumulative) - 1, position.long()
        below = self.cumulative[cell]
        base = self.cumulative[cell + 1] - below
        mass = below + (position - position.floor()) * base
        log_norm = concentrations.sum(1).lgamma() - concentrations.lgamma().sum(1)
        # EDGE keeps draws at the ends finite
        log_beta = (concentrations[:, 0] - 1) * th.log(mass + EDGE) + (concentrations[:, 1] - 1) * th.log(1 + EDGE - mass)
        log_density = log_beta + log_norm + th.log(n * base)
        if self.uniform_floor == 0:
            return log_density
        return th.log((1 - self.uniform_floor) * th.exp(log_density) + self.uniform_floor)

    # ------------------------------------------------------------------ learning

    def around_step(
        self, x0: th.Tensor, loss: th.Tensor, bound_terms: BoundTerms, generator: th.Generator | None = None
    ) -> AbstractContextManager[None]:
        """See ``TimestepSampler``. All but every ``update_frequency``-th call only count."""
        del loss
        if math.isnan(self._start):
            self._start = time.perf_counter()
        self._n_steps += 1
        if self._n_steps % self.update_frequency:
            return nullcontext()
        assert self._place is not None, "around_step() comes after sample()"
        return self._learn_around(x0, self._place, bound_terms, generator)

    @contextmanager
    def _learn_around(
        self, x0: th.Tensor, position: th.Tensor, bound_terms: BoundTerms, generator: th.Generator | None
    ) -> Iterator[None]:
        begin = time.perf_counter()
        device, n_sweep = x0.device, len(self.sweep_timesteps)
        rewarded = th.randperm(len(x0), device=device, generator=generator)[: self.reward_batch_size]
        # (n_sweep + n_rewarded * n_selected,) the sweep of one row, then the rewarded rows at the selected times
        rows = th.cat([rewarded[:1].expand(n_sweep), rewarded.repeat_interleave(self.n_selected)])
        t = th.cat([self.sweep_timesteps, self.sweep_timesteps[self.selected].repeat(len(rewarded))])
        noise = th.randn(len(rows), *x0.shape[1:], device=device, generator=generator)
        before = self._terms(bound_terms, rows, t, noise)
        self._seconds += time.perf_counter() - begin
        yield
        begin = time.perf_counter()
        if not self.common_noise:
            noise = th.randn(len(rows), *x0.shape[1:], device=device, generator=generator)
        drop = before - self._terms(bound_terms, rows, t, noise)
        self._observe(before[:n_sweep], drop[:n_sweep])
        self._learn(x0[rewarded], position[rewarded], drop[n_sweep:].view(-1, self.n_selected).sum(1))
        if self.base == "sweep":
            # Only now: what was drawn was drawn from the old one. The errors of an untrained model are 1.
            mass = self._swept_density(self.statistics_decay**self._n_sweeps).cumsum(0)
            self.cumulative[1:] = mass / mass[-1]
        self._seconds += time.perf_counter() - begin

    @th.no_grad()
    def _terms(self, bound_terms: BoundTerms, rows: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        size = self.chunk_size or len(rows)
        chunks = zip(*(th.split(x, size) for x in (rows, t, noise)), strict=True)
        return th.cat([bound_terms(*chunk) for chunk in chunks])

    def _learn(self, x0: th.Tensor, position: th.Tensor, drop: th.Tensor) -> None:
        """One step of REINFORCE.

        :param x0: data, ``(batch, ...)``
        :param position: what was drawn, in cells of the sweep, ``(batch,)``
        :param drop: drop of each row's terms at the selected times, ``(batch,)``
        """
        beta = self.policy(x0)
        entropy = beta.entropy()
        reward = drop + self.ent_coef * entropy.detach() if self.entropy == "reward" else drop
        moments = mean_over_processes(th.stack([th.ones_like(reward[0]), reward.mean(), reward.square().mean()]))
        if not th.isfinite(moments).all():
            return  # the model's step went wrong, which the policy is not to learn from
        self.reward_moments.mul_(self.statistics_decay).add_(moments)
        mean, mean_square = self.reward_moments[1:] / self.reward_moments[0]
        std = (mean_square - mean.square()).clamp(min=0).sqrt()
        advantage = reward
        if self.baseline is not None:
            advantage = reward - (mean if self.baseline == "moving_average" else moments[1])
        if self.normalize_reward:
            advantage = advantage / std.clamp(min=1e-12)
        concentrations = th.stack([beta.concentration1, beta.concentration0], dim=1)
        log_density = self._log_density(concentrations, position)
        loss = -(log_density * advantage).mean()
        if self.entropy == "bonus":
            loss = loss - self.ent_coef * entropy.mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.optimizer.step()
        with th.no_grad():
            self._metrics = {"reward": moments[1], "reward_std": std, "entropy": entropy.mean()}
            self._metrics |= {"alpha": beta.concentration1.mean(), "beta": beta.concentration0.mean()}
            selected = self.process.schedule.network_time(self.selected_timesteps.sort().values)
            self._metrics |= {f"selected_{i}": time for i, time in enumerate(selected)}

    def _swept_density(self, share_of_ones: float) -> th.Tensor:
        """``w^p e^q`` at the times of the sweep, ``(n_sweep,)``, with a share of errors of 1; its sum is about 1."""
        weight = self.process.schedule.bound_coefficients(self.sweep_timesteps).weight / math.log(2)
        error = self.terms / weight + share_of_ones
        p = self.cell_weights.pow(self.sweep_powers[0]) * error.pow(self.sweep_powers[1])
        # A little everywhere: a perfect model leaves nothing else.
        return p / p.sum().clamp(min=1e-30) + 1e-4 / len(p)

    def _average_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        flat = mean_over_processes(th.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, th.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _observe(self, terms: th.Tensor, drops: th.Tensor) -> None:
        """Put a sweep in the running sum of terms and in the queue, and choose times by all that are there.

        :param terms: the bound's terms at the times of the sweep before the step, ``(n_sweep,)``
        :param drops: by how much they fell, ``(n_sweep,)``
        """
        terms, drops = mean_over_processes(th.stack([terms, drops]))
        if not th.isfinite(drops).all():
            return
        perfect = self.process.schedule.bound_coefficients(self.sweep_timesteps).offset / math.log(2)
        self.terms.mul_(self.statistics_decay).add_((terms - perfect).clamp(min=0))
        self.queue[self._n_sweeps % self.queue_size] = drops
        self._n_sweeps += 1
        if self._n_sweeps >= 3:
            queue = self.queue[: min(self._n_sweeps, self.queue_size)]
            self.selected.copy_(most_correlated(queue, self.n_selected))

    # ------------------------------------------------------------------ logs and state

    @property
    def selected_timesteps(self) -> th.Tensor:
        """The times whose terms make the reward, ``(n_selected,)``."""
        return self.sweep_timesteps[self.selected]

    def info(self) -> dict[str, th.Tensor]:
        """Of the last update: ``reward`` (mean drop, bits per dimension), ``reward_std`` (running), ``entropy`` of the Beta (0
        where uniform), its mean concentrations ``alpha`` and ``beta``, ``selected_0`` .. (the selected times, as network times);
        and ``overhead`` (the sampler's share of the time since the first step).
        """
        if not self._metrics:
            return {}
        return self._metrics | {"overhead": th.tensor(self._seconds / (time.perf_counter() - self._start))}

    def get_extra_state(self) -> dict[str, Any]:
        """What is not a tensor: the policy's optimiser and the counters."""
        if not hasattr(self, "optimizer"):
            return {}
        return {"optimizer": self.optimizer.state_dict(), "n_steps": self._n_steps, "n_sweeps": self._n_sweeps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what ``get_extra_state`` gave."""
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self._n_steps, self._n_sweeps = state["n_steps"], state["n_sweeps"]


def _check_choice(name: str, value: str | None, *choices: str | None) -> None:
    if value not in choices:
        raise ValueError(f"Unknown `{name}` {value!r}, choose {', '.join(map(repr, choices))}.")


def most_correlated(drops: th.Tensor, n_selected: int) -> th.Tensor:
    """The columns that best predict the rows' sums, each alone: the largest F statistics of a linear regression.

    :param drops: ``(n_rows, n_columns)``
    :param n_selected: number of columns to choose
    :return: indices of the columns, best first, ``(n_selected,)``; columns that never change come last
    """
    drops = drops.double() - drops.double().mean(0)
    total = drops.sum(1)
    norms = drops.norm(dim=0) * total.norm()
    # The F statistic rises with the absolute correlation.
    correlation = (drops.T @ total / norms.clamp(min=1e-300)).abs()
    best: th.Tensor = correlation.topk(n_selected).indices
    return best
