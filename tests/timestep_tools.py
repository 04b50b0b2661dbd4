"""What the tests of timestep samplers share."""

from typing import Any

import torch as th

from sb3_diffrl.diffusion import DiffusionProcess, make_schedule


def process(schedule: Any = "linear", n_times: int = 100) -> DiffusionProcess:
    return DiffusionProcess(make_schedule(schedule, n_times))


def rng(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)
