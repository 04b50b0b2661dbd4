"""A guard around the training environment: NaN and infinite numbers stop at the door."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn


class NonFiniteError(ValueError):
    """The environment gave a NaN or infinite observation or reward."""


class FiniteVecEnv(VecEnvWrapper):
    """Passes an environment through, and raises when one of its observations or rewards is NaN or infinite.

    The check sees what the env gave, before ``VecNormalize``, whose running statistics are put back to what they were before the
    faulty step: nothing has learned from it.

    :param venv: environment to guard
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.vec_normalize = unwrap_vec_normalize(venv)

    def reset(self) -> VecEnvObs:
        """As the environment's own.

        :raises NonFiniteError: naming the env and the observation
        """
        with self.undo_on_error():
            obs = self.venv.reset()
            self.check_obs(obs)
        return obs

    def step_wait(self) -> VecEnvStepReturn:
        """As the environment's own.

        :raises NonFiniteError: naming the env and what it gave
        """
        with self.undo_on_error():
            obs, rewards, dones, infos = self.venv.step_wait()
            check_finite("reward", rewards if self.vec_normalize is None else self.vec_normalize.get_original_reward())
            self.check_obs(obs)
            for i in np.flatnonzero(dones):
                final = infos[i].get("terminal_observation")
                if final is not None:
                    check_finite("final observation", _batch_of_one(final), first_env=int(i))
        return obs, rewards, dones, infos

    def check_obs(self, obs: VecEnvObs) -> None:
        """Check a batch of observations that the guarded environment has just given.

        :raises NonFiniteError: naming the env and the observation
        """
        check_finite("observation", obs if self.vec_normalize is None else self.vec_normalize.get_original_obs())

    @contextmanager
    def undo_on_error(self) -> Iterator[None]:
        """Put the running statistics of ``VecNormalize`` back if the block finds a fault."""
        normalize = self.vec_normalize
        names = ("obs_rms", "ret_rms", "returns")
        learning = normalize is not None and normalize.training
        saved = {name: copy.deepcopy(getattr(normalize, name, None)) for name in names} if learning else {}
        try:
            yield
        except NonFiniteError:
            if normalize is not None:
                vars(normalize).update(saved)
            raise


def check_finite(what: str, values: Any, first_env: int = 0) -> None:
    """Check an array, or a dictionary of arrays, with one row for each env.

    :param what: what the values are, for the message
    :param values: ``(n_envs, ...)``
    :param first_env: index of the first row's env
    :raises NonFiniteError: naming the env, what it gave and the first offending entry
    """
    if isinstance(values, dict):
        for key, value in values.items():
            check_finite(f"{what} '{key}'", value, first_env)
        return
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.floating) or np.isfinite(values).all():
        return
    index = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    where = f" at index {list(index[1:])}" if len(index) > 1 else ""
    raise NonFiniteError(f"env {first_env + index[0]} gave a non-finite {what}: {values[index]}{where}")


def _batch_of_one(obs: Any) -> Any:
    return {key: value[None] for key, value in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]
