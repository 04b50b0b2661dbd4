"""Timestep samplers on scikit-learn's digits: held-out variational bound against training steps and time.

    python benchmarks/timesteps.py run [--samplers uniform adaptive ...] [--seeds 0 1 2 3 4] [--steps 12000]
    python benchmarks/timesteps.py table

`run` trains a diffusion model (T = 1000) for every sampler and seed and writes one CSV each to `results/timesteps/`, a row an evaluation;
runs whose file is there are left out, so that an interrupted command goes on when it is given again. `table` makes `table.csv` of
them: steps and seconds to the bound that uniform reaches at its end (per seed, and in the mean), the final bound, the Fréchet distance
of samples in the features of a small digit classifier, each with a 95% interval over the seeds.

The bound is that of the averaged weights, in bits per dimension, on 360 held-out images, with noise that is the same in all runs: every
one of the first 32 times on all the images, of the other times each on a sixteenth of them. Seconds are the process's own on one thread
(`time.process_time`), so that other work on the machine counts little; the clock's are beside them. Evaluations are not counted.

`--set '{"learning_rate": 0.003}'` with `--label name` runs the adaptive sampler with other arguments.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from sklearn.datasets import load_digits
from torch import nn

from sb3_diffrl.diffusion import DiffusionProcess, DiT1d, MlpDenoiser, make_schedule
from sb3_diffrl.diffusion.model import DiffusionModel
from sb3_diffrl.timesteps import AdaptiveTimestepSampler, TimestepSampler, make_timestep_sampler

RESULTS = Path(__file__).parent / "results" / "timesteps"
SAMPLERS = ("uniform", "logit_normal", "lognormal", "loss_second_moment", "min_snr", "p2", "speed", "adaptive")
BATCH, N_TIMES, HELD_OUT, DENSE, SPARSE = 128, 1000, 360, 32, 16


class Digits(NamedTuple):
    train: th.Tensor
    held_out: th.Tensor
    train_labels: th.Tensor


def digits(image: bool) -> Digits:
    """Pixels in [-1, 1], ``(n, 64)``, or ``(n, 8, 8)`` as eight tokens."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    x = th.as_tensor(pixels[order] / 8 - 1).float()
    x = x.view(-1, 8, 8) if image else x
    return Digits(x[HELD_OUT:], x[:HELD_OUT], th.as_tensor(labels[order][HELD_OUT:]))


def make_model(arch: str, schedule: str) -> DiffusionModel:
    process = DiffusionProcess(make_schedule(schedule, N_TIMES))  # type: ignore[arg-type]
    if arch == "mlp":
        return DiffusionModel(MlpDenoiser(64, 0, (256, 256, 256)), process, ema_decay=0.999)
    return DiffusionModel(DiT1d(8, 8, d_model=64, depth=2, head_dim=32, time_embedding_dim=64), process, ema_decay=0.999)


class HeldOutBound:
    """The bound of the averaged weights on the held-out images, always with the same noise."""

    def __init__(self, model: DiffusionModel, x0: th.Tensor) -> None:
        self.model, self.x0 = model, x0
        dense = th.arange(len(x0)).repeat_interleave(DENSE), th.arange(DENSE).repeat(len(x0))
        rows, t = (grid.flatten() for grid in th.meshgrid(th.arange(len(x0)), th.arange(DENSE, N_TIMES), indexing="ij"))
        kept = t % SPARSE == rows % SPARSE
        self.rows, self.t = th.cat([dense[0], rows[kept]]), th.cat([dense[1], t[kept]])
        self.noise = th.randn(len(self.rows), *x0.shape[1:], generator=th.Generator().manual_seed(0))
        self.share = 1 / th.bincount(self.t, minlength=N_TIMES)[self.t].double()

    @th.no_grad()
    def per_time(self) -> th.Tensor:
        """Terms, the mean over images, ``(T,)``."""
        process, network = self.model.process, self.model.denoiser_ema.module
        terms = th.cat(
            [
                process.bound_terms(lambda x_t, t: network(x_t, process.schedule.network_time(t)), self.x0[rows], t, noise)
                for rows, t, noise in zip(self.rows.split(4096), self.t.split(4096), self.noise.split(4096), strict=True)
            ]
        )
        return th.zeros(N_TIMES, dtype=th.float64).index_add_(0, self.t, terms.double() * self.share)

    def __call__(self) -> float:
        return float(self.per_time().sum()) + float(self.model.process.prior_term(self.x0).mean())


def features(data: Digits) -> nn.Module:
    """The hidden layer of a digit classifier, the same in every run."""
    generator_state = th.get_rng_state()
    th.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    net = nn.Sequential(body, nn.Linear(32, 10))
    optimizer = th.optim.Adam(net.parameters(), 1e-3)
    for _ in range(1000):
        rows = th.randint(len(data.train), (128,))
        loss = nn.functional.cross_entropy(net(data.train[rows]), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    th.set_rng_state(generator_state)
    return body


@th.no_grad()
def frechet_distance(body: nn.Module, a: th.Tensor, b: th.Tensor) -> float:
    (mean_a, cov_a), (mean_b, cov_b) = ((y.mean(0), th.cov(y.T)) for y in (body(x).double() for x in (a, b)))
    # tr((A B)^(1/2)), from the eigenvalues, which are not negative
    cross = th.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def train(sampler_name: str, settings: dict[str, Any], seed: int, steps: int, arch: str, schedule: str, path: Path) -> None:
    th.manual_seed(seed)
    data = digits(image=arch == "dit")
    model = make_model(arch, schedule)
    chosen: str | TimestepSampler = sampler_name
    if sampler_name == "published":
        chosen = AdaptiveTimestepSampler.published()
    elif settings:
        chosen = AdaptiveTimestepSampler(**settings)
    sampler = make_timestep_sampler(chosen, model.process, tuple(data.train.shape[1:]))
    optimizer = th.optim.Adam(model.denoiser.parameters(), 1e-3, fused=True)
    generator = th.Generator().manual_seed(seed)
    bound, body = HeldOutBound(model, data.held_out), features(data)
    wall = cpu = 0.0
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        begin = time.perf_counter(), time.process_time()
        x0 = data.train[th.randint(len(data.train), (BATCH,), generator=generator)]
        t, weight = sampler.sample(x0, generator)
        noise = th.randn(x0.shape, generator=generator)
        loss = model.loss(x0, None, t, noise)

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor, x0: th.Tensor = x0) -> th.Tensor:
            return model.bound_terms(x0[rows], None, t, noise)

        with sampler.around_step(x0, loss, bound_terms, generator):
            optimizer.zero_grad()
            (weight * loss).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.update_ema()
        wall, cpu = wall + time.perf_counter() - begin[0], cpu + time.process_time() - begin[1]
        if step % 500 == 0 or step == 100:
            rows.append({"step": step, "bound": bound(), "cpu_s": cpu, "wall_s": wall, "loss": float(loss.mean())})
            info = sampler.info()
            rows[-1] |= {name: float(info[name]) for name in ("alpha", "beta", "reward", "reward_std", "overhead") if name in info}
            if "selected_0" in info:
                rows[-1]["selected"] = " ".join(str(int(i)) for i in sampler.selected_timesteps)  # type: ignore
    start = th.randn(2000, *data.train.shape[1:], generator=th.Generator().manual_seed(0))
    with th.no_grad():
        rows[-1]["frechet"] = frechet_distance(body, model.sample(start, None, 50), th.cat([data.train, data.held_out]))
    write(path, rows)
    density = sampler.density(data.train[:256])
    print(f"{path.stem}: bound {rows[-1]['bound']:.3f} cpu {cpu:.0f}s wall {wall:.0f}s frechet {rows[-1]['frechet']:.2f}",
          "density", " ".join(f"{d:.1f}" for d in density.view(10, 5).mean(1).tolist()), rows[-1], flush=True)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--arch", choices=["mlp", "dit"], default="mlp")
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--set", type=json.loads, default={})
    parser.add_argument("--label")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    th.set_num_threads(1)
    for seed in args.seeds:
        for name in args.samplers:
            path = args.results / f"digits-{args.arch}-{args.schedule}-{args.label or name}-s{seed}.csv"
            if not path.exists():
                train(name, args.set if name == "adaptive" else {}, seed, args.steps, args.arch, args.schedule, path)


if __name__ == "__main__":
    main()
