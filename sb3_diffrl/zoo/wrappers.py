"""Stacks of Gymnasium wrappers, as RL Zoo's ``env_wrapper`` takes them."""

from typing import Any

import gymnasium as gym
from rl_zoo3.utils import get_wrapper_class
from stable_baselines3.common.monitor import Monitor

from sb3_diffrl.configs import named

#: ``"package.Wrapper"`` or ``{"package.Wrapper": {argument: value}}``, or a list of these, innermost first.
WrapperEntry = str | dict[str, dict[str, Any]] | list[Any] | None


def inside_monitor(env: gym.Env[Any, Any], wrappers: WrapperEntry) -> gym.Env[Any, Any]:
    """Put wrappers between an env and the ``Monitor`` around it.

    RL Zoo puts them outside, where ``Monitor`` does not see that ``TimeLimit`` ends an episode (SB3's ``evaluate_policy`` then
    never returns) and ``RecordEpisodeStatistics`` finds its place in the infos taken.

    :param env: as SB3's ``make_vec_env`` has made it
    :param wrappers: RL Zoo's ``env_wrapper``
    :raises ValueError: if a wrapper is not for such an env
    """
    wrap = get_wrapper_class({"env_wrapper": wrappers})
    if wrap is None:
        return env
    try:
        if not isinstance(env, Monitor):
            return wrap(env)
        env.env = wrap(env.env)
    except (AssertionError, TypeError, ValueError) as error:
        stack = ", ".join(name for name, _ in named(wrappers, "env_wrapper"))
        raise ValueError(f"The env {env.spec and env.spec.id} does not take the wrappers {stack}: {error}") from error
    return env


def as_env_wrapper(wrappers: WrapperEntry) -> WrapperEntry:
    """The ``env_wrapper`` entry that puts a stack inside the ``Monitor``."""
    return {f"{__name__}.{inside_monitor.__name__}": {"wrappers": wrappers}} if wrappers else None


def joined(*entries: WrapperEntry) -> list[Any]:
    """Several ``env_wrapper`` entries as one, the first innermost."""
    return [part for entry in entries if entry for part in (entry if isinstance(entry, list) else [entry])]
