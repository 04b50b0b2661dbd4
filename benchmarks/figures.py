"""Tables and figures of the documentation, from the raw files in ``results/``.

    python benchmarks/figures.py

Writes PNGs to ``docs/figures/`` and Markdown tables to ``docs/tables/``.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import growth_figures
import matplotlib.pyplot as plt
import numpy as np
import timestep_figures
from scipy import stats

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
FIGURES, TABLES = ROOT / "docs" / "figures", ROOT / "docs" / "tables"

Curve = dict[int, float]  # env step: mean return

LABELS = {
    "nclql-small": "NC-LQL, package defaults",
    "nclql-small-bf16": "NC-LQL, bfloat16 chains",
    "nclql-small-paper": "NC-LQL, the paper's learning rate 1e-4",
    "nclql-pendulum": "NC-LQL, tau 0.02",
    "sac-small": "SAC, learning rate 3e-4 (its default)",
    "sac-small-lr1e-3": "SAC, learning rate 1e-3",
}
# Solved from here (mean of an evaluation), and the mark of the reduced HalfCheetah runs
MARKS = {"Pendulum-v1": -200.0, "InvertedPendulum-v5": 950.0, "HalfCheetah-v5": 3000.0}


def load() -> dict[tuple[str, str], dict[int, Curve]]:
    """(env, set-up): seed: curve. A curve's points are means over the episodes of an evaluation."""
    runs: dict[tuple[str, str], dict[int, Curve]] = defaultdict(dict)
    for path in sorted((RESULTS / "learning").glob("*.csv")):
        described = json.loads(path.with_suffix(".json").read_text())["arguments"]
        returns: dict[int, list[float]] = defaultdict(list)
        with path.open() as file:
            for row in csv.DictReader(file):
                returns[int(row["step"])].append(float(row["return"]))
        if max(returns, default=0) < described["steps"]:
            print(f"{path.stem}: not complete, left out")
            continue
        setup = path.stem.split(f"-{described['env']}-")[0]
        runs[described["env"], setup][described["seed"]] = {step: float(np.mean(r)) for step, r in returns.items()}
    return runs


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95% confidence interval over seeds (Student's t; infinite for one seed)."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("inf")
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def final_table(runs: dict[tuple[str, str], dict[int, Curve]], env: str) -> str:
    lines = ["| agent | env steps | each seed | mean, 95% interval |", "|---|---|---|---|"]
    for (run_env, setup), curves in runs.items():
        if run_env != env:
            continue
        last = min(max(curve) for curve in curves.values())
        values = np.array([curve[last] for _, curve in sorted(curves.items())])
        mean, half = interval(values)
        spread = f"{mean:.0f} ± {half:.0f}" if np.isfinite(half) else f"{mean:.0f} (one seed)"
        lines.append(f"| {LABELS[setup]} | {last:,} | {', '.join(f'{value:.0f}' for value in values)} | {spread} |")
    return "\n".join(lines) + "\n"


def learning_figure(runs: dict[tuple[str, str], dict[int, Curve]], env: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, ((_, setup), curves) in enumerate(item for item in runs.items() if item[0][0] == env):
        steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
        values = np.array([[curve[step] for step in steps] for curve in curves.values()])
        color = f"C{i}"
        axes.plot(steps, values.mean(axis=0), color=color, label=f"{LABELS[setup]} ({len(curves)} seed{'s' * (len(curves) > 1)})")
        if len(values) > 1:
            bounds = np.array([interval(column) for column in values.T])
            axes.fill_between(steps, bounds[:, 0] - bounds[:, 1], bounds[:, 0] + bounds[:, 1], color=color, alpha=0.12, linewidth=0)
            axes.plot(steps, values.T, color=color, alpha=0.35, linewidth=0.7)
    if env in MARKS:
        axes.axhline(MARKS[env], color="green", linestyle="--", linewidth=1)
    low = min(min(curve.values()) for item, curves in runs.items() if item[0] == env for curve in curves.values())
    high = max(max(curve.values()) for item, curves in runs.items() if item[0] == env for curve in curves.values())
    axes.set_ylim(low - 0.1 * (high - low), high + 0.15 * (high - low))
    axes.set(xlabel="env steps", ylabel="return of the deterministic policy", title=env)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def contest_table(source: str, ours: list[str], names: dict[str, str]) -> str:
    """Medians of the contestants, and the ratio of our times to each other's in the same round."""
    described: dict[str, Any] = json.loads((RESULTS / source).read_text())
    lines = [
        f"| task | contestant | median | {' | '.join(f'{names[mine]} takes' for mine in ours)} |",
        "|---" * (3 + len(ours)) + "|",
    ]
    for task, entries in described["results"].items():
        for name, entry in sorted(entries.items(), key=lambda item: item[0] not in ours):
            ratios = (entry.get(f"{mine}_over_this") for mine in ours)
            cells = " | ".join("" if ratio is None else f"{ratio:.2f} times this" for ratio in ratios)
            lines.append(f"| {task} | {names[name]} | {entry['median_ms']:.1f} ms | {cells} |")
    hardware, versions = described["hardware"], described["versions"]
    lines += ["", f"{hardware['processor']}, {hardware['cores']} cores; {', '.join(f'{k} {v}' for k, v in versions.items())}."]
    return "\n".join(lines) + "\n"


def speed_table() -> str:
    names = {"nclql": "NC-LQL", "nclql-bf16": "NC-LQL, bfloat16 chains"}
    names |= {"reference": "authors' JAX implementation", "sac": "SB3's SAC, same nets"}
    return contest_table("speed.json", ["nclql", "nclql-bf16"], names)


def planning_speed_table() -> str:
    names = {"sb3_diffrl": "sb3_diffrl", "cleandiffuser": "CleanDiffuser", "products": "its products alone"}
    return contest_table("planning_speed.json", ["sb3_diffrl"], names)


def rule_table() -> str:
    returns: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (RESULTS / "deterministic_rule.csv").open() as file:
        for row in csv.DictReader(file):
            returns[row["env"], row["rule"]][row["model"]].append(float(row["return"]))
    envs = list(dict.fromkeys(env for env, _ in returns))
    lines = ["| rule | " + " | ".join(envs) + " |", "|---|" + "---|" * len(envs)]
    for rule in dict.fromkeys(rule for _, rule in returns):
        cells = []
        for env in envs:
            values = np.concatenate(list(returns[env, rule].values()))
            cells.append(f"{values.mean():.0f} (episodes' std {values.std():.0f})")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def value_table() -> str:
    with (RESULTS / "value_error.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name not in ("env", "model")]
    lines = ["| env | seed | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---|---|" + "---|" * len(columns)]
    lines += [f"| {row['env']} | {row['model'].rsplit('-s', 1)[1]} | " + " | ".join(row[c] for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def loading_table() -> str:
    described = json.loads((RESULTS / "loading.json").read_text())
    names = {"sb3_diffrl": "`OfflineDataset.load`", "minari": "Minari's `iterate_episodes` alone, nothing kept"}
    lines = ["| storage | | CPU seconds | peak memory of the process | of it before loading |", "|---|---|---|---|---|"]
    for key, entry in described["results"].items():
        data_format, contestant = key.split()
        cells = [
            data_format,
            names[contestant],
            f"{entry['seconds']:.2f}",
            f"{entry['mib_peak']:.0f} MiB",
            f"{entry['mib_before']:.0f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{described['hardware']['processor']}; medians; `{described['command']}`."]) + "\n"


def last_mean(path: Path) -> float:
    """Mean return at the last evaluation of a run."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    last = max(int(row["step"]) for row in rows)
    return float(np.mean([float(row["return"]) for row in rows if int(row["step"]) == last]))


def cloning_table() -> str:
    lines = ["| dataset | its mean return | actions | DiffusionBC, each seed | mean, 95% interval | of the data's |"]
    lines += ["|---|---|---|---|---|---|"]
    runs: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((RESULTS / "cloning").glob("*-s[0-9].json")):
        runs[json.loads(path.read_text())["arguments"]["dataset"]].append(path)
    for dataset, paths in runs.items():
        data = json.loads(paths[0].read_text())["data"]["mean_return"]
        for kind, suffix in (("drawn", ""), ("deterministic", "-deterministic")):
            values = np.array([last_mean(path.with_name(f"{path.stem}{suffix}.csv")) for path in paths])
            mean, half = interval(values)
            seeds = ", ".join(f"{value:.0f}" for value in values)
            lines.append(f"| `{dataset}` | {data:.0f} | {kind} | {seeds} | {mean:.0f} ± {half:.0f} | {mean / data:.0%} |")
    return "\n".join(lines) + "\n"


def makers_table() -> str:
    """Return levels of the policies and controllers behind the datasets, where they were measured."""
    lines = ["| task | policy | episodes | mean return | success |", "|---|---|---|---|---|"]
    for path in sorted((RESULTS / "makers").glob("*.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                if "policy" in row:
                    success = f"{float(row['success_rate']):.0%}" if row["success_rate"] not in ("", "nan") else ""
                    mean = f"{float(row['mean_return']):.0f} ± {1.96 * float(row['standard_error']):.0f}"
                    lines.append(f"| {row['task']} | {row['policy']} | {row['episodes']} | {mean} | {success} |")
    return "\n".join([*lines, "", "Means and 95% intervals over episodes; `python benchmarks/makers.py`."]) + "\n"


def faults_table() -> str:
    """Killed processes, fuzzed inputs and long runs."""
    rows = {path.stem: list(csv.DictReader(path.open())) for path in (RESULTS / "faults").glob("*.csv")}
    lines = ["| killed | processes | while a file was written | step of the checkpoint that was loaded | ended as promised |"]
    lines += ["|---" * 5 + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows.get("kill", [])):
        trials = [row for row in rows["kill"] if row["kind"] == kind]
        loaded = sorted(int(row["loaded_step"] or -1) for row in trials)
        unit = "steps of the dataset" if kind == "recording" else "steps"
        ok = sum(row["ok"] == "True" for row in trials)
        saving = sum(row["was_saving"] == "True" for row in trials)
        lines.append(f"| {kind} | {len(trials)} | {saving} | {', '.join(map(str, loaded))} ({unit}) | {ok} |")
    # The later run of a kind counts.
    fuzzed = {row["target"]: row for row in (*rows.get("fuzz", []), *rows.get("fuzz-datasets", []))}
    lines += ["", "| fuzzed | inputs | read | refused | other errors | crashes | ran or wrote |", "|---" * 7 + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in fuzzed.values()]
    lines += [
        "",
        "| long run | done | milliseconds each: first, last tenth | of a new model | MiB: first, last | open files | objects |",
    ]
    lines += ["|---" * 7 + "|", *_long_runs([row for name in sorted(rows) if name.startswith("long") for row in rows[name]])]
    return "\n".join([*lines, "", "`python benchmarks/faults.py kill`, `fuzz`, `fuzz-datasets`, `long`."]) + "\n"


def _long_runs(rows: list[dict[str, str]]) -> list[str]:
    lines = []
    for agent, what in dict.fromkeys((row["agent"], row["what"]) for row in rows):
        part = [row for row in rows if (row["agent"], row["what"]) == (agent, what)]
        tenth = max(1, len(part) // 10)
        columns = [
            " → ".join(f"{np.mean([float(row[name]) for row in some]):.2f}" for some in (part[:tenth], part[-tenth:]))
            for name in ("ms_each", "ms_each_of_a_new_model")
        ]
        # Between them and what it started with
        ranges = [f"{part[1 % len(part)][name]} → {part[-1][name]}" for name in ("memory_mib", "open_files", "objects")]
        lines.append(f"| {agent}, {what} | {int(part[-1]['done']):,} | " + " | ".join([*columns, *ranges]) + " |")
    return lines


def references_table() -> str:
    """The package's own random and expert references, with where they come from."""
    references = json.loads((ROOT / "sb3_diffrl" / "offline" / "references.json").read_text())
    lines = ["| env | reference | mean return | episodes | measured with |", "|---|---|---|---|---|"]
    for env, kinds in references.items():
        for kind, entry in kinds.items():
            versions = entry.get("versions", {})
            measured = ", ".join(f"{name} {versions[name]}" for name in ("gymnasium", "mujoco") if name in versions)
            lines.append(f"| {env} | {kind} | {entry['mean_return']:.1f} | {entry.get('n_episodes', '')} | {measured} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    TABLES.mkdir(parents=True, exist_ok=True)
    runs = load()
    for env in dict.fromkeys(env for env, _ in runs):
        learning_figure(runs, env, FIGURES / f"learning-{env}.png")
        (TABLES / f"learning-{env}.md").write_text(final_table(runs, env))
    tables = (
        ("speed", "speed.json", speed_table),
        ("planning_speed", "planning_speed.json", planning_speed_table),
        ("deterministic_rule", "deterministic_rule.csv", rule_table),
        ("value_error", "value_error.csv", value_table),
        ("loading", "loading.json", loading_table),
        ("cloning", "cloning", cloning_table),
        ("makers", "makers", makers_table),
        ("faults", "faults", faults_table),
    )
    for name, source, table in tables:
        if (RESULTS / source).exists():
            (TABLES / f"{name}.md").write_text(table())
    (TABLES / "references.md").write_text(references_table())
    timestep_figures.main()
    growth_figures.draw(RESULTS, TABLES, FIGURES)


if __name__ == "__main__":
    main()
