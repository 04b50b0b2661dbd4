"""Timestep samplers for Stable-Baselines3 policies."""

import copy

from sb3_diffrl.diffusion.process import DiffusionProcess
from sb3_diffrl.timesteps.factory import TimestepSamplerName, make_timestep_sampler
from sb3_diffrl.timesteps.samplers import TimestepSampler


class TimestepSamplerMixin:
    """Gives a diffusion policy of Stable-Baselines3 the argument ``timestep_sampler``::

        class MyPolicy(TimestepSamplerMixin, BasePolicy):
            def __init__(self, ..., timestep_sampler: str | TimestepSampler = "uniform"):
                ...
                self.optimizer = ...  # of the networks, before the sampler adds parameters of its own
                self._setup_timestep_sampler(timestep_sampler, self.process, (self.action_dim,))

    The sampler is a part of the policy: it moves, is saved and is loaded with it; ``_get_constructor_parameters()`` gives
    ``timestep_sampler=self.timestep_sampler``. The algorithm calls
    ``policy.timestep_sampler.sample(x0, generator)``, and makes its gradient step inside
    ``policy.timestep_sampler.around_step(x0, loss, bound_terms, generator)``.
    """

    timestep_sampler: TimestepSampler

    def _setup_timestep_sampler(
        self, timestep_sampler: TimestepSamplerName | TimestepSampler, process: DiffusionProcess, x0_shape: tuple[int, ...]
    ) -> None:
        """Make the sampler.

        :param timestep_sampler: a name or an object, see ``make_timestep_sampler``. An object is copied: its settings may serve
            several policies, and each starts anew.
        :param process: the policy's process
        :param x0_shape: shape of one row of what the model denoises
        """
        self.timestep_sampler = make_timestep_sampler(copy.deepcopy(timestep_sampler), process, x0_shape)
