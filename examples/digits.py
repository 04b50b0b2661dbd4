"""Train an image diffusion model on scikit-learn's digits, with timesteps that are learned, in a plain PyTorch loop.

python examples/digits.py                                      (or: python examples/digits.py --help)
python examples/digits.py --timestep-sampler uniform           what the usual timesteps give in as many steps
"""

import argparse
import copy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file: no screen needed

import matplotlib.pyplot as plt
import torch as th
from sklearn.datasets import load_digits
from torch import nn

from sb3_diffrl.diffusion import DiffusionProcess, MlpDenoiser, make_schedule
from sb3_diffrl.timesteps import make_timestep_sampler

HELD_OUT, BATCH = 300, 64


def held_out_bound(process: DiffusionProcess, network: nn.Module, images: th.Tensor) -> float:
    """Variational bound in bits per dimension: every time on a fifth of the images, with the same noise at each call."""
    n_times = process.schedule.num_train_timesteps or 0
    rows, t = th.meshgrid(th.arange(len(images)), th.arange(n_times), indexing="ij")
    kept = rows % 5 == t % 5

    def denoise(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        output: th.Tensor = network(x_t.flatten(1), process.schedule.network_time(t)).view_as(x_t)
        return output

    rows, t = rows[kept], t[kept]
    noise = th.randn(len(rows), *images.shape[1:], generator=th.Generator().manual_seed(0))
    with th.no_grad():
        terms = process.bound_terms(denoise, images[rows], t, noise)
    return float(terms.mean() * n_times + process.prior_term(images).mean())


def picture(samples: th.Tensor, densities: list[th.Tensor], every: int, path: Path) -> None:
    """Samples, and the density over timesteps as training goes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    # (40, 1, 8, 8) -> five rows of eight images
    grid = samples[:40].view(5, 8, 8, 8).permute(0, 2, 1, 3).reshape(40, 64)
    left.imshow(grid, cmap="gray_r", vmin=-1, vmax=1)
    left.set(title="samples", xticks=[], yticks=[])
    image = right.imshow(th.stack(densities).T, origin="lower", aspect="auto", extent=(0, every * len(densities), 0, 1))
    right.set(title="density of the timesteps", xlabel="training step", ylabel="timestep / T")
    figure.colorbar(image, ax=right, label="1: as uniform")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timestep-sampler", default="adaptive")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--times", type=int, default=1_000, help="number of diffusion times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder for the picture")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # networks this small run fastest on one core
    th.manual_seed(args.seed)

    # (n, 1, 8, 8), pixels in [-1, 1]
    images = th.as_tensor(load_digits().images / 8 - 1).float().unsqueeze(1)
    images = images[th.randperm(len(images))]
    held_out, images = images[:HELD_OUT], images[HELD_OUT:]

    process = DiffusionProcess(make_schedule("linear", args.times))
    network = MlpDenoiser(64, 0, net_arch=(128, 128, 128), activation_fn=nn.SiLU)
    average = copy.deepcopy(network)  # of the weights
    optimizer = th.optim.Adam(network.parameters(), lr=2e-3)
    sampler = make_timestep_sampler(args.timestep_sampler, process, x0_shape=(1, 8, 8))

    def denoise(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        output: th.Tensor = network(x_t.flatten(1), process.schedule.network_time(t)).view_as(x_t)
        return output

    densities, every = [], max(args.steps // 40, 1)
    for step in range(1, args.steps + 1):
        x0 = images[th.randint(len(images), (BATCH,))]
        t, weight = sampler.sample(x0)
        loss = process.denoising_loss(denoise, x0, t, th.randn_like(x0))

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor, x0: th.Tensor = x0) -> th.Tensor:
            return process.bound_terms(denoise, x0[rows], t, noise)

        with sampler.around_step(x0, loss, bound_terms):
            optimizer.zero_grad()
            (weight * loss).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with th.no_grad():
            for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(parameter, 0.005)
        if step % every == 0:
            densities.append(sampler.density(images[:100], n_bins=40))
        if step % max(args.steps // 5, 1) == 0:
            print(f"step {step:6d}   held-out bound {held_out_bound(process, average, held_out):6.3f} bits per dimension")

    network.load_state_dict(average.state_dict())
    with th.no_grad():
        samples = process.sample(denoise, th.randn(40, 1, 8, 8), num_inference_steps=min(50, args.times))
    picture(samples, densities, every, args.out / "digits.png")
    print(f"saved {args.out / 'digits.png'}")


if __name__ == "__main__":
    main()
