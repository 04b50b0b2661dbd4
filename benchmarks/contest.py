"""Contestants that are timed in turn, each in a process of its own, so that a change in the machine's speed hits all alike."""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Task = Callable[[], object]
RESULTS = Path(__file__).parent / "results"
WARM_UP = 3


def serve(tasks: Mapping[str, Task]) -> None:
    """Be a contestant: read `task count` lines, answer each with the median milliseconds of so many calls."""
    print("ready", flush=True)
    for line in sys.stdin:
        task, count = line.rsplit(" ", 1)
        for _ in range(WARM_UP):
            tasks[task]()
        times = []
        for _ in range(int(count)):
            begin = time.perf_counter()
            tasks[task]()
            times.append(1e3 * (time.perf_counter() - begin))
        print(statistics.median(times), flush=True)


def _start(command: Sequence[str], threads: int) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert worker.stdout is not None
    while (line := worker.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"This contestant did not start: {' '.join(command)}")
    return worker


def _ask(worker: subprocess.Popen[str], task: str, count: int) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{task} {count}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def measure(
    commands: Mapping[str, Sequence[str]], tasks: Sequence[tuple[str, int, Sequence[str]]], rounds: int, threads: int
) -> list[tuple[int, str, str, float]]:
    """Rows of round, contestant, task and median milliseconds.

    :param commands: how each contestant is started
    :param tasks: name, calls a round, and the contestants that know it
    """
    workers = {name: _start(command, threads) for name, command in commands.items()}
    rows = []
    try:
        for round_ in range(rounds):
            for task, count, names in tasks:
                for name in names:
                    if name in workers:
                        rows.append((round_, name, task, _ask(workers[name], task, count)))
                        print(*rows[-1], flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
    return rows


def summary(rows: list[tuple[int, str, str, float]], ours: Sequence[str]) -> dict[str, Any]:
    """Medians over rounds, and the median over rounds of the ratio of our time to each other's in the same round."""
    result: dict[str, Any] = {}
    for task in dict.fromkeys(row[2] for row in rows):
        times = {(r, name): ms for r, name, t, ms in rows if t == task}
        rounds = sorted({r for r, _ in times})
        for name in dict.fromkeys(name for _, name in times):
            entry = {"median_ms": round(statistics.median(times[r, name] for r in rounds), 3)}
            for mine in ours:
                if name not in ours and (rounds[0], mine) in times:
                    entry[f"{mine}_over_this"] = round(statistics.median(times[r, mine] / times[r, name] for r in rounds), 3)
            result.setdefault(task, {})[name] = entry
    return result


def write(
    name: str,
    rows: list[tuple[int, str, str, float]],
    ours: Sequence[str],
    arguments: dict[str, Any],
    command: str,
    versions: dict[str, str],
) -> None:
    """``results/<name>.csv``, a row a round, contestant and task, and ``<name>.json``: command, versions, medians, ratios.

    :param ours: contestants whose ratio to each of the others is taken
    :param versions: versions of what the package's own environment does not hold
    """
    from provenance import metadata  # not at the top: a contestant's environment may lack torch

    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "contestant", "task", "median_ms"])
        writer.writerows(rows)
    described = {**metadata(arguments, command), "results": summary(rows, ours)}
    described["versions"] |= versions
    (RESULTS / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n")
    print(json.dumps(described["results"], indent=2))
