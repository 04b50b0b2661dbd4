"""Wrong names in settings, found before a run begins: each message has the nearest right one."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rl_zoo3.utils import ALGOS

from sb3_diffrl.configs import named, nearest, resolve

#: Settings that RL Zoo takes for itself; the others are arguments of the algorithm.
ZOO_SETTINGS = (
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "noise_std",
    "noise_type",
    "normalize",
    "vec_env_wrapper",
)
# Arguments that come from the command line's own options.
_OPTIONS = {"env": "--env", "seed": "--seed", "verbose": "--verbose", "device": "--device", "tensorboard_log": "--tensorboard-log"}
_NOISES = ("normal", "ornstein-uhlenbeck")


def check_names(algo: str, hyperparams: Mapping[str, Any]) -> None:
    """Check the names in a task's settings: settings, policy and its arguments, noise, wrappers and theirs.

    :param algo: name of the algorithm in RL Zoo's table
    :param hyperparams: as they were read
    :raises ValueError: naming the wrong one, and the nearest
    """
    given = [name for name in _OPTIONS if name in hyperparams]
    if given:
        raise ValueError(f"`{given[0]}` is no setting but an option of the command: {_OPTIONS[given[0]]}.")
    arguments = [name for name in _arguments(ALGOS[algo]) or hyperparams if name not in _OPTIONS]
    _check("setting", f"of {algo}", hyperparams, [*arguments, *ZOO_SETTINGS])
    _check_policy(algo, resolve(hyperparams, trust=True))
    if hyperparams.get("noise_type") is not None:
        noise = str(hyperparams["noise_type"])
        if not any(known in noise for known in _NOISES):
            raise ValueError(f"There is no noise type {noise!r}: they are {', '.join(_NOISES)}.{nearest(noise, _NOISES)}")
        if "noise_std" not in hyperparams:
            raise ValueError("`noise_type` needs `noise_std`, the standard deviation of the noise.")
    check_wrappers(hyperparams.get("env_wrapper"))


def check_wrappers(wrappers: Any) -> None:
    """Check that wrappers can be imported, and the names of their arguments.

    :param wrappers: RL Zoo's ``env_wrapper``
    :raises ValueError: naming the wrong one, and the nearest
    """
    for name, arguments in named(wrappers, "env_wrapper"):
        module, _, attribute = name.rpartition(".")
        try:
            package = importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"The wrapper {name} cannot be imported: {error}.") from error
        if not hasattr(package, attribute):
            raise ValueError(f"There is no wrapper {name}.{nearest(attribute, dir(package))}")
        known = _arguments(getattr(package, attribute))
        if known is not None:
            _check("argument", f"of {attribute}", arguments, known)


def _check_policy(algo: str, resolved: Mapping[str, Any]) -> None:
    aliases = getattr(ALGOS[algo], "policy_aliases", {})
    policy = resolved["policy"]
    if not isinstance(policy, str) or "." in policy or not aliases:
        return
    if policy not in aliases:
        raise ValueError(f"{algo} has no policy {policy!r}: they are {', '.join(aliases)}.{nearest(policy, aliases)}")
    known, given = _arguments(aliases[policy]), resolved.get("policy_kwargs")
    if known is not None and isinstance(given, dict):
        _check("argument", f"of {policy}, in `policy_kwargs`", given, known)


def _arguments(function: Callable[..., Any]) -> list[str] | None:
    """Names of a class's or function's arguments; ``None`` if it takes any, or does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _check(kind: str, where: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"There is no {kind} {name!r} {where}.{nearest(name, known)}")
