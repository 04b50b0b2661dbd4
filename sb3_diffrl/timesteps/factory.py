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


def timestep_sampler_by_name(name: TimestepSamplerName) -> TimestepSampler:
    """A sampler of default settings, to be fitted to a model by ``setup()``.

    :param name: a rule: ``"uniform"``, ``"logit_normal"``, ``"lognormal"``, ``"loss_second_moment"``, ``"speed"``, ``"adaptive"``;
        a weighting, with uniform times: ``"min_snr"`` or ``"p2"``; or both, as ``"adaptive+min_snr"``
    :raises ValueError: for an unknown name, which lists the known ones
    """
    rule, _, weighting = name.partition("+")
    if rule in WEIGHTINGS and not weighting:
        rule, weighting = "uniform", rule
    if rule not in RULES or (weighting and weighting not in WEIGHTINGS):
        raise ValueError(
            f"Unknown `timestep_sampler` {name!r}, choose {', '.join(map(repr, (*RULES, *WEIGHTINGS)))}, or a rule and a weighting "
            "as 'adaptive+min_snr'."
        )
    return RULES[rule](weighting=weighting or None)


def make_timestep_sampler(
    timestep_sampler: TimestepSamplerName | TimestepSampler, process: DiffusionProcess, x0_shape: tuple[int, ...]
) -> TimestepSampler:
    """A sampler, fitted to a model.

    :param timestep_sampler: a name (see ``timestep_sampler_by_name``) or an object, which starts anew
    :param process: the model's process
    :param x0_shape: shape of one row of the data
    :raises ValueError: for an unknown name, which lists the known ones
    """
    if not isinstance(timestep_sampler, TimestepSampler):
        timestep_sampler = timestep_sampler_by_name(timestep_sampler)
    return timestep_sampler.setup(process, x0_shape)
