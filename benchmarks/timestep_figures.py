"""Tables and figures of the timestep samplers, from `results/timesteps/`; called by `figures.py`, or on its own."""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from scipy import stats

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "timesteps"
FIGURES, TABLES = ROOT / "docs" / "figures", ROOT / "docs" / "tables"

Rows = list[dict[str, str]]
Runs = dict[str, dict[str, dict[int, Rows]]]  # task: label: seed: rows


def read(path: Path) -> Rows:
    with path.open() as file:
        return list(csv.DictReader(file))


def load(command: str) -> Runs:
    """Runs whose seed is there for every label of the task."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for path in sorted((RESULTS / command).glob("*.csv")):
        data, arch, schedule, rest = path.stem.split("-", 3)
        label, seed = rest.rsplit("-s", 1)
        runs[f"{data}, {arch}, {schedule}"][label][int(seed)] = read(path)
    return runs


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and the half-width of its 95% interval over seeds (Student's t)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def steps_to(rows: Rows, target: float) -> float:
    """Step at which the bound passes the target, linear between evaluations; infinite if it does not."""
    steps, bounds = (np.array([float(row[name]) for row in rows]) for name in ("step", "bound"))
    below = np.flatnonzero(bounds <= target)
    if len(below) == 0:
        return float("inf")
    i = int(below[0])
    if i == 0:
        return float(steps[0])
    share = (bounds[i - 1] - target) / (bounds[i - 1] - bounds[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def last(rows: Rows, name: str) -> float:
    return float(rows[-1][name])


def share_of_steps(curves: dict[int, Rows], uniform: dict[int, Rows]) -> list[float]:
    """Of uniform's steps, to uniform's final bound of the same seed."""
    return [
        steps_to(rows, last(uniform[seed], "bound")) / last(uniform[seed], "step")
        for seed, rows in curves.items()
        if seed in uniform
    ]


def text_of_shares(shares: list[float]) -> str:
    return "not reached" if np.isinf(shares).any() else spread(shares, 2)


def comparison_table(by_label: dict[str, dict[int, Rows]]) -> str:
    cost = (
        json.loads((RESULTS / "overhead.json").read_text())["results"]["perceptron"]["over_uniform"]
        if (RESULTS / "overhead.json").exists()
        else {}
    )
    lines = [
        "| sampler | final bound | steps to uniform's final bound, of uniform's | time, of uniform's | Fréchet distance | seeds |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for label, curves in sorted(by_label.items(), key=lambda item: np.mean([last(rows, "bound") for rows in item[1].values()])):
        shares = share_of_steps(curves, by_label["uniform"])
        # A distance says something beside uniform's alone
        compared = all(rows[-1].get("frechet_clipped") for rows in by_label["uniform"].values())
        judged = [float(value) for rows in curves.values() if compared and (value := rows[-1].get("frechet_clipped"))]
        timed = label in cost and not np.isinf(shares).any()
        cells = [
            label,
            spread([last(rows, "bound") for rows in curves.values()]),
            text_of_shares(shares),
            f"{np.mean(shares) * cost[label]:.2f}" if timed else "",
            spread(judged, 2) if judged else "",
            str(len(curves)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    steps = int(max(last(rows, "step") for curves in by_label.values() for rows in curves.values()))
    note = (
        f"{steps:,} steps; means and 95% intervals over seeds. Time: share of steps times the cost of a step in the overhead table."
    )
    return "\n".join([*lines, "", note]) + "\n"


def budget_table(by_label: dict[str, dict[int, Rows]], labels: tuple[str, ...], every: int) -> str:
    """Share of uniform's steps, had the budget been shorter: nothing in the training depends on its length."""
    lines = ["| budget, steps | seeds | uniform's bound | " + " | ".join(labels) + " |", "|---|---|---|" + "---|" * len(labels)]
    uniform = by_label["uniform"]
    longest = int(max(last(rows, "step") for rows in uniform.values()))
    for budget in range(every, longest + 1, every):
        short = {
            seed: [row for row in rows if int(row["step"]) <= budget]
            for seed, rows in uniform.items()
            if last(rows, "step") >= budget
        }
        cells = [f"{budget:,}", str(len(short)), spread([last(rows, "bound") for rows in short.values()])]
        cells += [text_of_shares(share_of_steps(by_label[label], short)) for label in labels]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell_table(runs: Runs, first: str) -> str:
    """Final bound of every sampler for every task, and the share of uniform's steps."""
    labels = list(dict.fromkeys(label for by_label in runs.values() for label in by_label))
    labels.sort(key=lambda label: label != "uniform")
    lines = [
        f"| {first} | seeds | " + " | ".join(labels) + " | adaptive: share of uniform's steps |",
        "|---|---|" + "---|" * (len(labels) + 1),
    ]
    for task, by_label in runs.items():
        means = {label: [last(rows, "bound") for rows in curves.values()] for label, curves in by_label.items()}
        best = min(means, key=lambda label: np.mean(means[label]))
        cells = [
            f"**{spread(means[label])}**" if label == best else spread(means[label]) if label in means else "" for label in labels
        ]
        shares = text_of_shares(share_of_steps(by_label["adaptive"], by_label["uniform"]))
        lines.append(f"| {task} | {len(by_label['uniform'])} | {' | '.join(cells)} | {shares} |")
    steps = int(max(last(rows, "step") for by_label in runs.values() for curves in by_label.values() for rows in curves.values()))
    return "\n".join([*lines, "", f"Final held-out bound after {steps:,} steps, bits per dimension; the best in bold."]) + "\n"


def ablation_table(by_label: dict[str, dict[int, Rows]]) -> str:
    lines = ["| run | final bound | share of uniform's steps | alpha | beta |", "|---|---|---|---|---|"]
    for label, curves in by_label.items():
        learned = label != "uniform"
        cells = [label, spread([last(rows, "bound") for rows in curves.values()])]
        cells += [text_of_shares(share_of_steps(curves, by_label["uniform"]))]
        cells += [spread([last(rows, name) for rows in curves.values()], 2) if learned else "" for name in ("alpha", "beta")]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = sorted(by_label["uniform"])
    steps = int(last(by_label["uniform"][seeds[0]], "step"))
    return (
        "\n".join([*lines, "", f"{steps:,} steps, seeds {', '.join(map(str, seeds))}; concentrations of the Beta at the end."])
        + "\n"
    )


def divergence_table(by_label: dict[str, dict[int, Rows]]) -> str:
    lines = ["| sampler | seeds | final bound: median | worst | largest concentration |", "|---|---|---|---|---|"]
    for label, curves in by_label.items():
        bounds = [last(rows, "bound") for rows in curves.values()]
        largest = max(float(row[name]) for rows in curves.values() for row in rows for name in ("alpha", "beta"))
        lines.append(f"| {label} | {len(bounds)} | {np.median(bounds):.3f} | {max(bounds):.3f} | {largest:.2g} |")
    steps = int(last(next(iter(by_label["adaptive"].values())), "step"))
    return "\n".join([*lines, "", f"{steps:,} steps."]) + "\n"


def overhead_table() -> str:
    described: dict[str, Any] = json.loads((RESULTS / "overhead.json").read_text())
    blocks: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in read(RESULTS / "overhead.csv"):
        blocks[row["network"], row["sampler"]][row["block"]] = float(row["ms"])
    head = ["network", "sampler", "ms a step", "seconds over uniform's", "quartiles", "operations over uniform's"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for network, results in described["results"].items():
        for label, ratio in results["over_uniform"].items():
            timed, uniform = blocks[network, label], blocks[network, "uniform"]
            low, high = np.percentile([ms / uniform[block] for block, ms in timed.items()], [25, 75])
            cells = [network, label, f"{results['median_ms'][label]:.2f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"]
            cells.append(f"{results['operations_over_uniform'][label]:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    n_blocks = max(map(len, blocks.values()))
    note = (
        f"T = 1000, one thread of {described['hardware']['processor']}; medians over {n_blocks} blocks of 40 steps; ratios are to "
        "uniform's of the same block. Perceptron: the default one, on digits, minibatches of 128. Planner: the transformer of the "
        "maze's `cpu` preset, minibatches of 64. Operations: the floating-point operations of 40 steps."
    )
    return "\n".join([*lines, "", note]) + "\n"


def terms_table() -> str:
    """Where in the schedule the bound is."""
    shares: dict[tuple[str, str], dict[str, float]] = {}
    for row in read(RESULTS / "terms.csv"):
        last_time = int(row["end"]) - 1
        times = row["first"] if int(row["first"]) == last_time else f"{row['first']} to {last_time}"
        shares.setdefault((row["data"], row["schedule"]), {})[times] = float(row["share"])
    columns = next(iter(shares.values()))
    lines = [f"| data, schedule | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {data}, {schedule} | {' | '.join(f'{x:.0%}' for x in row.values())} |" for (data, schedule), row in shares.items()
    ]
    lines += [
        "",
        "Share of the held-out bound, less a perfect denoiser's, by times of 1000; after 1000 steps at uniform times.",
    ]
    return "\n".join(lines) + "\n"


def curves_figure(runs: Runs, path: Path) -> None:
    """A panel for each task: means over seeds, from the least to the largest."""
    figure, panels = plt.subplots(1, len(runs), figsize=(5 * len(runs) + 1, 4.2), layout="constrained", squeeze=False)
    for axes, (task, by_label) in zip(panels[0], runs.items(), strict=True):
        lowest = np.inf
        for label, curves in by_label.items():
            steps = [int(row["step"]) for row in next(iter(curves.values()))]
            bounds = np.array([[float(row["bound"]) for row in rows] for rows in curves.values()])
            axes.plot(steps, bounds.mean(0), label=label, linewidth=2.5 if label in ("adaptive", "uniform") else 1)
            axes.fill_between(steps, bounds.min(0), bounds.max(0), alpha=0.15, linewidth=0)
            lowest = min(lowest, bounds.min())
        highest = np.mean([float(rows[0]["bound"]) for rows in by_label["uniform"].values()])
        margin = 0.03 * (highest - lowest)
        axes.set(xlim=(steps[0], steps[-1]), ylim=(lowest - margin, highest + margin))
        axes.set(xlabel="training step", ylabel="held-out bound, bits per dimension")
        axes.set_title(f"{task}: mean over seeds, least to largest", fontsize=10)
    panels[0, -1].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def density_figure(by_label: dict[str, dict[int, Rows]], data: str, path: Path) -> None:
    """The density over timesteps as training goes, one column an evaluation, and the selected times of the reward."""
    rows = by_label["adaptive"][min(by_label["adaptive"])]
    density = np.array([[float(value) for value in row["density"].split()] for row in rows])
    end = int(rows[-1]["step"])
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    image = axes.imshow(density.T, origin="lower", aspect="auto", extent=(0, end, 0, 1000), cmap="viridis", norm=LogNorm(0.2, 5))
    selected = [(int(row["step"]), int(t)) for row in rows for t in row["selected"].split()]
    width = end / len(rows)
    axes.plot(
        [step - width / 2 for step, _ in selected], [t for _, t in selected], "r.", markersize=4, label="selected for the reward"
    )
    axes.set(xlabel="training step", ylabel="timestep", title=f"Adaptive sampler on {data}, one seed")
    figure.colorbar(image, ax=axes, label="density, 1: as uniform", extend="both")
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def variance_figure(path: Path) -> None:
    rows = read(RESULTS / "variance.csv")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for step in dict.fromkeys(row["step"] for row in rows):
        chosen = [row for row in rows if row["step"] == step]
        t = [int(row["t"]) for row in chosen]
        left.plot(t, [float(row["std"]) for row in chosen], label=f"after {step} steps")
        right.plot(t, [float(row["norm_of_mean"]) for row in chosen], label=f"after {step} steps")
    left.set(yscale="log", xlabel="timestep", title="gradient: root of its total variance over rows")
    right.set(yscale="log", xlabel="timestep", title="gradient: norm of its mean")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Whatever results are there."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    TABLES.mkdir(parents=True, exist_ok=True)
    compare = load("compare")
    if compare:
        curves_figure(compare, FIGURES / "timesteps-curves.png")
    for task, by_label in compare.items():
        data = task.split(", ")[0]
        density_figure(by_label, data, FIGURES / f"timesteps-density-{data}.png")
        (TABLES / f"timesteps-compare-{data}.md").write_text(comparison_table(by_label))
        budgets = budget_table(by_label, ("adaptive", "loss_second_moment", "speed"), 2000)
        (TABLES / f"timesteps-budgets-{data}.md").write_text(budgets)
    if runs := load("robustness"):
        (TABLES / "timesteps-robustness.md").write_text(cell_table(runs, "data, network, schedule"))
    for by_label in load("ablation").values():
        (TABLES / "timesteps-ablation.md").write_text(ablation_table(by_label))
    for by_label in load("divergence").values():
        (TABLES / "timesteps-divergence.md").write_text(divergence_table(by_label))
    if (RESULTS / "overhead.json").exists():
        (TABLES / "timesteps-overhead.md").write_text(overhead_table())
    if (RESULTS / "terms.csv").exists():
        (TABLES / "timesteps-terms.md").write_text(terms_table())
    if (RESULTS / "variance.csv").exists():
        variance_figure(FIGURES / "timesteps-variance.png")


if __name__ == "__main__":
    main()
