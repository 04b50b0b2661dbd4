"""What the timestep samplers cost, and how much gradients vary over the timesteps.

    python benchmarks/timestep_measures.py overhead
    python benchmarks/timestep_measures.py variance
    python benchmarks/timestep_measures.py terms

`overhead` trains one model for each sampler in turn, 40 steps at a time, so that all see the same machine, and compares the
process's own seconds (`time.process_time`), on one thread; T = 1000, for the default network of `MlpDenoiser` on digits and for the
planner's network of the `cpu` preset on windows of a maze. It also counts the floating-point operations of those 40 steps, which
no other program disturbs.
`variance` trains a model with uniform timesteps and looks at 64 rows' losses and gradients at 50 timesteps every so often: the norm
of the mean gradient, and the root of the gradients' total variance. `terms` trains with uniform timesteps for 1000 steps, at the
sizes of the robustness runs, and says where in the schedule the held-out bound is. All write to `results/timesteps/`.
"""

import argparse
import copy
import csv
import itertools
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch as th
from provenance import metadata
from timesteps import N_TIMES, RESULTS, SCHEDULES, Fleet, HeldOutBound, Run, Task, load_data, make_network, make_sampler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sb3_diffrl.diffusion import DiffusionProcess, DiT1d, MlpDenoiser, make_schedule
from sb3_diffrl.planner import PRESETS
from sb3_diffrl.timesteps import TimestepSampler, timestep_statistics

TIMED: dict[str, dict[str, Any] | None] = {
    "uniform": None,
    "loss_second_moment": None,
    "adaptive": None,
    "published": None,
}
BLOCK, N_BLOCKS, WARM_UP = 40, 14, 40


class Loop:
    """A plain training loop."""

    def __init__(self, network: nn.Module, x: th.Tensor, sampler: TimestepSampler, batch: int) -> None:
        self.network, self.x, self.batch = network, x, batch
        self.process = DiffusionProcess(make_schedule("linear", N_TIMES))
        self.sampler = sampler.setup(self.process, tuple(x.shape[1:]))
        self.optimizer = th.optim.Adam(network.parameters(), 1e-3, fused=True)

    def denoise(self, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        output: th.Tensor = self.network(x_t, self.process.schedule.network_time(t))
        return output

    def steps(self, n: int) -> None:
        for _ in range(n):
            x0 = self.x[th.randint(len(self.x), (self.batch,))]
            t, weight = self.sampler.sample(x0)
            loss = self.process.denoising_loss(self.denoise, x0, t, th.randn_like(x0))

            def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor, x0: th.Tensor = x0) -> th.Tensor:
                return self.process.bound_terms(self.denoise, x0[rows], t, noise)

            with self.sampler.around_step(x0, loss, bound_terms):
                self.optimizer.zero_grad()
                (weight * loss).mean().backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()


def networks() -> dict[str, tuple[nn.Module, th.Tensor, int]]:
    """What the overhead is measured on: network, data, minibatch."""
    preset = PRESETS["pointmaze"]["cpu"]
    sizes = preset["policy_kwargs"]
    windows = load_data(Task("maze", "dit")).train
    # (n, 8, dim) -> (n, horizon, dim): the sizes matter, not what is in there
    plans = windows.repeat(1, 2, 1)[:, : preset["horizon"]]
    transformer = DiT1d(plans.shape[2], plans.shape[1], d_model=sizes["d_model"], head_dim=sizes["head_dim"])
    return {
        "perceptron": (MlpDenoiser(64, 0), load_data(Task()).train, 128),
        "planner": (transformer, plans, preset["batch_size"]),
    }


def overhead() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    results = {}
    for network, (module, x, batch) in networks().items():
        timed, results[network] = time_samplers(module, x, batch)
        rows += [{"network": network, **row} for row in timed]
    return rows, results


def time_samplers(network: nn.Module, x: th.Tensor, batch: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    loops = {name: Loop(copy.deepcopy(network), x, make_sampler(name, settings), batch) for name, settings in TIMED.items()}
    for loop in loops.values():
        loop.steps(WARM_UP)
    operations = {}
    for name, loop in loops.items():
        with FlopCounterMode(display=False) as counter:
            loop.steps(BLOCK)
        operations[name] = counter.get_total_flops()
    rows: list[dict[str, Any]] = []
    for block in range(N_BLOCKS):
        for name, loop in loops.items():
            start = time.process_time()
            loop.steps(BLOCK)
            rows.append({"block": block, "sampler": name, "ms": f"{(time.process_time() - start) / BLOCK * 1000:.4f}"})
    # Of the same block, since the machine's speed drifts
    uniform = {row["block"]: float(row["ms"]) for row in rows if row["sampler"] == "uniform"}
    ratios = {n: median(float(row["ms"]) / uniform[row["block"]] for row in rows if row["sampler"] == n) for n in loops}
    milliseconds = {name: median(float(row["ms"]) for row in rows if row["sampler"] == name) for name in loops}
    operations = {name: count / operations["uniform"] for name, count in operations.items()}
    return rows, {"median_ms": milliseconds, "over_uniform": ratios, "operations_over_uniform": operations}


def variance() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    th.manual_seed(100)
    task = Task()
    x = load_data(task).train
    loop = Loop(make_network(task, x), x, make_sampler("uniform", None), task.batch)
    rows, done = [], 0
    for step in (100, 1000, 4000):
        loop.steps(step - done)
        done = step
        times = th.linspace(0, N_TIMES - 1, 50).round().long()
        measured = timestep_statistics(loop.denoise, loop.network.parameters(), loop.process, x[:64], times)
        for t, loss, norm, std in zip(times.tolist(), *(values.tolist() for values in measured), strict=True):
            rows.append({"step": step, "t": t, "loss": f"{loss:.6g}", "norm_of_mean": f"{norm:.6g}", "std": f"{std:.6g}"})
    return rows, {}


def terms() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for name, schedule in itertools.product(("maze", "digits"), SCHEDULES):
        task = Task(name, "mlp", schedule, batch=32, width=64)
        data = load_data(task)
        fleet = Fleet([Run("uniform", make_sampler("uniform", None), 1000)], task, data)
        for _ in range(1000):
            fleet.step()
        offset = fleet.process.schedule.bound_coefficients(th.arange(N_TIMES)).offset.double() / math.log(2)
        # What a perfect denoiser would have less, whatever the time
        excess = HeldOutBound(fleet.process, data.held_out).per_time(fleet.denoiser(0, True)) - offset
        for first, end in ((0, 1), (1, 10), (10, 100), (100, 900), (900, 990), (990, 999), (999, 1000)):
            share = float(excess[first:end].sum() / excess.sum())
            rows.append({"data": name, "schedule": schedule, "first": first, "end": end, "share": f"{share:.4f}"})
    return rows, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["overhead", "variance", "terms"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    th.set_num_threads(1)
    rows, results = {"overhead": overhead, "variance": variance, "terms": terms}[args.command]()
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / f"{args.command}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    description = metadata({"num_train_timesteps": N_TIMES}, " ".join(["python", *sys.argv]))
    (args.results / f"{args.command}.json").write_text(json.dumps(description | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
