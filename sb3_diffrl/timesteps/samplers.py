"""Timestep samplers: the interface, and the rules that do not look at the model's progress on the bound."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Self

import torch as th
from torch import nn

from sb3_diffrl.common import check_count, check_positive
from sb3_diffrl.diffusion.process import DiffusionProcess
from sb3_diffrl.timesteps.distributed import sum_over_processes
from sb3_diffrl.timesteps.weightings import LossWeighting, WeightingName, make_weighting

#: ``bound_terms(rows, t, noise) -> (n,)``: the terms of the variational bound (``DiffusionProcess.bound_terms``) by the
#: learning network, of the minibatch's rows ``rows`` ``(n,)``, int64, repeats allowed, at the times ``t`` ``(n,)``, with the noise
#: ``(n, ...)``.
BoundTerms = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]


class TimestepSample(NamedTuple):
    """Times to train on, and what the loss at each is multiplied by.

    :param t: times of the schedule, ``(batch,)``
    :param weight: ``(batch,)``
    """

    t: th.Tensor
    weight: th.Tensor


class Draw(NamedTuple):
    """What a rule draws.

    :param t: times of the schedule, ``(batch,)``
    :param weight: the rule's own weights, ``(batch,)``
    :param place: where the rule drew, if it learns from it: a bin, or a position in the sweep, ``(batch,)``
    """

    t: th.Tensor
    weight: th.Tensor
    place: th.Tensor | None = None


class TimestepSampler(nn.Module, ABC):
    """Which times a diffusion model is trained on, in any loop::

        sampler = make_timestep_sampler("adaptive", process, x0_shape=(64,))
        t, weight = sampler.sample(x0)
        loss = process.denoising_loss(denoise, x0, t, noise)  # (batch,)
        with sampler.around_step(x0, loss, bound_terms):
            optimizer.zero_grad(); (weight * loss).mean().backward(); optimizer.step()

    What a sampler has learned is in its ``state_dict()``: load it with the model's to go on exactly where training stopped. A
    sampler trains itself. Keep its parameters out of the model's optimiser, and the sampler out of the module that
    ``DistributedDataParallel`` wraps: with several processes it keeps itself the same in all of them.

    A sampler is made of settings alone, and fits a model by ``setup()``; ``make_timestep_sampler`` does both.

    :param weighting: weight of the loss that multiplies the rule's own: ``"min_snr"``, ``"p2"``, a ``LossWeighting`` or ``None``
    """

    process: DiffusionProcess
    _place: th.Tensor | None = None

    def __init__(self, weighting: WeightingName | LossWeighting | None = None) -> None:
        super().__init__()
        self.weighting = None if weighting is None else make_weighting(weighting)

    def setup(self, process: DiffusionProcess, x0_shape: tuple[int, ...]) -> Self:
        """Fit the sampler to a model; it then starts anew.

        :param process: the model's process
        :param x0_shape: shape of one row of the data
        :return: the sampler itself
        """
        del x0_shape  # for those that look at the data
        self.process = process
        return self

    def sample(self, x0: th.Tensor, generator: th.Generator | None = None) -> TimestepSample:
        """Times for a minibatch.

        :param x0: data, ``(batch, ...)``
        :param generator: source of randomness on the data's device, torch's global one if ``None``
        :return: times and weights of the loss, each ``(batch,)``
        :raises RuntimeError: if the sampler was not set up
        """
        if not hasattr(self, "process"):
            raise RuntimeError(
                "The sampler does not know the model yet: call `setup(process, x0_shape)`, or use `make_timestep_sampler`."
            )
        with th.no_grad():
            t, weight, self._place = self._draw(x0, generator)
            return TimestepSample(t, weight if self.weighting is None else weight * self.weighting(self.process, t))

    @abstractmethod
    def _draw(self, x0: th.Tensor, generator: th.Generator | None) -> Draw:
        """Times and the rule's own weights, without a trace in the sampler."""

    def around_step(
        self, x0: th.Tensor, loss: th.Tensor, bound_terms: BoundTerms, generator: th.Generator | None = None
    ) -> AbstractContextManager[None]:
        """Surround the optimiser's step on the minibatch of the last ``sample()``, from which the sampler learns.

        :param x0: data, ``(batch, ...)``
        :param loss: denoising loss of each row, without weights, ``(batch,)``
        :param bound_terms: terms of the bound for rows of the minibatch, see ``BoundTerms``; called only by samplers that need it
        :param generator: source of randomness on the data's device, torch's global one if ``None``
        """
        del x0, loss, bound_terms, generator
        return nullcontext()

    def info(self) -> dict[str, th.Tensor]:
        """What there is to log about the sampler: scalars by name."""
        return {}

    def density(self, x0: th.Tensor, n_bins: int = 50, n_draws: int = 100, seed: int = 0) -> th.Tensor:
        """Histogram of the sampler's times over the schedule, for pictures. It changes nothing in the sampler.

        :param x0: data to draw for, ``(batch, ...)``
        :param n_bins: bins, from the least to the largest noise
        :param n_draws: draws for each row
        :param seed: seed of the draws
        :return: density, 1 in every bin where it is uniform, ``(n_bins,)``
        """
        generator = th.Generator(x0.device).manual_seed(seed)
        with th.no_grad():
            t = self._draw(x0.repeat_interleave(n_draws, 0), generator).t
            edges = self.process.schedule.timesteps_at(th.arange(1, n_bins, device=x0.device) / n_bins)
            counts = th.bincount(th.searchsorted(edges.contiguous(), t, right=True), minlength=n_bins)
        return counts / counts.sum() * n_bins


class UniformTimestepSampler(TimestepSampler):
    """Every time alike (DDPM, 2006.11239)."""

    def _draw(self, x0: th.Tensor, generator: th.Generator | None) -> Draw:
        return Draw(self.process.schedule.sample_timesteps(len(x0), generator), x0.new_ones(len(x0)))


class LogitNormalTimestepSampler(TimestepSampler):
    """The logit of the time, as a fraction of the schedule, is normal (SD3, 2403.03206, eq. 19): the middle most often.

    :param mean: mean of the logit; below 0 for less noise
    :param std: its standard deviation
    :param weighting: see ``TimestepSampler``
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, weighting: WeightingName | LossWeighting | None = None) -> None:
        super().__init__(weighting)
        self.mean, self.std = mean, check_positive("std", std)

    def _draw(self, x0: th.Tensor, generator: th.Generator | None) -> Draw:
        logit = th.randn(len(x0), device=x0.device, generator=generator) * self.std + self.mean
        return Draw(self.process.schedule.timesteps_at(logit.sigmoid()), x0.new_ones(len(x0)))


class LogNormalTimestepSampler(TimestepSampler):
    """The noise level ``sigma / alpha`` is log-normal (EDM, 2206.00364, table 1): the levels at which there is most to learn.

    :param mean: mean of the level's logarithm; EDM's is for data of standard deviation 0.5
    :param std: its standard deviation
    :param weighting: see ``TimestepSampler``
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, weighting: WeightingName | LossWeighting | None = None) -> None:
        super().__init__(weighting)
        self.mean, self.std = mean, check_positive("std", std)

    def _draw(self, x0: th.Tensor, generator: th.Generator | None) -> Draw:
        log_level = th.randn(len(x0), device=x0.device, generator=generator) * self.std + self.mean
        return Draw(self.process.schedule.timesteps_at_log_snr(-2 * log_level), x0.new_ones(len(x0)))


class SpeedTimestepSampler(TimestepSampler):
    """SpeeD (2405.17403): few draws from the noisiest times, where the loss has converged, and weight where the noise changes fast.

    Times below ``tau`` are ``k`` times as likely as the others, and weigh ``1 - lam`` to ``lam``, linear in the rate at which the
    noise's variance grows there; the others weigh 1. The released code also pairs each draw with one mirrored at the border of its
    inference range; that lowers the variance of a batch's mean time alone and is left out.

    :param tau: share of the schedule that is sampled more often (0.7: 700 of 1000 times)
    :param k: how many times as often
    :param lam: largest weight below ``tau``, in [0.5, 1]
    :param weighting: see ``TimestepSampler``
    """

    weights: th.Tensor

    def __init__(
        self,
        tau: float = 0.7,
        k: float = 5.0,
        lam: float = 0.6,
        weighting: WeightingName | LossWeighting | None = None,
    ) -> None:
        super().__init__(weighting)
        if not 0 < tau < 1:
            raise ValueError(f"`tau` must be between 0 and 1, got {tau!r}.")
        if not 0.5 <= lam <= 1:
            raise ValueError(f"`lam` must be in [0.5, 1], got {lam!r}.")
        self.tau, self.k, self.lam = tau, check_positive("k", k), lam

    def setup(self, process: DiffusionProcess, x0_shape: tuple[int, ...]) -> Self:
        """See ``TimestepSampler``."""
        n = process.schedule.num_train_timesteps or 1000
        t = process.schedule.timesteps_at((th.arange(n, device=process.schedule.device) + 0.5) / n)
        rate = th.gradient(process.schedule.sigma(t).square())[0] if n > 1 else th.ones(1, device=t.device)
        rate = (rate - rate.min()) / (rate.max() - rate.min()).clamp(min=1e-12)
        below = (th.arange(n, device=t.device) + 0.5) / n < self.tau
        weights = th.where(below, 1 - self.lam + (2 * self.lam - 1) * rate, 1.0)
        self.register_buffer("weights", weights, persistent=False)
        return super().setup(process, x0_shape)

    def _draw(self, x0: th.Tensor, generator: th.Generator | None) -> Draw:
        share = self.k * self.tau / (self.k * self.tau + 1 - self.tau)
        u = th.rand(len(x0), device=x0.device, generator=generator)
        fraction = th.where(u < share, u / share * self.tau, self.tau + (u - share) / (1 - share) * (1 - self.tau))
        cell = (fraction * len(self.weights)).long().clamp_(0, len(self.weights) - 1)
        return Draw(self.process.schedule.timesteps_at(fraction), self.weights[cell])


class LossSecondMomentSampler(TimestepSampler):
    """Importance sampling by the root of the loss's running second moment (Improved DDPM, 2102.09672, eq. 18), with the weight
    ``1 / (T p(t))`` that leaves the expected loss as under uniform times. It is uniform until every time was seen ``history``
    times.

    The running mean is exponential; the released code keeps the last ``history`` losses of each time.

    :param history: number of losses of a time that its mean goes back, about
    :param uniform_floor: share of uniform draws mixed in
    :param n_bins: bins of continuous time; in discrete time, each time is one
    :param weighting: see ``TimestepSampler``; it is not part of the importance
    """

    second_moment: th.Tensor
    count: th.Tensor

    def __init__(
        self,
        history: int = 10,
        uniform_floor: float = 0.001,
        n_bins: int = 100,
        weighting: WeightingName | LossWeighting | None = None,
    ) -> None:
        super().__init__(weighting)
        if not 0 <= uniform_floor <= 1:
            raise ValueError(f"`uniform_floor` must be in [0, 1], got {uniform_floor!r}.")
        self.history, self.uniform_floor = check_count("history", history), uniform_floor
        self.n_bins = check_count("n_bins", n_bins)

    def setup(self, process: DiffusionProcess, x0_shape: tuple[int, ...]) -> Self:
        """See ``TimestepSampler``."""
        n, device = process.schedule.num_train_timesteps or self.n_bins, process.schedule.device
        self.register_buffer("second_moment", th.zeros(n, device=device))
        self.register_buffer("count", th.zeros(n, device=device))
        return super().setup(process, x0_shape)

    def probabilities(self) -> th.Tensor:
        """Probability of each bin, ``(n_bins,)``."""
        root = self.second_moment.sqrt()
        n = len(root)
        learned = (root / root.sum().clamp(min=1e-30)) * (1 - self.uniform_floor) + self.uniform_floor / n
        # Without branching: a device need not be waited for.
        return th.where((self.count >= self.history).all() & (root.sum() > 0), learned, 1 / n)

    def _draw(self, x0: th.Tensor, generator: th.Generator | None) -> Draw:
        p = self.probabilities()
        bins = th.multinomial(p, len(x0), replacement=True, generator=generator)
        if self.process.schedule.num_train_timesteps is None:
            fraction = (bins + th.rand(len(x0), device=x0.device, generator=generator)) / len(p)
        else:
            fraction = (bins + 0.5) / len(p)
        return Draw(self.process.schedule.timesteps_at(fraction), 1 / (len(p) * p[bins]), bins)

    def around_step(
        self, x0: th.Tensor, loss: th.Tensor, bound_terms: BoundTerms, generator: th.Generator | None = None
    ) -> AbstractContextManager[None]:
        """See ``TimestepSampler``."""
        del x0, bound_terms, generator
        assert self._place is not None, "around_step() comes after sample()"
        return self._observe_after(self._place, loss.detach())

    @contextmanager
    def _observe_after(self, bins: th.Tensor, loss: th.Tensor) -> Iterator[None]:
        yield  # a step that fails, for a loss that is not finite, is not remembered
        self._observe(bins, loss)

    def _observe(self, bins: th.Tensor, loss: th.Tensor) -> None:
        # (2, n_bins) number of losses in each bin, and the sum of their squares
        sums = th.zeros(2, len(self.count), device=loss.device)
        sums[0].index_add_(0, bins, th.ones_like(loss))
        sums[1].index_add_(0, bins, loss.float().square())
        new, squares = sum_over_processes(sums)
        self.count += new
        # A mean over all losses at first, over the last ones later
        rate = (new / self.count.clamp(min=1, max=self.history)).clamp(max=1)
        self.second_moment += rate * (squares / new.clamp(min=1) - self.second_moment)

    def info(self) -> dict[str, th.Tensor]:
        """``entropy`` of the times relative to uniform, 0 at most."""
        p = self.probabilities()
        return {"entropy": -(p * (p * len(p)).log()).sum()}
