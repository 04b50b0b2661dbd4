"""Which times a diffusion model is trained on: fixed rules, importance sampling and a learned policy, for any training loop."""

from sb3_diffrl.timesteps.adaptive import AdaptiveTimestepSampler
from sb3_diffrl.timesteps.diagnostics import TimestepStatistics, timestep_statistics
from sb3_diffrl.timesteps.factory import make_timestep_sampler, timestep_sampler_by_name
from sb3_diffrl.timesteps.mixin import TimestepSamplerMixin
from sb3_diffrl.timesteps.samplers import (
    BoundTerms,
    LogitNormalTimestepSampler,
    LogNormalTimestepSampler,
    LossSecondMomentSampler,
    SpeedTimestepSampler,
    TimestepSample,
    TimestepSampler,
    UniformTimestepSampler,
)
from sb3_diffrl.timesteps.weightings import P2, LossWeighting, MinSNR

__all__ = [
    "P2",
    "AdaptiveTimestepSampler",
    "BoundTerms",
    "LogNormalTimestepSampler",
    "LogitNormalTimestepSampler",
    "LossSecondMomentSampler",
    "LossWeighting",
    "MinSNR",
    "SpeedTimestepSampler",
    "TimestepSample",
    "TimestepSampler",
    "TimestepSamplerMixin",
    "TimestepStatistics",
    "UniformTimestepSampler",
    "make_timestep_sampler",
    "timestep_sampler_by_name",
    "timestep_statistics",
]
