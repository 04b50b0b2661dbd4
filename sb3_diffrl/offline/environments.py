"""The environments that datasets name: a file says which, and must not say what to run."""

import importlib
import sys
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, WrapperSpec

# Of what is installed, these packages' wrappers are known. The two classes write files where their arguments say.
KNOWN_PACKAGES = {"gymnasium", "gymnasium_robotics", "rl_zoo3", "sb3_contrib", "sb3_diffrl", "stable_baselines3"}
WRITERS = {"Monitor", "RecordVideo"}


def check_env_spec(spec: EnvSpec) -> None:
    """Check that a specification from a file names an environment and wrappers that this program knows.

    ``gymnasium.make`` calls whatever function a specification names, with whatever arguments. Here the environment is one that is
    registered under the specification's id, and the wrappers are classes of modules that were imported: the program's own, or of
    the packages that are known here, or of the environment's own package.

    :raises ValueError: if it is another, with what to do
    """
    if spec.id not in gym.registry and _text(spec.entry_point).startswith("gymnasium_robotics."):
        with suppress(ImportError):
            gym.register_envs(importlib.import_module("gymnasium_robotics"))
    registered = gym.registry.get(spec.id)
    if registered is None or _text(registered.entry_point) != _text(spec.entry_point):
        here = "none" if registered is None else f"another, {_text(registered.entry_point)}"
        raise ValueError(
            f"it is {spec.id!r} at {_text(spec.entry_point)}, and {here} is registered here under that id. Import the package that "
            "registers it"
        )
    if spec.id.startswith("GymV2"):
        raise ValueError(f"{spec.id!r} makes whatever environment its arguments name")
    for wrapper in spec.additional_wrappers:
        _check_wrapper(wrapper, KNOWN_PACKAGES | {_package(_text(registered.entry_point))})


def _check_wrapper(wrapper: WrapperSpec, known: set[str]) -> None:
    module, _, name = str(wrapper.entry_point).partition(":")
    if module.startswith("gymnasium.wrappers."):
        importlib.import_module(module)
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, gym.Wrapper)):
        raise ValueError(
            f"it has the wrapper {wrapper.entry_point!r}, which is not imported, or no wrapper. Import {module!r} first"
        )
    if WRITERS & {base.__name__ for base in found.__mro__}:
        raise ValueError(f"it has the wrapper {wrapper.entry_point!r}, which writes files")
    file = getattr(sys.modules.get(found.__module__), "__file__", None) or ""
    is_installed = bool({"site-packages", "dist-packages"} & set(Path(file).parts))
    if is_installed and _package(found.__module__) not in known:
        raise ValueError(
            f"it has the wrapper {wrapper.entry_point!r}; of what is installed, only those of {', '.join(sorted(known))} are taken"
        )


def _package(entry_point: str) -> str:
    return entry_point.partition(":")[0].partition(".")[0]


def _text(entry_point: object) -> str:
    return f"{entry_point.__module__}:{entry_point.__qualname__}" if isinstance(entry_point, type) else str(entry_point)
