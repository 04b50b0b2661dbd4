"""The generative core: noise schedules, the diffusion process and its solvers, denoising networks. It knows nothing of RL."""

from sb3_diffrl.diffusion.denoisers import DiT1d, MlpDenoiser
from sb3_diffrl.diffusion.embeddings import FourierEmbedding, SinusoidalEmbedding
from sb3_diffrl.diffusion.model import DiffusionModel
from sb3_diffrl.diffusion.process import Denoise, DenoiseSteps, DiffusionProcess, Fixed, Guidance, PredictionType, Solver
from sb3_diffrl.diffusion.schedules import DiscreteSchedule, NoiseSchedule, ScheduleName, VPSchedule, make_schedule
from sb3_diffrl.diffusion.transformer import Transformer1d

__all__ = [
    "Denoise",
    "DenoiseSteps",
    "DiT1d",
    "DiffusionModel",
    "DiffusionProcess",
    "DiscreteSchedule",
    "Fixed",
    "FourierEmbedding",
    "Guidance",
    "MlpDenoiser",
    "NoiseSchedule",
    "PredictionType",
    "ScheduleName",
    "SinusoidalEmbedding",
    "Solver",
    "Transformer1d",
    "VPSchedule",
    "make_schedule",
]
