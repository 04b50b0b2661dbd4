"""Learning curves and performance profiles, by rliable."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from rliable import library, metrics

from sb3_diffrl.plots.scores import REPS, Curve, common_grid, final_scores, iqm_curve


def plot_curves(curves: Sequence[Curve], path: str | Path, marks: dict[str, float] | None = None) -> Path:
    """Interquartile mean over runs with its 95% interval against steps, one panel for each task; single runs are drawn thin.

    :param curves: see ``read_curves()``
    :param path: file to write, its ending says in which format
    :param marks: return that counts as solved, by task
    :return: the file
    """
    tasks = sorted({curve.task for curve in curves})
    figure, panels = plt.subplots(1, len(tasks), figsize=(1 + 5 * len(tasks), 4), squeeze=False, layout="constrained")
    for axes, task in zip(panels[0], tasks, strict=True):
        for i, label in enumerate(sorted({curve.label for curve in curves})):
            _draw_label(axes, [curve for curve in curves if (curve.label, curve.task) == (label, task)], label, f"C{i}")
        if marks and task in marks:
            axes.axhline(marks[task], color="green", linestyle="--", linewidth=1, label="solved")
        axes.set(title=task, xlabel="steps", ylabel="return")
        axes.legend(fontsize=8)
    return _saved(figure, path)


def _draw_label(axes: Axes, runs: Sequence[Curve], label: str, color: str) -> None:
    if not runs:
        return
    steps, returns = common_grid(runs)
    middle, interval = iqm_curve(returns)
    axes.plot(steps, middle, color=color, label=f"{label} ({len(runs)} run{'s' * (len(runs) > 1)})")
    axes.fill_between(steps, interval[0], interval[1], color=color, alpha=0.2, linewidth=0)
    if len(runs) > 1:
        for curve in runs:
            axes.plot(curve.steps, curve.returns, color=color, alpha=0.35, linewidth=0.7)


def plot_profiles(
    curves: Sequence[Curve], path: str | Path, scale: dict[str, tuple[float, float]] | None = None, reps: int = REPS
) -> tuple[Path, dict[str, Any]]:
    """Performance profiles, aggregates and probabilities of improvement of last scores, each with 95% bootstrap intervals.

    :param curves: see ``read_curves()``
    :param path: file to write
    :param scale: return that counts as 0 and as 1, by task, see ``final_scores()``
    :param reps: resamplings of the bootstraps
    :return: the file, and the numbers in it
    """
    scores = final_scores(curves, scale)
    random = np.random.RandomState(0)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    every = np.concatenate([values.ravel() for values in scores.values()])
    taus = np.linspace(every.min(), every.max(), 101)
    profiles, profile_intervals = library.create_performance_profile(scores, taus, reps=reps)
    for label in scores:
        left.plot(taus, profiles[label], label=f"{label} ({len(scores[label])} runs)")
        left.fill_between(taus, *profile_intervals[label], alpha=0.2, linewidth=0)
    left.set(xlabel="score", ylabel="share of runs above", title="Performance profiles")
    left.legend(fontsize=8)

    aggregates = {"IQM": metrics.aggregate_iqm, "median": metrics.aggregate_median, "mean": metrics.aggregate_mean}
    points, intervals = library.get_interval_estimates(
        scores, lambda x: np.array([aggregate(x) for aggregate in aggregates.values()]), reps=reps, random_state=random
    )
    for i, label in enumerate(scores):
        heights = np.arange(len(aggregates)) + 0.8 * (i + 0.5) / len(scores) - 0.4
        low, high = intervals[label]
        middle.barh(heights, high - low, 0.7 / len(scores), left=low, color=f"C{i}", alpha=0.5)
        middle.plot(points[label], heights, "|", color="black")
    middle.set(yticks=range(len(aggregates)), yticklabels=list(aggregates), xlabel="score", title="Aggregates")

    numbers: dict[str, Any] = {
        label: {name: [float(points[label][i]), *map(float, intervals[label][:, i])] for i, name in enumerate(aggregates)}
        for label in scores
    }
    pairs = {f"{a} over {b}": (scores[a], scores[b]) for a, b in itertools.combinations(scores, 2)}
    if pairs:
        chances, chance_intervals = library.get_interval_estimates(
            pairs, metrics.probability_of_improvement, reps=reps, random_state=random
        )
        for height, name in enumerate(pairs):
            low, high = (float(bound) for bound in np.ravel(chance_intervals[name]))
            right.barh(height, high - low, 0.5, left=low, alpha=0.5)
            right.plot(chances[name], height, "|", color="black")
            numbers[name] = [float(chances[name]), low, high]
        right.axvline(0.5, color="grey", linewidth=0.8)
        right.set(yticks=range(len(pairs)), yticklabels=list(pairs), xlim=(0, 1))
    right.set(title="Probability of improvement")
    return _saved(figure, path), numbers


def _saved(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
