"""The tables and figures of the planners' pages, from the raw files of ``planning.py``.

python benchmarks/planning_figures.py
"""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from figures import FIGURES, RESULTS, TABLES
from matplotlib.patches import Rectangle
from scipy import stats

SOURCE = RESULTS / "planning"
# The time limits of the mazes.
EPISODE_STEPS = {"umaze": 300, "medium": 600, "umaze-goal": 300, "medium-goal": 600, "medium-goal-preset": 600}
LOCOMOTION = ("halfcheetah-medium", "halfcheetah-medium-replay", "hopper-medium", "hopper-medium-replay")
# Tasks that are compared
SAMPLERS = {"uniform": "umaze-uniform", "adaptive": "umaze-adaptive"}
FAULTS = {
    "as shipped": "umaze-uniform",
    "windows that end at the goal, at rest (not a fault)": "umaze-to-goal-at-rest",
    "windows that end at the goal, in motion": "umaze-to-goal-moving",
    "residual added to the normed input": "umaze-normed-residual",
}
LABELS = {
    "controller": "controller, no noise",
    "bc": "DiffusionBC, deterministic",
    "bc-sampled": "DiffusionBC, drawn",
    "none": "`none`",
    "none-zero": "`none`, zero noise",
    "cg": "`cg`",
    "cfg": "`cfg`",
    "mcss": "`mcss`, 50 candidates",
    "pg": "**PG**, the prior's mean",
    "pg-sampled": "**PG**, a sample of the prior",
    "pg-as-learnt": "PG, mean, denoising steps as in training",
    "pg-sampled-as-learnt": "PG, sample, denoising steps as in training",
}

Columns = dict[str, np.ndarray]


def load(task: str) -> dict[str, dict[int, Columns]]:
    """Method -> seed -> columns of its CSV."""
    found: dict[str, dict[int, Columns]] = defaultdict(dict)
    for method in LABELS:
        for path in sorted(SOURCE.glob(f"{task}-s[0-9]-{method}.csv")):
            found[method][int(path.stem.removeprefix(f"{task}-s")[0])] = read(path)
    return found


def read(path: Path) -> Columns:
    """The columns of a CSV of episodes."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def interval(seeds: dict[int, Columns], column: str) -> tuple[float, float]:
    """Mean, and half-width of its 95% interval over seeds (over episodes where there is one seed)."""
    values = [columns[column] for columns in seeds.values()]
    means = np.array([value.mean() for value in values]) if len(values) > 1 else values[0]
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    return float(means.mean()), float(half)


def table(task: str, results: dict[str, dict[int, Columns]]) -> str:
    """Markdown table of a task."""
    described = json.loads(next(iter(sorted(SOURCE.glob(f"{task}-s[0-9].json")))).read_text())
    timing = SOURCE / f"{task}-time.json"
    times = json.loads(timing.read_text())["median_ms"] if timing.exists() else {}
    is_maze = "pointmaze" in described["arguments"]["task"]["dataset_id"]
    head = ["", "seeds x episodes", "return"] + (["score that latches", "success"] if is_maze else []) + ["ms per env step"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    if is_maze:
        steps = EPISODE_STEPS[task]
        lines.append(f"| the data, over {steps} steps | | {steps * described['data']['reward_per_step']:.0f} | | | |")
    else:
        lines.append(
            f"| the data, mean of its {described['data']['episodes']} episodes | | {described['data']['mean_return']:.0f} | |"
        )
    for method, seeds in results.items():
        n_episodes = len(next(iter(seeds.values()))["return"])
        cells = [LABELS[method], f"{len(seeds)} x {n_episodes}", "{:.0f} ± {:.0f}".format(*interval(seeds, "return"))]
        if is_maze:
            cells.append("{:.0f} ± {:.0f}".format(*interval(seeds, "latched")))
            cells.append("{:.0%} ± {:.0%}".format(*interval(seeds, "success")))
        # What was timed: an action of each guidance, with the denoising steps of the evaluation
        timed = None if method.endswith("-as-learnt") else method.split("-")[0]
        cells.append(f"{times[timed]:.1f}" if timed in times else "")
        lines.append(f"| {' | '.join(cells)} |")
    trained = [json.loads(path.read_text())["training_cpu_seconds"] for path in sorted(SOURCE.glob(f"{task}-s[0-9].json"))]
    versions = ", ".join(f"{name} {described['versions'][name]}" for name in ("torch", "gymnasium", "mujoco"))
    lines += [
        "",
        f"Training took {np.mean(trained):.0f} s of CPU time a seed. {described['hardware']['processor']}, one thread; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def denoised_table() -> str:
    """Markdown table of what the planner denoises and predicts, on umaze."""
    rows = {
        ("states", "the noise (the papers)"): "umaze-states",
        ("states", "the plan"): "umaze-sample",
        ("displacements", "the noise"): "umaze-displacements-epsilon",
        ("displacements", "the plan"): "umaze-displacements",
    }
    head = ["denoises", "predicts", "seed", "episodes", "mean: return", "that latches", "success", "sample: return", "success"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (denoises, predicts), task in rows.items():
        for path in sorted(SOURCE.glob(f"{task}-s[0-9]*-pg.csv")):
            columns = read(path)
            cells = [denoises, predicts, path.stem.removeprefix(f"{task}-s").removesuffix("-pg"), str(len(columns["return"]))]
            cells += [f"{columns[name].mean():.0f}" for name in ("return", "latched")] + [f"{columns['success'].mean():.0%}"]
            sampled = path.with_name(path.name.replace("-pg.csv", "-pg-sampled.csv"))
            drawn = read(sampled) if sampled.exists() else None
            cells += ["", ""] if drawn is None else [f"{drawn['return'].mean():.0f}", f"{drawn['success'].mean():.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def comparison(what: str, tasks: dict[str, str], columns: dict[str, str]) -> str:
    """Markdown table of tasks that differ in one thing, a row each.

    :param what: differs
    :param tasks: label of each task -> its name
    :param columns: column of the raw files -> its heading and how it is written, such as ``"return .0f"``
    """
    methods = ("none", "pg", "pg-sampled")
    formats = {column: text.rsplit(" ", 1) for column, text in columns.items()}
    head = [what, "seeds"] + [f"{LABELS[method]}: {label}" for method in methods for label, _ in formats.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for label, task in tasks.items():
        results = load(task)
        cells = [label, ", ".join(map(str, results["pg"]))]
        for method in methods:
            for column, (_, form) in formats.items():
                cells.append(" ± ".join(format(number, form) for number in interval(results[method], column)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ablation_table(path: Path) -> str:
    """Markdown table of ``planning_ablation.py``: a row a variant, of its episodes' means."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    head = ["variant", "mean: return", "that latches", "success", "sample: return", "that latches", "success"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = [variant]
        for acting in ("mean", "sample"):
            own = [row for row in rows if (row["variant"], row["acting"]) == (variant, acting)]
            values = {name: np.array([float(row[name]) for row in own]) for name in ("return", "latched", "success")}
            cells += [f"{values['return'].mean():.0f}", f"{values['latched'].mean():.0f}", f"{values['success'].mean():.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plans_table() -> str:
    """Markdown table of whether first plans go through walls, and come by the goal."""
    lines = ["| maze, seed | plans | a state in a wall | by the goal |", "|---|---|---|---|"]
    for path in sorted(SOURCE.glob("*-plans.json")):
        described = json.loads(path.read_text())
        maze = path.stem.rsplit("-s", 1)[0]
        for method in LABELS:
            if method in described["results"]:
                entry = described["results"][method]
                cells = [f"{maze}, {described['arguments']['seed']}", LABELS[method]]
                cells += [f"{entry[name]:.0%}" for name in ("with_a_state_in_a_wall", "by_the_goal")]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_maze(axes: Any, maze_map: list[list[Any]]) -> None:
    """Walls, in the coordinates of PointMaze."""
    height, width = len(maze_map), len(maze_map[0])
    for i, row in enumerate(maze_map):
        for j, cell in enumerate(row):
            if cell == 1:
                axes.add_patch(Rectangle((j - width / 2, height / 2 - i - 1), 1, 1, color="0.8"))
    axes.set(xlim=(-width / 2, width / 2), ylim=(-height / 2, height / 2), xticks=[], yticks=[])
    axes.set_aspect("equal")


def paths_figure(path: Path, out: Path) -> None:
    """A panel for each guidance: executed paths as lines, the first plans as dots."""
    described = json.loads(path.read_text())
    methods = [name for name in LABELS if name in described["methods"] and not name.endswith("-as-learnt")]
    columns = (len(methods) + 1) // 2
    height = 22 / columns * len(described["maze"]) / len(described["maze"][0]) + 0.8
    figure, grid = plt.subplots(2, columns, figsize=(11, height), layout="constrained")
    for axes in grid.flat[len(methods) :]:
        axes.axis("off")
    for axes, method in zip(grid.flat, methods, strict=False):
        draw_maze(axes, described["maze"])
        entry = described["methods"][method]
        for i, (plan, walked) in enumerate(zip(entry["plans"], entry["paths"], strict=True)):
            axes.plot(*np.array(walked).T, color=f"C{i}", linewidth=1.2)
            axes.plot(*np.array(plan).T, "o", color=f"C{i}", markersize=3)
        axes.plot(*np.array(described["goals"]).T, "*", color="k", markersize=11)
        axes.set_title(LABELS[method].replace("`", "").replace("*", ""), fontsize=10)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def value_figure(results: dict[str, dict[int, Columns]], out: Path) -> None:
    """The critic's value of an episode's first plan against the return achieved, of all seeds."""
    methods = [name for name in ("none", "cg", "cfg", "mcss", "pg", "pg-sampled") if name in results]
    figure, grid = plt.subplots(2, 3, figsize=(10, 6), sharex=True, sharey=True, layout="constrained")
    for axes in grid.flat[len(methods) :]:
        axes.axis("off")
    for axes, method in zip(grid.flat, methods, strict=False):
        values, returns = (np.concatenate([c[name] for c in results[method].values()]) for name in ("plan_value", "return"))
        axes.scatter(values, returns, s=8, alpha=0.5)
        rank = stats.spearmanr(values, returns).statistic if values.std() and returns.std() else float("nan")
        axes.set_title(f"{method}: rank correlation {rank:.2f}")
    figure.supxlabel("value of the first plan (discounted return, by the critic)")
    figure.supylabel("return achieved")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    for path in sorted(SOURCE.glob("*-s0.json")):
        task = path.stem.removesuffix("-s0")
        results = load(task)
        if task not in (*EPISODE_STEPS, *LOCOMOTION) or not results:
            continue
        (TABLES / f"planning-{task}.md").write_text(table(task, results))
        if "-goal" not in task:
            value_figure(results, FIGURES / f"planning-{task}-value.png")
    (TABLES / "planning-denoised.md").write_text(denoised_table())
    (TABLES / "planning-plans.md").write_text(plans_table())
    samplers = comparison("timesteps", SAMPLERS, {"plan_value": "plan's value .1f", "return": "return .1f"})
    (TABLES / "planning-samplers.md").write_text(samplers)
    (TABLES / "planning-faults.md").write_text(comparison("", FAULTS, {"return": "return .0f", "success": "success .0%"}))
    (TABLES / "planning-ablation.md").write_text(ablation_table(SOURCE / "umaze-uniform-ablation.csv"))
    for path in sorted(SOURCE.glob("*-paths.json")):
        paths_figure(path, FIGURES / f"planning-{path.stem}.png")


if __name__ == "__main__":
    main()
