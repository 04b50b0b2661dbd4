"""Train by the shipped YAML, as ``sb3-diffrl train`` does, and write what the evaluations gave.

    python benchmarks/zoo.py --algo nclql --env MountainCarContinuous-v0 --seed 0 --eval-freq 2000

Writes ``results/zoo/<algo>-<env>-s<seed>.csv`` (a row an evaluated episode) and a ``.json`` beside it with the command, the
versions, the hardware and the settings. Runs that are complete are skipped; one that was stopped starts anew.
"""

import argparse
import csv
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from provenance import metadata

from sb3_diffrl.cli import main as sb3_diffrl
from sb3_diffrl.configs import load_yaml

RESULTS = Path(__file__).parent / "results" / "zoo"


def run(algo: str, env: str, seed: int, eval_freq: int, eval_episodes: int, out: Path) -> None:
    name = f"{algo}-{env}-s{seed}"
    if (out / f"{name}.csv").exists():
        print(f"{name}: complete")
        return
    with tempfile.TemporaryDirectory() as logs:
        words = [
            "train",
            "--algo",
            algo,
            "--env",
            env,
            "--seed",
            str(seed),
            "--num-threads",
            "1",
            "--device",
            "cpu",
            "--logs",
            logs,
        ]
        words += ["--eval-freq", str(eval_freq), "--eval-episodes", str(eval_episodes), "--verbose", "0", "--no-progress"]
        if sb3_diffrl(words) != 0:
            raise SystemExit(f"{name}: not complete")
        (folder,) = (Path(logs) / algo).iterdir()
        settings = load_yaml(folder / env / "config.yml")
        with np.load(folder / "evaluations.npz") as data:
            steps, returns, lengths = data["timesteps"], data["results"], data["ep_lengths"]
    out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/zoo.py --algo {algo} --env {env} --seed {seed} --eval-freq {eval_freq}"
    described = metadata({"algorithm": algo, "env": env, "seed": seed, **settings}, f"{command} --eval-episodes {eval_episodes}")
    (out / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n")
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "episode", "return", "length"])
        for step, row, row_lengths in zip(steps, returns, lengths, strict=True):
            for episode, (value, length) in enumerate(zip(row, row_lengths, strict=True)):
                writer.writerow([step, episode, f"{value:.3f}", length])
    print(f"{name}: {returns[-1].mean():.1f} at {steps[-1]} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="nclql")
    parser.add_argument("--env", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--eval-freq", type=int, default=5_000)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    run(args.algo, args.env, args.seed, args.eval_freq, args.eval_episodes, args.out)


if __name__ == "__main__":
    main()
