"""Timestep samplers by name."""

from collections.abc import Callable

from sb3_diffrl.diffusion.process import DiffusionProcess
from sb3_diffrl.timesteps.adaptive import AdaptiveTimestepSampler
from sb3_diffrl.timesteps.samplers import (
    LogitNormalTimestepSampler,
    LogNormalTimestepSampler,
    LossSecondMomentSampler,
    SpeedTimestepSampler,
    TimestepSampler,
    UniformTimestepSampler,
)
from sb3_diffrl.timesteps.weightings import LossWeighting, make_weighting

#: A rule, a weighting, or both: ``"adaptive+min_snr"``. A ``Literal`` would have to list all pairs.
TimestepSamplerName = str

RULES: dict[str, Callable[..., TimestepSampler]] = {
    "uniform": UniformTimestepSampler,
    "logit_normal": LogitNormalTimestepSampler,
    "lognormal": LogNormalTimestepSampler,
    "loss_second_moment": LossSecondMomentSampler,
    "speed": SpeedTimestepSampler,
    "adaptive": AdaptiveTimestepSampler,
}
WEIGHTINGS = ("min_snr", "p2")


def make_timestep_sampler(
    timestep_sampler: TimestepSamplerName | TimestepSampler, process: DiffusionProcess, x0_shape: tuple[int, ...]
) -> TimestepSampler:
    """A sampler, fitted to a model.

    :param timestep_sampler: ``"uniform"``, ``"logit_normal"``, ``"lognormal"``, ``"loss_second_moment"``, ``"speed"``, ``"adaptive"``;
        ``"min_snr"``, ``"p2"`` (uniform times, weighted loss); a rule and a weighting, as ``"adaptive+min_snr"``; or an object
    :param process: the model's process
    :param x0_shape: shape of one row of the data
    :raises ValueError: for an unknown name, which lists the known ones
    """
    if isinstance(timestep_sampler, TimestepSampler):
        return timestep_sampler.setup(process, x0_shape)
    rule, _, weighting = timestep_sampler.partition("+")
    if rule in WEIGHTINGS and not weighting:
        rule, weighting = "uniform", rule
    if rule not in RULES or (weighting and weighting not in WEIGHTINGS):
        raise ValueError(
            f"Unknown `timestep_sampler` {timestep_sampler!r}, choose {', '.join(map(repr, (*RULES, *WEIGHTINGS)))}, or a rule "
            "and a weighting as 'adaptive+min_snr'."
        )
    chosen: LossWeighting | None = make_weighting(weighting) if weighting else None  # type: ignore[arg-type]
    return RULES[rule](weighting=chosen).setup(process, x0_shape)
