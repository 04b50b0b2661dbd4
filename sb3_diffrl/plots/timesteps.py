"""Which diffusion times agents train on."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import torch as th

from sb3_diffrl.bc import DiffusionBC
from sb3_diffrl.planner import DiffusionPlanner

# Rows of the data that densities are averaged over.
_N_ROWS = 256


def plot_timesteps(models: Mapping[str, DiffusionBC | DiffusionPlanner], path: str | Path, seed: int = 0) -> Path:
    """Draw the density of training times of agents, from the least to the largest noise; 1 is uniform.

    A planner's is that of its plans.

    :param models: agents by name, their datasets on disk
    :param path: file to write
    :param seed: of rows and draws
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, model in models.items():
        rows = th.randperm(len(model.data.actions), generator=th.Generator().manual_seed(seed))[:_N_ROWS].to(model.device)
        with th.no_grad():
            density = model.policy.timestep_sampler.density(_samples(model, rows), seed=seed).cpu().numpy()
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


def _samples(model: DiffusionBC | DiffusionPlanner, rows: th.Tensor) -> th.Tensor:
    """What an agent's diffusion model learns from."""
    if isinstance(model, DiffusionBC):
        actions: th.Tensor = model.data.actions[rows]
        return actions
    windows = model.data.gather(rows, model.horizon, model.stride).windows
    return model.policy.encode(model.policy.normalizer.normalize(windows))
