"""Timestep samplers: held-out variational bound against training steps.

    python benchmarks/timesteps.py compare                      two data sets, every sampler, five seeds
    python benchmarks/timesteps.py robustness --seeds 0 1 2     three schedules, two networks, two data sets; smaller and shorter
    python benchmarks/timesteps.py ablation --seeds 0 1 2       the adaptive sampler with one improvement taken back at a time
    python benchmarks/timesteps.py divergence --seeds ...       short runs

Each trains diffusion models (T = 1000) and writes one CSV a run to `results/timesteps/<command>/`, a row an evaluation, with a
JSON of versions and hardware. Runs whose file is there are left out, so that an interrupted command goes on when it
is given again. The data is scikit-learn's digits, or windows of 8 observations of a PointMaze dataset (`make-dataset`).

The bound is that of the averaged weights, in bits per dimension, on held-out rows, with noise that is the same in all runs: every
one of the first 32 times on all rows, of the other times each on one row in 32. Samples are judged by the Fréchet distance to the
data in the features of a small digit classifier, trained here (runs of 1000 steps and more).

`--variants '{"label": {"learning_rate": 0.003}}'` runs the adaptive sampler with other arguments, too.
"""

import argparse
import csv
import itertools
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from provenance import metadata
from sklearn.datasets import load_digits
from torch import nn

from sb3_diffrl.diffusion import Denoise, DiffusionProcess, DiT1d, MlpDenoiser, make_schedule
from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.timesteps import AdaptiveTimestepSampler, BoundTerms, TimestepSampler, timestep_sampler_by_name

RESULTS = Path(__file__).parent / "results" / "timesteps"
# One improvement taken back at a time
ABLATIONS: dict[str, dict[str, Any] | None] = {
    "uniform": None,
    "adaptive": None,
    "published": None,
    "fresh_noise": {"common_noise": False},
    "no_baseline": {"baseline": None},
    "raw_reward": {"normalize_reward": False},
    "no_bounds": {"concentration_range": None, "uniform_floor": 0.0},
    "uniform_base": {"base": "uniform"},
    "base_alone": {"ent_coef": 100.0},
    "unweighted": {"importance": 0.0},
    "root_of_terms": {"sweep_powers": (0.5, 0.5)},
    "full_sweep": {"sweep_size": None, "reward_batch_size": None},
}
SAMPLERS = ("uniform", "logit_normal", "lognormal", "loss_second_moment", "min_snr", "p2", "speed", "adaptive")
N_TIMES, HELD_OUT, DENSE, SPARSE = 1000, 360, 32, 32
EMA_DECAY, LEARNING_RATE = 0.995, 2e-3
SCHEDULES = ("linear", "squaredcos_cap_v2", "quadratic")
MAZE = "sb3-diffrl/pointmaze/umaze-v0"


class Task(NamedTuple):
    """What is trained: data, network, schedule, rows of a minibatch, width of the network."""

    data: str = "digits"
    arch: str = "mlp"
    schedule: str = "linear"
    batch: int = 64
    width: int = 128


class Data(NamedTuple):
    train: th.Tensor
    held_out: th.Tensor
    train_labels: th.Tensor | None = None


def load_data(task: Task) -> Data:
    """Rows in about [-1, 1], ``(n, length * dim)``, or ``(n, length, dim)`` for networks of tokens."""
    tokens = task.arch == "dit"
    if task.data == "digits":
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(pixels))
        x = th.as_tensor(pixels[order] / 8 - 1).float()
        x = x.view(-1, 8, 8) if tokens else x
        return Data(x[HELD_OUT:], x[:HELD_OUT], th.as_tensor(labels[order][HELD_OUT:]))
    dataset = OfflineDataset.load(MAZE)
    windows = dataset.windows(horizon=8, stride=15)
    # Held-out rows are of the last episodes.
    n = min(len(windows), 20_000)
    chosen = np.concatenate([np.random.default_rng(0).permutation(len(windows) * 9 // 10)[: n - HELD_OUT],
                             np.linspace(len(windows) * 9 // 10 + 1, len(windows) - 1, HELD_OUT).astype(int)])  # fmt: skip
    # Position and velocity, and the goal: the achieved goal between them repeats the position.
    x = th.as_tensor(windows.observations(chosen)).float()[..., [0, 1, 2, 3, 6, 7]]
    train = x[:-HELD_OUT]
    x = (x - train.mean((0, 1))) / train.std((0, 1)).clamp(min=1e-3) / 2
    x = x if tokens else x.flatten(1)
    return Data(x[:-HELD_OUT], x[-HELD_OUT:])


class Run(NamedTuple):
    label: str
    sampler: TimestepSampler
    seed: int


class Fleet:
    """Models of one architecture that are trained in step: their weights are stacked, so that they share the cost of each call.

    Every run has its own seed, minibatches, noise and sampler, and the optimisation of one is that of a model alone.
    """

    def __init__(self, runs: list[Run], task: Task, data: Data) -> None:
        self.runs, self.data, self.batch = runs, data, task.batch
        self.process = DiffusionProcess(make_schedule(task.schedule, N_TIMES))  # type: ignore[arg-type]
        networks = []
        for run in runs:
            th.manual_seed(run.seed)
            networks.append(make_network(task, data.train))
            run.sampler.setup(self.process, tuple(data.train.shape[1:]))
        self.network = networks[0]
        self.weights, self.buffers = th.func.stack_module_state(networks)
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = th.optim.Adam(list(self.weights.values()), LEARNING_RATE, fused=True)
        self.generators = [th.Generator().manual_seed(run.seed) for run in runs]

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
            x0 = data[th.randint(len(data), (self.batch,), generator=generator)]
            drawn.append((x0, *run.sampler.sample(x0, generator), th.randn(x0.shape, generator=generator)))
        x0, t, weight, noise = (th.cat(parts) for parts in zip(*drawn, strict=True))
        loss = self.process.denoising_loss(self.denoise_all, x0, t, noise)
        with ExitStack() as stack:
            for i, (run, generator) in enumerate(zip(self.runs, self.generators, strict=True)):
                bound_terms = self.bound_terms(i, drawn[i][0])
                own = loss[i * self.batch : (i + 1) * self.batch]
                stack.enter_context(run.sampler.around_step(drawn[i][0], own, bound_terms, generator))
            self.optimizer.zero_grad()
            ((weight * loss).sum() / self.batch).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        th._foreach_lerp_(list(self.average.values()), [weight.detach() for weight in self.weights.values()], 1 - EMA_DECAY)

    def bound_terms(self, run: int, x0: th.Tensor) -> BoundTerms:
        return lambda rows, t, noise: self.process.bound_terms(self.denoiser(run, False), x0[rows], t, noise)


def make_network(task: Task, x: th.Tensor) -> nn.Module:
    if task.arch == "mlp":
        return MlpDenoiser(x.shape[1], 0, (task.width,) * 3, nn.SiLU)
    return DiT1d(
        x.shape[2], x.shape[1], d_model=task.width // 2, depth=1, head_dim=task.width // 4, time_embedding_dim=task.width // 2
    )


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


def features(data: Data) -> nn.Module:
    """The hidden layer of a digit classifier, the same in every run."""
    assert data.train_labels is not None
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


def train(runs: list[Run], task: Task, steps: int, every: int, paths: list[Path]) -> None:
    data = load_data(task)
    fleet = Fleet(runs, task, data)
    bound = HeldOutBound(fleet.process, data.held_out)
    rows: list[list[dict[str, Any]]] = [[] for _ in runs]
    for step in range(1, steps + 1):
        fleet.step()
        if step % every:
            continue
        for i, run in enumerate(runs):
            info = run.sampler.info()
            row: dict[str, Any] = {"step": step, "bound": bound(fleet.denoiser(i, True))}
            row |= {name: float(info[name]) for name in ("alpha", "beta", "reward", "reward_std") if name in info}
            if isinstance(run.sampler, AdaptiveTimestepSampler):
                row["selected"] = " ".join(map(str, run.sampler.selected_timesteps.tolist()))
            row["density"] = " ".join(f"{d:.2f}" for d in run.sampler.density(data.train[:64], n_bins=20).tolist())
            rows[i].append(row)
            write(paths[i].with_suffix(".partial"), rows[i])
        last = " ".join(f"{run.label}:{row[-1]['bound']:.3f}" for run, row in zip(runs, rows, strict=True))
        print(step, last, f"{time.process_time():.0f} s", flush=True)
    clipped = DiffusionProcess(fleet.process.schedule, clip_sample=1.0)
    body = None if data.train_labels is None or steps < 1000 else features(data)
    start = th.randn(1000, *data.train.shape[1:], generator=th.Generator().manual_seed(0))
    for i, path in enumerate(paths):
        if body is not None:
            with th.no_grad():
                samples = clipped.sample(fleet.denoiser(i, True), start, 50)
            rows[i][-1]["frechet_clipped"] = frechet_distance(body, samples, th.cat([data.train, data.held_out]))
        write(path, rows[i])
        path.with_suffix(".partial").unlink()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_sampler(name: str, settings: dict[str, Any] | None) -> TimestepSampler:
    if settings is not None:
        return AdaptiveTimestepSampler(**settings)
    return AdaptiveTimestepSampler.published() if name == "published" else timestep_sampler_by_name(name)


def run(
    folder: Path,
    task: Task,
    samplers: dict[str, dict[str, Any] | None],
    seeds: list[int],
    steps: int,
    every: int,
    fleet_seeds: int = 1,
) -> None:
    """A fleet for every ``fleet_seeds`` seeds. ``samplers``: label: arguments of the adaptive sampler, or ``None`` for the sampler
    of that name.
    """
    for first in range(0, len(seeds), fleet_seeds):
        chunk = seeds[first : first + fleet_seeds]
        runs, paths = [], []
        for seed, (label, settings) in itertools.product(chunk, samplers.items()):
            path = folder / f"{task.data}-{task.arch}-{task.schedule}-{label}-s{seed}.csv"
            if not path.exists():
                runs.append(Run(label, make_sampler(label, settings), seed))
                paths.append(path)
        if runs:
            print(f"{folder.name} {task} seeds {chunk}", flush=True)
            train(runs, task, steps, every, paths)
        for made, path in zip(runs, paths, strict=True):
            arguments = {**task._asdict(), "seed": made.seed, "steps": steps, "sampler": {made.label: samplers[made.label]}}
            # Where it was written to is a path of one machine
            words = " ".join(sys.argv[1:]).split(" --results ")[0]
            description = metadata(arguments, f"python benchmarks/timesteps.py {words}")
            path.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compare", "robustness", "ablation", "divergence"])
    parser.add_argument("--samplers", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--data", nargs="+", default=["digits", "maze"], help="of compare and robustness")
    parser.add_argument("--arch", nargs="+", default=["mlp", "dit"], help="of robustness")
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, help="of robustness")
    parser.add_argument("--variants", type=json.loads, default={}, help='{"label": {"learning_rate": 0.003}}')
    parser.add_argument("--results", type=Path, default=RESULTS, help="to be given last")
    args = parser.parse_args()
    th.set_num_threads(1)
    th.backends.cuda.enable_flash_sdp(False)  # the attention that networks can be stacked in
    folder = args.results / args.command
    named = dict.fromkeys(args.samplers or SAMPLERS)
    if args.command == "compare":
        for data in args.data:
            run(folder, Task(data), named | args.variants, args.seeds, args.steps or 12_000, 500, 5)
    elif args.command == "robustness":
        for data, arch, schedule in itertools.product(args.data, args.arch, args.schedules):
            task = Task(data, arch, schedule, batch=32, width=64)
            run(folder, task, named | args.variants, args.seeds, args.steps or 3000, 500, 5)
    elif args.command == "ablation":
        chosen = {name: ABLATIONS[name] for name in args.samplers or ABLATIONS}
        run(folder, Task(), chosen | args.variants, args.seeds, args.steps or 6000, 500, 5)
    else:
        run(folder, Task(batch=32, width=64), {"adaptive": None, "published": None}, args.seeds, args.steps or 1000, 500, 10)


if __name__ == "__main__":
    main()
