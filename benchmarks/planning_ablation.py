"""What each choice of PG does: priors trained on one planner of ``planning.py``, with one argument changed.

    python benchmarks/planning_ablation.py --task umaze --seed 0

Writes ``results/planning/<task>-ablation.csv``, a row per episode and variant, and a ``.json``. Variants that are there
are left as they are.
"""

import argparse
import csv
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch as th
from planning import MODELS, RESULTS, load_method, open_task, read, roll_out
from planning_tasks import TASKS, prepare
from provenance import metadata

from sb3_diffrl.common import CosineSchedule
from sb3_diffrl.pg import PG

VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "no bound on plans": {"clip_sample": 1e6},
    "noise not squashed": {"squash": False},
    "neither squashed nor bounded": {"squash": False, "clip_sample": 1e6},
    "divergence of u": {"kl_of": "unsquashed"},
    "divergence averaged over steps": {"kl_reduction": "mean"},
    "value over its mean absolute": {"normalize_value": "abs"},
    "value not normalised": {"normalize_value": "none"},
    "alpha 0.1": {"alpha": 0.1},
    "alpha 1": {"alpha": 1.0},
    "alpha 0.001": {"alpha": 0.001},
    # The reference's last of ten is a no-op.
    "nine denoising steps of an action": {"num_action_steps": 9},
}
COLUMNS = ["variant", "acting", "episode", "return", "latched", "success", "plan_value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="umaze")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", type=Path, default=MODELS)
    args = parser.parse_args()
    th.set_num_threads(1)
    task = TASKS[args.task]
    path = args.out / f"{args.task}-ablation.csv"
    done = {row["variant"] for row in csv.DictReader(path.open())} if path.exists() else set()
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    command = f"python benchmarks/planning_ablation.py --task {args.task} --seed {args.seed} --steps {args.steps}"
    described = metadata({"task": task._asdict(), "seed": args.seed, "steps": args.steps, "variants": VARIANTS}, command)
    path.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n")
    data, _ = prepare(task, read(task.dataset_id))
    n_steps = open_task(task).recover_environment(eval_env=True).spec.max_episode_steps
    planner, env = load_method(args.task, task, args.seed, "none", open_task(task), args.episodes, args.models)
    planner.set_dataset(data)
    for name, settings in VARIANTS.items():
        if name in done:
            continue
        start = time.process_time()
        model = PG(
            "MlpPolicy",
            planner=planner,
            seed=args.seed,
            device="cpu",
            learning_rate=CosineSchedule(task.settings["learning_rate"]),
            batch_size=task.settings["batch_size"],
            **settings,
        ).learn(args.steps)
        model.policy.num_inference_steps = task.num_inference_steps
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            for acting in ("mean", "sample"):
                rows = roll_out(model, env, n_steps, args.seed, deterministic=acting == "mean")
                columns = [rows[column].tolist() for column in COLUMNS[3:]]
                writer.writerows([name, acting, i, *row] for i, row in enumerate(zip(*columns, strict=True)))
                print(f"{name}, {acting}: {rows['return'].mean():.1f} after {time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
