"""Scores of runs, from the logs of RL Zoo, of Stable-Baselines3 and of this package's benchmarks."""

import csv
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rliable import library
from scipy import stats
from stable_baselines3.common.monitor import LoadMonitorResultsError, load_results

# Of arch, which rliable calls as it was called before.
warnings.filterwarnings("ignore", message="random_state is deprecated", category=FutureWarning)

#: Resamplings of the bootstrap.
REPS = 2_000


@dataclass(frozen=True)
class Curve:
    """Returns of one run.

    :param label: what the run is one of, usually the algorithm
    :param task: env or dataset
    :param run: where it comes from
    :param steps: env steps or gradient steps, ``(n,)``
    :param returns: mean return of the evaluation (or of training episodes) there, ``(n,)``
    """

    label: str
    task: str
    run: str
    steps: np.ndarray
    returns: np.ndarray


def read_curves(sources: Iterable[str | Path], monitor: bool = False, window: int = 20) -> list[Curve]:
    """Find runs below folders.

    :param sources: folders with ``evaluations.npz`` (SB3's ``EvalCallback``, RL Zoo), ``monitor.csv`` files (SB3's ``Monitor``) or
        this package's benchmark files (``step, episode, return``), at any depth; ``"label=folder"`` names what is in it
    :param monitor: read training episodes from ``monitor.csv`` in place of evaluations
    :param window: episodes that these are averaged over
    :raises FileNotFoundError: if a folder has no runs
    """
    curves: list[Curve] = []
    for source in sources:
        label, _, path = str(source).rpartition("=")
        root = Path(path)
        if monitor:
            found = [_monitored(folder, label, window) for folder in sorted({file.parent for file in root.rglob("*monitor.csv")})]
        else:
            found = [_evaluated(file, label) for file in sorted(root.rglob("evaluations.npz"))]
            found += [_benchmarked(file, label) for file in sorted([root] if root.suffix == ".csv" else root.rglob("*.csv"))]
        curves += [curve for curve in found if curve is not None]
        if not any(found):
            kind = "monitor.csv" if monitor else "evaluations.npz"
            raise FileNotFoundError(f"There is no {kind} in or below {root}.")
    return curves


def _named(folder: Path, label: str) -> tuple[str, str]:
    # logs/<algo>/<Env>_<n>
    task = re.sub(r"_\d+$", "", folder.name)
    return label or folder.parent.name, task


def _evaluated(path: Path, label: str) -> Curve | None:
    with np.load(path) as data:
        steps, returns = data["timesteps"], data["results"].mean(axis=1)
    return Curve(*_named(path.parent, label), str(path.parent), steps, returns)


def _monitored(folder: Path, label: str, window: int) -> Curve | None:
    try:
        table = load_results(str(folder))
    except LoadMonitorResultsError:
        return None
    returns, steps = table["r"].to_numpy(), table["l"].to_numpy().cumsum()
    size = min(window, len(returns))
    if size == 0:
        return None
    smooth = np.convolve(returns, np.ones(size) / size, mode="valid")
    return Curve(*_named(folder, label), str(folder), steps[size - 1 :], smooth)


def _benchmarked(path: Path, label: str) -> Curve | None:
    with path.open() as file:
        if next(csv.reader(file), [])[:3] != ["step", "episode", "return"]:
            return None
    returns: dict[int, list[float]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            returns[int(row["step"])].append(float(row["return"]))
    described = path.with_suffix(".json")
    known = json.loads(described.read_text())["arguments"] if described.exists() else {}
    task = str(known.get("env") or known.get("dataset") or path.stem)
    name = label or path.stem.split(f"-{task}-")[0]
    means = np.array([np.mean(values) for values in returns.values()])
    return Curve(name, task, str(path), np.array(list(returns)), means)


def common_grid(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Curves at the same steps: those of the run with the fewest, where all have been.

    :return: steps ``(n,)`` and returns ``(n_runs, n)``, interpolated linearly
    """
    start, end = max(curve.steps[0] for curve in curves), min(curve.steps[-1] for curve in curves)
    grid = min((curve.steps for curve in curves), key=len)
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):
        grid = np.array([end])
    return grid, np.stack([np.interp(grid, curve.steps, curve.returns) for curve in curves])


def iqm_curve(scores: np.ndarray, reps: int = REPS) -> tuple[np.ndarray, np.ndarray]:
    """Interquartile mean over runs, with 95% intervals from a bootstrap over runs.

    :param scores: ``(n_runs, n)``
    :return: IQM ``(n,)`` and its interval ``(2, n)``; with one run, the run and no width
    """
    if len(scores) == 1:
        return scores[0], np.stack([scores[0], scores[0]])
    # rliable's axes: (runs, tasks, steps)
    by_task = scores[:, None, :]

    def iqm(x: np.ndarray) -> np.ndarray:
        # rliable's aggregate_iqm() of every step at once
        return np.asarray(stats.trim_mean(x.reshape(-1, x.shape[-1]), 0.25, axis=0))

    points, intervals = library.get_interval_estimates({"runs": by_task}, iqm, reps=reps, random_state=np.random.RandomState(0))
    return points["runs"], intervals["runs"]


def final_scores(curves: Sequence[Curve], scale: dict[str, tuple[float, float]] | None = None) -> dict[str, np.ndarray]:
    """Last scores of runs by label, in rliable's form.

    :param scale: return that counts as 0 and as 1, by task; by default the lowest and the highest of all last evaluations
    :return: label -> ``(n_runs, n_tasks)``; where labels have different numbers of runs, the first ones
    :raises ValueError: if a label lacks a task
    """
    tasks = sorted({curve.task for curve in curves})
    by: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for curve in curves:
        by[curve.label][curve.task].append(float(curve.returns[-1]))
    scores = {}
    for label, found in by.items():
        missing = [task for task in tasks if task not in found]
        if missing:
            raise ValueError(f"{label} has no run on {', '.join(missing)}: profiles compare the same tasks.")
        n_runs = min(len(values) for values in found.values())
        columns = []
        for task in tasks:
            every = [value for other in by.values() for value in other.get(task, [])]
            low, high = (scale or {}).get(task, (min(every), max(every)))
            columns.append((np.array(found[task][:n_runs]) - low) / ((high - low) or 1.0))
        scores[label] = np.stack(columns, axis=1)
    return scores
