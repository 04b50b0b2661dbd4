"""The versions that a file was written by."""

import functools
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "sb3_diffrl",
    "stable-baselines3",
    "sb3-contrib",
    "gymnasium",
    "gymnasium-robotics",
    "minari",
    "mujoco",
    "numpy",
    "torch",
)


@functools.cache  # reads a file for each of them, at every save
def _installed() -> Mapping[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a model, a dataset or a score is, as far as they are installed."""
    return dict(_installed())


def note_differences(saved: Mapping[str, str], stacklevel: int) -> None:
    """Warn where a file comes from other versions than are installed: it may behave a little differently.

    :param saved: what ``versions()`` gave when the file was written
    :param stacklevel: of the warning, from here
    """
    here = versions()
    # A build's own mark, as in 2.13.0+cpu, makes no other version.
    differing = [
        f"{name} {theirs}, here {here[name]}"
        for name, theirs in saved.items()
        if name in here and str(theirs).partition("+")[0] != here[name].partition("+")[0]
    ]
    if differing:
        warnings.warn(
            f"The file was saved with other versions: {'; '.join(differing)}. It was loaded; results may differ slightly.",
            stacklevel=stacklevel + 1,
        )
