"""What stands beside every raw file: command, commit, versions, hardware."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch as th

PACKAGES = (
    "sb3_diffrl",
    "stable-baselines3",
    "sb3-contrib",
    "gymnasium",
    "gymnasium-robotics",
    "minari",
    "mujoco",
    "torch",
    "numpy",
)


def metadata(arguments: dict[str, Any], command: str) -> dict[str, Any]:
    """Where a result comes from.

    :param arguments: everything that decides the result
    :param command: command line that repeats it
    """
    return {
        "command": command,
        "commit": commit(),
        "arguments": arguments,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {"processor": cpu_name(), "cores": os.cpu_count(), "threads": th.get_num_threads()},
    }


def cpu_name() -> str:
    """The processor's name and its vector extensions."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in text]
    return f"{names[0] if names else platform.processor()} ({', '.join(flags)})"


def commit() -> str | None:
    """The commit of the checkout, with a ``+`` if tracked files differ from it; ``None`` outside one."""
    try:
        where = Path(__file__).parent
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=where, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
