"""Training runs that give the locomotion datasets their policies: seeded, resumable, stopped at stated levels of return."""

import csv
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th
from sb3_contrib import TQC
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from tqdm import tqdm

ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {"SAC": SAC, "TQC": TQC}
# Seeds of the evaluation episodes: the same at every evaluation, and none that training uses.
EVALUATION_SEED = 1_000_000
MEDIUM, EXPERT, REPLAY, CURVE = "medium.zip", "expert.zip", "medium-replay.npz", "curve.csv"


@dataclass(frozen=True)
class TrainingPlan:
    """One training run and the levels at which its policies are taken.

    The run goes in stretches of ``stretch_steps`` env steps. A stretch begins with a seed of its own and fresh episodes, and ends
    with an evaluation and a checkpoint: so a resumed run equals an uninterrupted one, to the bit, on the same machine.

    :param env_id: environment, as registered in Gymnasium
    :param algorithm: class that is trained
    :param arguments: its constructor's arguments, beside policy, env, seed, device and ``buffer_size`` (which holds ``max_steps``)
    :param medium_return: the medium policy is the first whose evaluated return reaches this; ``None`` for the first
        stretch's
    :param expert_return: the expert policy is the first after it that reaches this, where training ends; ``None`` for the next
        stretch's
    :param max_steps: env steps after which the run is given up
    :param stretch_steps: env steps between evaluations, a multiple of the arguments' ``train_freq``
    :param n_eval_episodes: episodes of an evaluation, of the deterministic policy
    :param seed: seed of the run
    """

    env_id: str
    algorithm: Literal["SAC", "TQC"]
    arguments: dict[str, Any]
    medium_return: float | None
    expert_return: float | None
    max_steps: int
    stretch_steps: int = 10_000
    n_eval_episodes: int = 10
    seed: int = 0


class Evaluation(NamedTuple):
    """An evaluation of the deterministic policy.

    :param step: env steps trained
    :param mean: mean return of the episodes
    :param std: their standard deviation
    :param seconds: wall-clock seconds spent on training up to here, evaluations left out
    """

    step: int
    mean: float
    std: float
    seconds: float

    def reaches(self, level: float | None) -> bool:
        """Whether the mean return is at least this; any is where there is no level."""
        return level is None or self.mean >= level


class LevelNotReachedError(RuntimeError):
    """A training run ended below the stated return."""


def train(
    plan: TrainingPlan, folder: Path, until: Literal["medium", "expert"] = "expert", progress_bar: bool = True
) -> list[Evaluation]:
    """Train until a level is reached, or go on with a run that was interrupted or stopped at the medium level.

    The folder then holds ``medium.zip`` and ``medium-replay.npz`` (all transitions up to the medium policy), ``expert.zip``,
    ``curve.csv`` (the evaluations) and ``plan.json``. The policies are models of SB3.

    :param plan: the run
    :param folder: where the run lives; made if missing
    :param until: level to train to
    :param progress_bar: whether to show one
    :return: the run's evaluations
    :raises ValueError: if the folder holds a run of another plan
    :raises LevelNotReachedError: if ``max_steps`` did not suffice
    """
    _claim(folder, plan)
    goal = folder / (MEDIUM if until == "medium" else EXPERT)
    if goal.exists():
        return read_curve(folder / CURVE)
    model, curve = _restore(folder, plan)
    with _single_thread(), tqdm(total=plan.max_steps, initial=model.num_timesteps, unit="step", disable=not progress_bar) as bar:
        bar.set_description(plan.env_id)
        while not goal.exists():
            if model.num_timesteps >= plan.max_steps:
                raise LevelNotReachedError(_not_reached(plan, folder, curve))
            seconds = _train_stretch(model, plan, bar) + (curve[-1].seconds if curve else 0.0)
            curve.append(_evaluate(model, plan, seconds))
            bar.set_postfix({"return": f"{curve[-1].mean:.0f}"})
            _write_curve(folder / CURVE, curve)
            _take_policy(model, plan, folder, curve)
            _save_checkpoint(model, folder, curve)
    if until == "expert":
        shutil.rmtree(folder / "checkpoints")
    model.get_env().close()  # type: ignore[union-attr]
    return curve


def _train_stretch(model: OffPolicyAlgorithm, plan: TrainingPlan, bar: "tqdm[Any]") -> float:
    """Train for one stretch; seconds that it took."""
    begin = time.perf_counter()
    # 1000 seeds to a run: a stretch of another run never repeats this one's.
    model.set_random_seed(1_000 * plan.seed + model.num_timesteps // plan.stretch_steps)
    # A fresh episode: that of the last stretch may not have survived the interruption.
    model._last_obs = None
    model.learn(plan.stretch_steps, callback=_Progress(bar), reset_num_timesteps=False)
    return time.perf_counter() - begin


def _evaluate(model: OffPolicyAlgorithm, plan: TrainingPlan, seconds: float) -> Evaluation:
    env = make_vec_env(plan.env_id, n_envs=plan.n_eval_episodes, seed=EVALUATION_SEED)
    returns, _ = evaluate_policy(model, env, plan.n_eval_episodes, return_episode_rewards=True, warn=False)
    env.close()
    return Evaluation(model.num_timesteps, float(np.mean(returns)), float(np.std(returns)), seconds)


def _take_policy(model: OffPolicyAlgorithm, plan: TrainingPlan, folder: Path, curve: list[Evaluation]) -> None:
    """Keep the model if it is the first to reach the medium level or, after that, the expert level."""
    *before, now = curve
    if not any(e.reaches(plan.medium_return) for e in before):
        if now.reaches(plan.medium_return):
            with _replacing(folder / REPLAY) as path:
                _save_transitions(model, path)
            with _replacing(folder / MEDIUM) as path:
                model.save(path)
    elif now.reaches(plan.expert_return):
        with _replacing(folder / EXPERT) as path:
            model.save(path)


def _save_transitions(model: OffPolicyAlgorithm, path: Path) -> None:
    """Write the replay buffer's transitions: arrays of ``(steps, ...)``, actions in the env's units."""
    buffer = model.replay_buffer
    assert buffer is not None
    assert not buffer.full
    # (buffer_size, 1 env, ...) -> (steps, ...)
    stored = {
        name: getattr(buffer, name)[: buffer.pos, 0]
        for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    }
    np.savez_compressed(
        path,
        observations=stored["observations"],
        next_observations=stored["next_observations"],
        actions=model.policy.unscale_action(stored["actions"]),
        rewards=stored["rewards"],
        terminations=(stored["dones"] > 0) & (stored["timeouts"] == 0),
        truncations=stored["timeouts"] > 0,
    )


def _claim(folder: Path, plan: TrainingPlan) -> None:
    """Write the plan into a new folder; in an old one check that it is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    if not path.exists():
        with _replacing(path) as new:
            new.write_text(json.dumps(asdict(plan), indent=2) + "\n")
    elif json.loads(path.read_text()) != json.loads(json.dumps(asdict(plan))):
        raise ValueError(
            f"{folder} holds a training run with other settings (see plan.json there): delete it, or choose another cache folder."
        )


def _restore(folder: Path, plan: TrainingPlan) -> tuple[OffPolicyAlgorithm, list[Evaluation]]:
    """The model and the evaluations of the last checkpoint, or a new model."""
    cls = ALGORITHMS[plan.algorithm]
    env = make_vec_env(plan.env_id)
    checkpoints = sorted((folder / "checkpoints").glob("*[0-9]"))
    if not checkpoints:
        # A copy: SB3 writes into the `policy_kwargs` that it is given. One place more than steps: the buffer never begins anew.
        arguments = {**deepcopy(plan.arguments), "buffer_size": plan.max_steps + 1, "device": "cpu", "seed": plan.seed}
        return cls("MlpPolicy", env, **arguments), []
    model = cls.load(checkpoints[-1] / "model.zip", env=env, device="cpu")
    model.load_replay_buffer(checkpoints[-1] / "replay_buffer.pkl")
    return model, read_curve(checkpoints[-1] / CURVE)


def _save_checkpoint(model: OffPolicyAlgorithm, folder: Path, curve: list[Evaluation]) -> None:
    """Write a checkpoint under another name, then rename it: it is there whole or not at all."""
    path = folder / "checkpoints" / f"{model.num_timesteps:09d}"
    older = list(path.parent.glob("*"))
    new = path.with_suffix(".tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.save(new / "model.zip")
    model.save_replay_buffer(new / "replay_buffer.pkl")
    _write_curve(new / CURVE, curve)
    new.rename(path)
    for old in older:
        shutil.rmtree(old, ignore_errors=True)


def _write_curve(path: Path, curve: list[Evaluation]) -> None:
    with _replacing(path) as new, new.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Evaluation._fields)
        writer.writerows((e.step, f"{e.mean:.3f}", f"{e.std:.3f}", f"{e.seconds:.1f}") for e in curve)


def read_curve(path: Path) -> list[Evaluation]:
    """The evaluations of a training run, from its ``curve.csv``."""
    with path.open() as file:
        return [Evaluation(int(r["step"]), float(r["mean"]), float(r["std"]), float(r["seconds"])) for r in csv.DictReader(file)]


def _not_reached(plan: TrainingPlan, folder: Path, curve: list[Evaluation]) -> str:
    level, wanted = ("expert", plan.expert_return) if (folder / MEDIUM).exists() else ("medium", plan.medium_return)
    best = max(curve, key=lambda e: e.mean)
    return (
        f"{plan.algorithm} on {plan.env_id} with seed {plan.seed} did not reach the {level} level, a return of {wanted}, in "
        f"{plan.max_steps} steps (best: {best.mean:.0f} at step {best.step}). Try another training seed."
    )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` at the block's end and is removed if the block fails."""
    new = path.with_name(f"new-{path.name}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Networks this small run fastest on one thread, and a sum over several need not be the same twice."""
    threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(threads)


class _Progress(BaseCallback):
    """Moves a bar that spans all stretches."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        super().__init__()
        self.bar = bar

    def _on_step(self) -> bool:
        self.bar.update(self.num_timesteps - self.bar.n)
        return True
