"""A guard around the training environment: NaN and infinite numbers stop at the door."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from sb3_diffrl.common import NonFiniteError

# Of Stable-Baselines3's NatureCNN
SMALLEST_IMAGE = 36


class NonFiniteStepError(NonFiniteError):
    """A NaN or infinite number in a step of the training environment, from the environment or in the action."""


@contextmanager
def finite(env: VecEnv) -> Iterator[None]:
    """While the block runs, a step or reset of the environment raises if it gives a NaN or infinite observation or reward.

    What the environment gives is looked at below ``VecNormalize``, which would clip an infinite number and learn from a NaN. The
    check is put on the environment rather than around it: SB3's callbacks compare its wrappers with those of another.

    :param env: training environment
    :raises NonFiniteStepError: in the block, naming the env and what it gave
    """
    normalize = unwrap_vec_normalize(env)
    source = env if normalize is None else normalize.venv
    reset, step_wait = source.reset, source.step_wait

    def checked_reset() -> VecEnvObs:
        obs = reset()
        check_finite("observation", obs)
        return obs

    def checked_step_wait() -> VecEnvStepReturn:
        obs, rewards, dones, infos = step_wait()
        check_finite("reward", rewards)
        check_finite("observation", obs)
        for i in np.flatnonzero(dones):
            final = infos[i].get("terminal_observation")
            if final is not None:
                check_finite("final observation", _batch_of_one(final), first_env=int(i))
        return obs, rewards, dones, infos

    source.reset, source.step_wait = checked_reset, checked_step_wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        del source.reset, source.step_wait


def check_observable(env: Any, policy: object = None, policy_kwargs: dict[str, Any] | None = None) -> None:
    """Check that Stable-Baselines3's environments and networks take the observations of an env, if it is made already.

    :param env: environment or observation space; what has no space yet is not looked at
    :param policy: which the observations are for, a class or its name; if it is given, images are checked, too
    :param policy_kwargs: of that policy
    :raises ValueError: naming the space, and what is supported
    """
    space = env if isinstance(env, spaces.Space) else getattr(env, "observation_space", None)
    if space is None:
        return
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {None: space}
    name = getattr(policy, "__name__", policy)
    has_cnn = name in ("CnnPolicy", "MultiInputPolicy") and "features_extractor_class" not in (policy_kwargs or {})
    reason = "" if parts else "it has no part"
    for key, part in parts.items():
        reason = reason or _unnamed(key) or _unsupported(part) or (_too_small(part) if has_cnn else "")
    if reason:
        raise ValueError(
            f"The observation space {space} is not supported: {reason}. Use Box of one axis or more, Discrete and MultiDiscrete of "
            "one axis that count from 0, MultiBinary, or a Dict of those, or flatten it by a "
            "`gymnasium.wrappers.FlattenObservation`."
        )


def _unnamed(key: str | None) -> str:
    # Why torch cannot keep a network under the name of a part of a dictionary
    try:
        nn.ModuleDict({} if key is None else {key: nn.Identity()})
    except (KeyError, TypeError) as error:
        return f"no network can be named like its part {key!r} ({error.args[0]})"
    return ""


def _unsupported(part: spaces.Space[Any]) -> str:
    if not isinstance(part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return f"{part} is none of the spaces that networks take"
    if np.any(getattr(part, "start", 0)):
        return f"{part} does not count from 0"
    shape = part.shape or ()
    if 0 in shape:
        return f"{part} is empty: leave it out"
    if (isinstance(part, spaces.MultiDiscrete) and len(shape) > 1) or (isinstance(part, spaces.Box) and shape == ()):
        return f"{part} has {len(shape)} axes"
    if part.dtype.itemsize > 8:
        return f"torch has no {part.dtype}: convert it by a `gymnasium.wrappers.DtypeObservation`"
    return ""


def _too_small(part: spaces.Space[Any]) -> str:
    # For Stable-Baselines3's convolutions, whatever the order of the axes
    if is_image_space(part) and sorted(part.shape or ())[1] < SMALLEST_IMAGE:
        return (
            f"{part} are images of fewer than {SMALLEST_IMAGE} pixels a side, too small for the convolutions: enlarge them by a "
            "`gymnasium.wrappers.ResizeObservation`, give a `features_extractor_class`, or use the MlpPolicy"
        )
    return ""


def check_finite(what: str, values: Any, first_env: int = 0) -> None:
    """Check an array, or a dictionary of arrays, with one row for each env.

    :param what: what the values are, for the message
    :param values: ``(n_envs, ...)``
    :param first_env: index of the first row's env
    :raises NonFiniteStepError: if a value is not finite in single precision, in which networks compute; the message names the env,
        what it gave and where
    """
    if isinstance(values, dict):
        for key, value in values.items():
            check_finite(f"{what} '{key}'", value, first_env)
        return
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.floating):
        return
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(values.astype(np.float32, copy=False))
    if is_finite.all():
        return
    index = tuple(int(i) for i in np.argwhere(~is_finite)[0])
    where = f" at index {list(index[1:])}" if len(index) > 1 else ""
    raise NonFiniteStepError(f"env {first_env + index[0]} gave a non-finite {what}: {values[index]}{where}")


def _batch_of_one(obs: Any) -> Any:
    return {key: value[None] for key, value in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]


def end_trajectory(replay_buffer: ReplayBuffer | None) -> None:
    """Mark the last stored step of each env as the end of its episode, by a time-out where the buffer knows those.

    What is stored next then counts as another episode: n-step returns and hindsight goals do not reach across.
    """
    if isinstance(replay_buffer, HerReplayBuffer):
        if (replay_buffer._current_ep_start != replay_buffer.pos).any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it speaks of loading a buffer
                replay_buffer.truncate_last_trajectory()
    elif replay_buffer is not None and replay_buffer.size() > 0:
        last = (replay_buffer.pos - 1) % replay_buffer.buffer_size
        open_episodes = replay_buffer.dones[last] == 0
        replay_buffer.dones[last] = 1
        if replay_buffer.handle_timeout_termination:
            replay_buffer.timeouts[last][open_episodes] = 1
