"""Timestep samplers on scikit-learn's digits: held-out variational bound against training steps and time.

    python benchmarks/timesteps.py run [--samplers uniform adaptive ...] [--seeds 0 1 2 3 4] [--steps 12000]
    python benchmarks/timesteps.py table

`run` trains a diffusion model (T = 1000) for every sampler and seed and writes one CSV each to `results/timesteps/`, a row an
evaluation; runs whose file is there are left out, so that an interrupted command goes on when it is given again. `table` makes
`table.csv` of them: steps and seconds to the bound that uniform reaches at its end (per seed, and in the mean), the final bound,
the Fréchet distance of samples in the features of a small digit classifier, each with a 95% interval over the seeds.

The bound is that of the averaged weights, in bits per dimension, on 360 held-out images, with noise that is the same in all runs:
every one of the first 32 times on all the images, of the other times each on a sixteenth of them. Seconds are the process's own on
one thread (`time.process_time`), so that other work on the machine counts little; the clock's are beside them. Evaluations are not
counted.

`--set '{"learning_rate": 0.003}'` with `--label name` runs the adaptive sampler with other arguments.
"""

import argparse
import csv
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from sklearn.datasets import load_digits
from torch import nn

from sb3_diffrl.diffusion import Denoise, DiffusionProcess, DiT1d, MlpDenoiser, make_schedule
from sb3_diffrl.timesteps import AdaptiveTimestepSampler, BoundTerms, TimestepSampler
from sb3_diffrl.timesteps.factory import RULES, WEIGHTINGS

RESULTS = Path(__file__).parent / "results" / "timesteps"
SAMPLERS = ("uniform", "logit_normal", "lognormal", "loss_second_moment", "min_snr", "p2", "speed", "adaptive")
BATCH, N_TIMES, HELD_OUT, DENSE, SPARSE = 128, 1000, 360, 32, 32
EMA_DECAY = 0.999


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


class Run(NamedTuple):
    label: str
    sampler: TimestepSampler
    seed: int


class Fleet:
    """Models of one architecture that are trained in step: their weights are stacked, so that they share the cost of each call.

    Every run has its own seed, minibatches, noise and sampler, and the optimisation of one is that of a model alone.
    """

    def __init__(self, runs: list[Run], arch: str, schedule: str, data: Digits) -> None:
        self.runs, self.data = runs, data
        self.process = DiffusionProcess(make_schedule(schedule, N_TIMES))  # type: ignore[arg-type]
        networks = []
        for run in runs:
            th.manual_seed(run.seed)
            networks.append(make_network(arch))
            run.sampler.setup(self.process, tuple(data.train.shape[1:]))
        self.network = networks[0]
        self.weights, self.buffers = th.func.stack_module_state(networks)
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = th.optim.Adam(list(self.weights.values()), 1e-3, fused=True)
        self.generators = [th.Generator().manual_seed(run.seed) for run in runs]
        self.rows = th.arange(BATCH)
        self.seconds = 0.0

    def denoise_all(self, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        """All runs' networks at once, ``(runs * batch, ...)``."""
        n = len(self.runs)

        def one(weights: Any, buffers: Any, x_t: th.Tensor, time: th.Tensor) -> Any:
            return th.func.functional_call(self.network, (weights, buffers), (x_t, time))

        time_ = self.process.schedule.network_time(t)
        output = th.vmap(one)(self.weights, self.buffers, x_t.view(n, -1, *x_t.shape[1:]), time_.view(n, -1))
        stacked: th.Tensor = output.reshape(x_t.shape)
        return stacked

    def denoiser(self, run: int, average: bool) -> Denoise:
        source = self.average if average else self.weights
        state = {name: value[run].detach() for name, value in {**source, **self.buffers}.items()}
        schedule = self.process.schedule
        return lambda x_t, t: th.func.functional_call(self.network, state, (x_t, schedule.network_time(t)))

    def step(self) -> None:
        data, drawn = self.data.train, []
        for run, generator in zip(self.runs, self.generators, strict=True):
            x0 = data[th.randint(len(data), (BATCH,), generator=generator)]
            drawn.append((x0, *run.sampler.sample(x0, generator), th.randn(x0.shape, generator=generator)))
        x0, t, weight, noise = (th.cat(parts) for parts in zip(*drawn, strict=True))
        loss = self.process.denoising_loss(self.denoise_all, x0, t, noise)
        with ExitStack() as stack:
            for i, (run, generator) in enumerate(zip(self.runs, self.generators, strict=True)):
                bound_terms = self.bound_terms(i, drawn[i][0])
                stack.enter_context(run.sampler.around_step(drawn[i][0], loss[i * BATCH : (i + 1) * BATCH], bound_terms, generator))
            self.optimizer.zero_grad()
            ((weight * loss).sum() / BATCH).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        th._foreach_lerp_(list(self.average.values()), [weight.detach() for weight in self.weights.values()], 1 - EMA_DECAY)

    def bound_terms(self, run: int, x0: th.Tensor) -> BoundTerms:
        return lambda rows, t, noise: self.process.bound_terms(self.denoiser(run, False), x0[rows], t, noise)


def make_network(arch: str) -> nn.Module:
    if arch == "mlp":
        return MlpDenoiser(64, 0, (128, 128, 128), nn.SiLU)
    return DiT1d(8, 8, d_model=64, depth=2, head_dim=32, time_embedding_dim=64)


class HeldOutBound:
    """The bound on the held-out images, always with the same noise."""

    def __init__(self, process: DiffusionProcess, x0: th.Tensor) -> None:
        self.process, self.x0 = process, x0
        dense = th.arange(len(x0)).repeat_interleave(DENSE), th.arange(DENSE).repeat(len(x0))
        rows, t = (grid.flatten() for grid in th.meshgrid(th.arange(len(x0)), th.arange(DENSE, N_TIMES), indexing="ij"))
        kept = t % SPARSE == rows % SPARSE
        self.rows, self.t = th.cat([dense[0], rows[kept]]), th.cat([dense[1], t[kept]])
        self.noise = th.randn(len(self.rows), *x0.shape[1:], generator=th.Generator().manual_seed(0))
        self.share = 1 / th.bincount(self.t, minlength=N_TIMES)[self.t].double()

    @th.no_grad()
    def per_time(self, denoise: Denoise) -> th.Tensor:
        """Terms, the mean over images, ``(T,)``."""
        parts = zip(*(th.split(x, 4096) for x in (self.rows, self.t, self.noise)), strict=True)
        terms = th.cat([self.process.bound_terms(denoise, self.x0[rows], t, noise) for rows, t, noise in parts])
        return th.zeros(N_TIMES, dtype=th.float64).index_add_(0, self.t, terms.double() * self.share)

    def __call__(self, denoise: Denoise) -> float:
        return float(self.per_time(denoise).sum()) + float(self.process.prior_term(self.x0).mean())


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


def train(runs: list[Run], steps: int, arch: str, schedule: str, paths: list[Path]) -> None:
    data = digits(image=arch == "dit")
    fleet = Fleet(runs, arch, schedule, data)
    bound, body = HeldOutBound(fleet.process, data.held_out), features(data)
    rows: list[list[dict[str, Any]]] = [[] for _ in runs]
    for step in range(1, steps + 1):
        fleet.step()
        if step % 500 and step != 100:
            continue
        for i, run in enumerate(runs):
            info = run.sampler.info()
            row: dict[str, Any] = {"step": step, "bound": bound(fleet.denoiser(i, True))}
            row |= {name: float(info[name]) for name in ("alpha", "beta", "reward", "reward_std") if name in info}
            if isinstance(run.sampler, AdaptiveTimestepSampler):
                row["selected"] = " ".join(map(str, run.sampler.selected_timesteps.tolist()))
            row["density"] = " ".join(f"{d:.2f}" for d in run.sampler.density(data.train[:64], n_bins=20).tolist())
            rows[i].append(row)
        print(
            step,
            " ".join(f"{run.label}-{run.seed}:{row[-1]['bound']:.3f}" for run, row in zip(runs, rows, strict=True)),
            flush=True,
        )
    start = th.randn(2000, *data.train.shape[1:], generator=th.Generator().manual_seed(0))
    for i, path in enumerate(paths):
        with th.no_grad():
            samples = fleet.process.sample(fleet.denoiser(i, True), start, 50)
        rows[i][-1]["frechet"] = frechet_distance(body, samples, th.cat([data.train, data.held_out]))
        write(path, rows[i])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.rename(path)


def make_sampler(name: str, settings: dict[str, Any]) -> TimestepSampler:
    if name == "published":
        return AdaptiveTimestepSampler.published()
    rule, _, weighting = name.partition("+")
    if rule in WEIGHTINGS:
        rule, weighting = "uniform", rule
    return RULES[rule](weighting=weighting or None, **(settings if rule == "adaptive" else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--arch", choices=["mlp", "dit"], default="mlp")
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--variants", type=json.loads, default={}, help='{"label": {"learning_rate": 0.003}}')
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    th.set_num_threads(1)
    runs, paths = [], []
    for seed in args.seeds:
        settings = {name: {} for name in args.samplers} | args.variants
        for label in settings:
            path = args.results / f"digits-{args.arch}-{args.schedule}-{label}-s{seed}.csv"
            if not path.exists():
                name = "adaptive" if label in args.variants else label
                runs.append(Run(label, make_sampler(name, settings[label]), seed))
                paths.append(path)
    if runs:
        train(runs, args.steps, args.arch, args.schedule, paths)


if __name__ == "__main__":
    main()
