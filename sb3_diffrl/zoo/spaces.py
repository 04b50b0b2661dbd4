"""What Optuna searches for each algorithm, in the form of RL Zoo's tables."""

from collections.abc import Callable
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_offpolicy_params, sample_her_params

Sampled = dict[str, Any]
Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]
Converter = Callable[[Sampled], dict[str, Any]]

# Offline networks are wider than the critics of RL Zoo's table.
_BC_NETS = {"small": [256, 256], "medium": [256, 256, 256], "big": [512, 512, 512]}


def convert_langevin(sampled: Sampled) -> dict[str, Any]:
    """Arguments of ``LQL`` or ``NCLQL`` from a trial's parameters."""
    return convert_offpolicy_params(sampled)


def convert_offline(sampled: Sampled) -> dict[str, Any]:
    """Arguments of an offline agent from a trial's parameters."""
    hyperparams = dict(sampled)
    hyperparams["batch_size"] = 2 ** hyperparams.pop("batch_size_pow")
    for name in ("discount", "ema_decay"):
        if f"one_minus_{name}" in hyperparams:
            hyperparams[name] = 1 - hyperparams.pop(f"one_minus_{name}")
    if "net_arch" in hyperparams:
        hyperparams["policy_kwargs"] = {"net_arch": _BC_NETS[hyperparams.pop("net_arch")]}
    return hyperparams


def _langevin(trial: optuna.Trial) -> Sampled:
    return {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
        "learning_rate": trial.suggest_float("learning_rate", 5e-5, 3e-3, log=True),
        "tau": trial.suggest_float("tau", 0.002, 0.05, log=True),
        "reward_scale": trial.suggest_float("reward_scale", 0.02, 2.0, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "large"]),
    }


def sample_langevin(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """``LQL`` and ``NCLQL``: what SAC's table searches, and the scale of the rewards.

    :param trial: Optuna's
    :param n_actions: unused, RL Zoo's interface
    :param n_envs: unused, RL Zoo's interface
    :param additional_args: whether hindsight replay is used, and its arguments
    :return: arguments of the algorithm
    """
    sampled = _langevin(trial)
    if additional_args["using_her_replay_buffer"]:
        sampled = sample_her_params(trial, sampled, additional_args["her_kwargs"])
    return convert_langevin(sampled)


def _offline(trial: optuna.Trial) -> Sampled:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 9),
        "one_minus_ema_decay": trial.suggest_float("one_minus_ema_decay", 1e-4, 1e-2, log=True),
    }


def sample_diffusion_bc(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """``DiffusionBC``: optimisation, width, denoising steps. Parameters as in ``sample_langevin()``."""
    sampled = _offline(trial)
    sampled["num_inference_steps"] = trial.suggest_int("num_inference_steps", 5, 20)
    sampled["net_arch"] = trial.suggest_categorical("net_arch", list(_BC_NETS))
    return convert_offline(sampled)


def _planner(trial: optuna.Trial) -> Sampled:
    sampled = _offline(trial)
    sampled["one_minus_discount"] = trial.suggest_float("one_minus_discount", 1e-3, 3e-2, log=True)
    sampled["temperature"] = trial.suggest_float("temperature", 0.1, 1.0)
    return sampled


def sample_planner(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """``DiffusionPlanner``: optimisation, discount, temperature. Parameters as in ``sample_langevin()``."""
    return convert_offline(_planner(trial))


def sample_pg(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """``PG``: the planner's, and the weight of the KL divergence. Parameters as in ``sample_langevin()``."""
    sampled = _planner(trial)
    sampled["alpha"] = trial.suggest_float("alpha", 1e-3, 1.0, log=True)
    return convert_offline(sampled)


SAMPLERS: dict[str, Sampler] = {
    "nclql": sample_langevin,
    "lql": sample_langevin,
    "diffusion_bc": sample_diffusion_bc,
    "planner": sample_planner,
    "pg": sample_pg,
}
CONVERTERS: dict[str, Converter] = {
    "nclql": convert_langevin,
    "lql": convert_langevin,
    "diffusion_bc": convert_offline,
    "planner": convert_offline,
    "pg": convert_offline,
}
