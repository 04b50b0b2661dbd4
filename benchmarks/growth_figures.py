"""The table and the figure of how NC-LQL's cost grows, from ``results/growth.csv``."""

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

LABELS = {
    "batch": "batch",
    "width": "width of the hidden layers",
    "n_critics": "critics",
    "n_levels": "noise levels (2 steps each)",
    "action_dim": "action dimension",
    "obs_dim": "observation dimension",
}

Curve = tuple[np.ndarray, np.ndarray]


def load(path: Path) -> dict[tuple[str, str], Curve]:
    """(task, size) -> its values and the medians in milliseconds."""
    passes: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        for row in csv.DictReader(file):
            passes[row["task"], row["size"]][int(row["value"])].append(float(row["median_ms"]))
    return {
        key: (np.array(sorted(values)), np.array([statistics.median(values[value]) for value in sorted(values)]))
        for key, values in passes.items()
    }


def exponents(curve: Curve) -> np.ndarray:
    """Slope between neighbours in the log-log plot: 0 constant, 1 proportional, 2 quadratic."""
    values, times = np.log(curve[0]), np.log(curve[1])
    return np.diff(times) / np.diff(values)


def draw(results: Path, tables: Path, figures: Path) -> None:
    """Write ``growth.md`` and ``growth.png``."""
    path = results / "growth.csv"
    if not path.exists():
        return
    curves = load(path)
    lines = ["| time of | against | milliseconds (size: time) | exponent, first to last interval |", "|---|---|---|---|"]
    for (task, size), curve in sorted(curves.items(), key=lambda item: (item[0][0] == "predict", list(LABELS).index(item[0][1]))):
        times = ", ".join(f"{value}: {median:.1f}" for value, median in zip(curve[0], curve[1], strict=True))
        slopes = ", ".join(f"{slope:.1f}" for slope in exponents(curve))
        lines.append(f"| {'`predict`' if task == 'predict' else 'an update'} | {LABELS[size]} | {times} | {slopes} |")
    described = json.loads(path.with_suffix(".json").read_text())
    lines += ["", f"{described['hardware']['processor']}, {described['hardware']['cores']} cores, two threads."]
    (tables / "growth.md").write_text("\n".join(lines) + "\n")

    figure, grid = plt.subplots(2, 4, figsize=(12, 5.5), layout="constrained")
    grid.flat[-1].axis("off")
    for axes, ((task, size), curve) in zip(grid.flat, curves.items(), strict=False):
        values, ms = curve
        axes.loglog(values, ms, "o-", color="C1" if task == "predict" else "C0")
        axes.loglog(values, ms[-1] * values / values[-1], ":", color="0.5")
        axes.set(xlabel=LABELS[size], title=task, ylim=(ms.min() / 2, ms.max() * 2))
    figure.supylabel("milliseconds; dotted: proportional")
    figure.savefig(figures / "growth.png", dpi=120)
    plt.close(figure)
