"""Statistics of ``VecNormalize`` that are read without un-pickling: RL Zoo's ``vecnormalize.pkl``, and JSON beside it."""

import json
import pickle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_diffrl.configs import UnsafeConfigError
from sb3_diffrl.saving import atomic_file

_Normalize = TypeVar("_Normalize", bound=VecNormalize)
_FLAGS = ("training", "norm_obs", "norm_reward")
_NUMBERS = ("clip_obs", "clip_reward", "gamma", "epsilon")


class JsonNormalize(VecNormalize):
    """``VecNormalize``, whose ``save()`` writes a ``.json`` beside the pickle that RL Zoo reads."""

    def save(self, save_path: str) -> None:
        """Save settings and statistics, in both forms.

        :param save_path: of the pickle
        :raises OSError: if they cannot be written; a former file is as it was
        """
        with atomic_file(save_path, "pkl") as file:
            pickle.dump(_as(VecNormalize, self), file)
        with atomic_file(Path(save_path).with_suffix(".json"), "json") as file:
            file.write(json.dumps(_described(self)).encode())


def has_statistics(folder: Path) -> bool:
    """Whether there are statistics in a folder, in either form."""
    return any((folder / f"vecnormalize.{suffix}").exists() for suffix in ("json", "pkl"))


def load_statistics(folder: Path, venv: VecEnv, trust: bool) -> JsonNormalize:
    """Wrap envs by the ``VecNormalize`` that a run was saved with.

    :param folder: has ``vecnormalize.json``, or ``vecnormalize.pkl`` alone
    :param trust: read the pickle if there is no JSON, which can run any code
    :raises FileNotFoundError: if there is neither
    :raises UnsafeConfigError: if there is a pickle alone, and it is not trusted
    :raises ValueError: if the file is damaged, or of other observations
    """
    described, pickled = folder / "vecnormalize.json", folder / "vecnormalize.pkl"
    if described.exists():
        try:
            return _rebuilt(json.loads(described.read_bytes()), venv)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
            raise ValueError(f"{described} does not hold VecNormalize's statistics of this env: {error}.") from error
    if not pickled.exists():
        raise FileNotFoundError(f"The run normalises, and {folder} has no vecnormalize.json or vecnormalize.pkl.")
    if not trust:
        raise UnsafeConfigError(
            f"{pickled} is a pickle, which can run any code, and there is no vecnormalize.json beside it. If you trust it: --trust."
        )
    return _as(JsonNormalize, VecNormalize.load(str(pickled), venv))


def _as(cls: type[_Normalize], normalize: VecNormalize) -> _Normalize:
    other = cls.__new__(cls)
    other.__setstate__(normalize.__getstate__())
    other.set_venv(normalize.venv)
    return other


def _described(normalize: VecNormalize) -> dict[str, Any]:
    described: dict[str, Any] = {name: bool(getattr(normalize, name)) for name in _FLAGS}
    described |= {name: float(getattr(normalize, name)) for name in _NUMBERS}
    described["norm_obs_keys"] = normalize.norm_obs_keys
    described["returns"] = _numbers(normalize.ret_rms)
    if normalize.norm_obs:
        rms = normalize.obs_rms
        described["observations"] = {key: _numbers(one) for key, one in rms.items()} if isinstance(rms, dict) else _numbers(rms)
    return described


def _numbers(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": rms.mean.tolist(), "var": rms.var.tolist(), "count": float(rms.count)}


def _rebuilt(described: dict[str, Any], venv: VecEnv) -> JsonNormalize:
    normalize = JsonNormalize(
        venv,
        training=bool(described["training"]),
        norm_obs=bool(described["norm_obs"]),
        norm_reward=bool(described["norm_reward"]),
        clip_obs=float(described["clip_obs"]),
        clip_reward=float(described["clip_reward"]),
        gamma=float(described["gamma"]),
        epsilon=float(described["epsilon"]),
        norm_obs_keys=described["norm_obs_keys"],
    )
    _fill(normalize.ret_rms, described["returns"])
    if normalize.norm_obs:
        rms: Any = normalize.obs_rms
        for one, numbers in (
            [(rms[key], described["observations"][key]) for key in rms]
            if isinstance(rms, dict)
            else [(rms, described["observations"])]
        ):
            _fill(one, numbers)
    return normalize


def _fill(rms: RunningMeanStd, numbers: dict[str, Any]) -> None:
    mean, var = (np.asarray(numbers[name], np.float64) for name in ("mean", "var"))
    if not mean.shape == var.shape == rms.mean.shape:
        raise ValueError(f"means of shape {mean.shape}, where the env has {rms.mean.shape}")
    rms.mean, rms.var, rms.count = mean, var, float(numbers["count"])
