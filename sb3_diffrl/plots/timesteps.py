"""Which diffusion times agents train on."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import torch as th

from sb3_diffrl.bc import DiffusionBC

# Rows of the data that densities are averaged over.
_N_ROWS = 256


def plot_timesteps(models: Mapping[str, DiffusionBC], path: str | Path, seed: int = 0) -> Path:
    """Draw the density of training times of agents, from the least to the largest noise; 1 is uniform.

    :param models: agents by name, their datasets on disk
    :param path: file to write
    :param seed: of rows and draws
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, model in models.items():
        actions = model.data.actions
        rows = th.randperm(len(actions), generator=th.Generator().manual_seed(seed))[:_N_ROWS]
        density = model.policy.timestep_sampler.density(actions[rows.to(actions.device)], seed=seed).cpu().numpy()
        edges = th.linspace(0, 1, len(density) + 1).numpy()
        axes.stairs(density, edges, label=f"{name}, step {model.num_timesteps}")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="noise, from the least to the largest time", ylabel="density", xlim=(0, 1), ylim=(0, None))
    axes.legend(fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
