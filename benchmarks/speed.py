"""Time of one full-size update and of `predict`, for NC-LQL, SB3's SAC and (optionally) the authors' JAX implementation, in turn.

    python benchmarks/speed.py --reference-python VENV/bin/python --reference-dir CLONE

HalfCheetah sizes (17 observations, 6 actions), batch 256, critics 3 x 256, two threads. Each contestant lives in a process of
its own and they are measured round by round, so that a change in the machine's speed hits all alike: quote the ratios. Run it
while nothing else runs.

The reference needs a clone of https://github.com/ku-dmlab/NCLQL and an environment with jax, dm-haiku, optax, numpyro and dill.
Writes ``results/speed.csv`` (a row a round and contestant) and ``speed.json`` (command, versions, hardware, medians and
ratios).
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OBS_DIM, ACTION_DIM, BATCH, WIDTHS, THREADS = 17, 6, 256, [256, 256, 256], 2
RESULTS = Path(__file__).parent / "results"
Task = Callable[[], object]


def sb3_tasks(name: str) -> dict[str, Task]:
    import gymnasium as gym
    import numpy as np
    import torch as th
    from stable_baselines3 import SAC
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

    from sb3_diffrl import NCLQL

    th.set_num_threads(THREADS)
    algorithm: Any = {"nclql": NCLQL, "sac": SAC}[name]
    kwargs = {"batch_size": BATCH, "policy_kwargs": {"net_arch": WIDTHS}, "learning_starts": 1_000, "device": "cpu", "seed": 0}
    model: OffPolicyAlgorithm = algorithm("MlpPolicy", gym.make("HalfCheetah-v5"), **kwargs)
    model.learn(1_001)
    obs = np.random.default_rng(0).normal(size=(BATCH, OBS_DIM)).astype(np.float32)
    return {
        "update": lambda: model.train(1, BATCH),
        "predict 1": lambda: model.predict(obs[0]),
        "predict 256": lambda: model.predict(obs),
    }


def reference_tasks(folder: str) -> dict[str, Task]:
    sys.path.insert(0, folder)
    import jax
    import jax.core
    import jax.extend.core
    import numpy as np

    if not hasattr(jax.core, "ClosedJaxpr"):  # moved by recent versions of jax
        jax.core.ClosedJaxpr = jax.extend.core.ClosedJaxpr
    from relax.algorithm.nclql import NCLQL
    from relax.network.nclql import create_NCLQL_net
    from relax.utils.experience import Experience

    agent, params = create_NCLQL_net(jax.random.key(0), OBS_DIM, ACTION_DIM, WIDTHS, jax.nn.mish)
    algorithm = NCLQL(agent, params)
    rng = np.random.default_rng(0)
    obs, next_obs = (rng.normal(size=(BATCH, OBS_DIM)).astype(np.float32) for _ in range(2))
    action = rng.uniform(-1, 1, (BATCH, ACTION_DIM)).astype(np.float32)
    reward, done = rng.normal(size=BATCH).astype(np.float32), np.zeros(BATCH, bool)
    data = Experience(obs=obs, action=action, reward=reward, done=done, next_obs=next_obs)
    keys: Iterator[Any] = iter(jax.random.split(jax.random.key(1), 100_000))
    return {
        "update": lambda: algorithm.update(next(keys), data),
        "predict 1": lambda: algorithm.get_action(next(keys), obs[0]),
        "predict 256": lambda: algorithm.get_action(next(keys), obs),
    }


def work(name: str, folder: str) -> None:
    """A contestant: reads `task count` lines, answers each with its median milliseconds."""
    tasks = reference_tasks(folder) if name == "reference" else sb3_tasks(name)
    print("ready", flush=True)
    for line in sys.stdin:
        task, count = line.rsplit(" ", 1)
        for _ in range(3):
            tasks[task]()
        times = []
        for _ in range(int(count)):
            begin = time.perf_counter()
            tasks[task]()
            times.append(1e3 * (time.perf_counter() - begin))
        print(statistics.median(times), flush=True)


def start(name: str, python: str, folder: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OPENBLAS_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
    command = [python, __file__, "--worker", name, "--reference-dir", folder]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert worker.stdout is not None
    while (line := worker.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"{name} did not start")
    return worker


def measure(worker: subprocess.Popen[str], task: str, count: int) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{task} {count}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def summary(rows: list[tuple[int, str, str, float]]) -> dict[str, Any]:
    """Medians over rounds, and the median over rounds of the ratio to NC-LQL's time in the same round."""
    result: dict[str, Any] = {}
    for task in dict.fromkeys(row[2] for row in rows):
        times = {(r, name): ms for r, name, t, ms in rows if t == task}
        rounds = sorted({r for r, _ in times})
        for name in dict.fromkeys(name for _, name in times):
            entry = {"median_ms": round(statistics.median(times[r, name] for r in rounds), 2)}
            if name != "nclql":
                entry["nclql_over_this"] = round(statistics.median(times[r, "nclql"] / times[r, name] for r in rounds), 3)
            result.setdefault(task, {})[name] = entry
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reference-python", help="interpreter of the reference's environment")
    parser.add_argument("--reference-dir", default="", help="clone of the reference's repository")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.reference_dir)
        return

    contestants = {"nclql": sys.executable, "sac": sys.executable}
    if args.reference_python:
        contestants["reference"] = args.reference_python
    workers = {name: start(name, python, args.reference_dir) for name, python in contestants.items()}
    rows = []
    for round_ in range(args.rounds):
        for task, count in (("update", 20), ("predict 1", 100), ("predict 256", 15)):
            for name, worker in workers.items():
                rows.append((round_, name, task, measure(worker, task, count)))
                print(*rows[-1], flush=True)
    for worker in workers.values():
        worker.kill()

    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "speed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "contestant", "task", "median_ms"])
        writer.writerows(rows)
    command = "python benchmarks/speed.py" + (" --reference-python PYTHON --reference-dir CLONE" if args.reference_python else "")
    from provenance import metadata

    described = {**metadata({"threads": THREADS}, command), "results": summary(rows)}
    if args.reference_python:
        code = "import jax, jaxlib; print(jax.__version__)"
        jax = subprocess.run([args.reference_python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        described["versions"]["jax (reference)"] = jax
    (RESULTS / "speed.json").write_text(json.dumps(described, indent=2) + "\n")
    print(json.dumps(described["results"], indent=2))


if __name__ == "__main__":
    main()
