"""Run every learning curve of the documentation, a few at a time, skipping those that are complete.

python benchmarks/run_learning.py --jobs 2
"""

import argparse
import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learning"

# (set-up, env, seeds, env steps, steps between evaluations, episodes an evaluation)
RUNS: list[tuple[str, str, range, int, int, int]] = [
    ("nclql-small", "HalfCheetah-v5", range(3), 50_000, 5_000, 10),
    ("nclql-small-bf16", "HalfCheetah-v5", range(3), 50_000, 5_000, 10),
    ("nclql-pendulum", "Pendulum-v1", range(3), 6_000, 1_000, 20),
    ("nclql-pendulum", "InvertedPendulum-v5", range(3), 10_000, 1_000, 20),
    ("sac-small-lr1e-3", "HalfCheetah-v5", range(3), 50_000, 5_000, 10),
    ("nclql-small", "Hopper-v5", range(3), 50_000, 5_000, 10),
    ("sac-small-lr1e-3", "Hopper-v5", range(3), 50_000, 5_000, 10),
    ("nclql-small-paper", "HalfCheetah-v5", range(3), 50_000, 5_000, 10),
    ("sac-small", "HalfCheetah-v5", range(1), 50_000, 5_000, 10),
]


def is_complete(name: str, steps: int) -> bool:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return False
    with path.open() as file:
        return any(int(row["step"]) >= steps for row in csv.DictReader(file))


def run(setup: str, env: str, seed: int, steps: int, freq: int, episodes: int) -> bool:
    name = f"{setup}-{env}-s{seed}"
    if is_complete(name, steps):
        print(f"{name}: complete", flush=True)
        return True
    command = [sys.executable, str(HERE / "learning.py"), "--setup", setup, "--env", env, "--seed", str(seed)]
    command += ["--steps", str(steps), "--eval-freq", str(freq), "--eval-episodes", str(episodes)]
    command += ["--save-model", str(HERE / "models" / name)]
    done = subprocess.run(command, check=False).returncode == 0
    print(f"{name}: {'done' if done else 'FAILED'}", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each uses one thread")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run, setup, env, seed, *budget) for setup, env, seeds, *budget in RUNS for seed in seeds]
    raise SystemExit(0 if all(run.result() for run in runs) else 1)


if __name__ == "__main__":
    main()
