"""The critic's values of a state's actions, and Langevin chains on their way over them."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes

from sb3_diffrl.lql import LQL
from sb3_diffrl.lql.gradients import AutogradQGradient
from sb3_diffrl.lql.policies import LangevinPolicy

# Points along each axis of a landscape.
_GRID_1D, _GRID_2D = 401, 81


class Landscape(NamedTuple):
    """What is drawn.

    :param grid: coordinates along an axis, in the scaled box, ``(n,)``
    :param values: smallest critic there for each noise level, in units of the return, ``(n_levels, n)`` or ``(n_levels, n, n)``
        with the first chosen dimension along the columns
    :param chains: chains' actions before each step and at the end, in the chosen dimensions, ``(n_steps + 1, n_chains, 1 or 2)``
    :param levels: noise level at each of these times, ``(n_steps + 1,)``
    :param heights: value of the chains' actions at that level, ``(n_steps + 1, n_chains)``
    """

    grid: np.ndarray
    values: np.ndarray
    chains: np.ndarray
    levels: np.ndarray
    heights: np.ndarray


class _Recorder:
    """A Q-gradient that remembers where it was asked."""

    def __init__(self, gradient: AutogradQGradient) -> None:
        self.gradient, self.actions, self.levels = gradient, list[th.Tensor](), list[int]()

    def __call__(self, actions: th.Tensor, level: int) -> th.Tensor:
        self.actions.append(actions.clone())
        self.levels.append(level)
        return self.gradient(actions, level)


def q_landscape(
    model: LQL, obs: np.ndarray | dict[str, np.ndarray], dims: tuple[int, ...] = (0, 1), n_chains: int = 32, seed: int = 0
) -> Landscape:
    """Compute the landscape of a state and run chains on it.

    :param model: a trained agent
    :param obs: one observation, as the agent sees it
    :param dims: dimensions of the action along the axes, one or two; the others are held at the deterministic action
    :param n_chains: chains to run
    :param seed: of their start and noise
    :raises ValueError: if a dimension does not exist
    """
    policy = model.policy
    assert isinstance(policy, LangevinPolicy)
    model._apply_settings()
    dims = dims[: policy.critic.action_dim]
    if not 1 <= len(dims) <= 2 or not all(0 <= dim < policy.critic.action_dim for dim in dims):
        raise ValueError(f"Choose one or two dimensions of the action among 0 to {policy.critic.action_dim - 1}, not {dims}.")
    policy.set_training_mode(False)
    tensor, _ = policy.obs_to_tensor(obs)
    with th.no_grad():
        features = policy.critic.features(tensor)[:1]
        center = policy.deterministic_actions(tensor)[:1]
        recorder = _Recorder(AutogradQGradient(policy.critic, features.expand(n_chains, -1)))
        generator = th.Generator().manual_seed(seed)
        draws = policy.sampler.draw(n_chains, policy.critic.action_dim, generator=generator)
        end = policy.sampler.sample(recorder, type(draws)(*(draw.to(features.device) for draw in draws)))
        recorder.actions.append(end)
        recorder.levels.append(policy.sampler.n_levels - 1)
        grid = th.linspace(-1, 1, _GRID_1D if len(dims) == 1 else _GRID_2D, device=features.device)
        # (n,) or (n, n) points -> (points, action_dim)
        axes = grid[None] if len(dims) == 1 else th.stack(th.meshgrid(grid, grid, indexing="xy"))
        actions = center.repeat(axes[0].numel(), 1)
        actions[:, list(dims)] = axes.flatten(1).T
        levels = range(policy.sampler.n_levels)
        values = th.stack([_value(policy, features, actions, level) for level in levels])
        paths = list(zip(recorder.actions, recorder.levels, strict=True))
        heights = th.stack([_value(policy, features, at, level) for at, level in paths])
    return Landscape(
        grid.cpu().numpy(),
        values.view(len(values), *axes.shape[1:]).cpu().numpy(),
        th.stack(recorder.actions)[..., list(dims)].cpu().numpy(),
        np.array(recorder.levels),
        heights.cpu().numpy(),
    )


def _value(policy: LangevinPolicy, features: th.Tensor, actions: th.Tensor, level: int) -> th.Tensor:
    return policy.critic.q_values(features.expand(len(actions), -1), actions, level).amin(dim=0) / policy.reward_scale


def plot_q_landscape(
    model: LQL,
    obs: np.ndarray | dict[str, np.ndarray],
    path: str | Path,
    dims: tuple[int, ...] = (0, 1),
    n_chains: int = 32,
    seed: int = 0,
    title: str = "",
) -> Path:
    """Draw the landscape with the chains' ways on it; a ``.gif`` shows them walking, level by level.

    :param path: file to write, ``.png``, ``.pdf`` ... or ``.gif``

    The other parameters are those of ``q_landscape()``.
    """
    land = q_landscape(model, obs, dims, n_chains, seed)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    if path.suffix == ".gif":
        frames = [*range(len(land.levels)), *[len(land.levels) - 1] * 6]  # stays at the end for a while
        animation = FuncAnimation(figure, lambda frame: _draw(axes, land, frame, dims, title), frames=frames)
        aside = path.with_name(f".{path.stem}.saving.gif")  # what is stopped leaves no half of an animation
        try:
            animation.save(aside, writer=PillowWriter(fps=4), dpi=80)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    else:
        _draw(axes, land, len(land.levels) - 1, dims, title, ways=True)
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw(axes: Axes, land: Landscape, frame: int, dims: tuple[int, ...], title: str, ways: bool = False) -> list[Any]:
    axes.clear()
    level, n_levels = int(land.levels[frame]), len(land.values)
    values, chains = land.values[level], land.chains
    if values.ndim == 1:
        axes.plot(land.grid, values, color="black")
        axes.plot(chains[frame, :, 0], land.heights[frame], "o", color="C1", alpha=0.7)
        axes.set(xlabel="action (scaled)", ylabel="value", xlim=(-1.05, 1.05))
    else:
        axes.contourf(land.grid, land.grid, values, levels=30, cmap="viridis")
        if ways:
            axes.plot(chains[: frame + 1, :, 0], chains[: frame + 1, :, 1], color="white", alpha=0.25, linewidth=0.6)
        axes.plot(chains[frame, :, 0], chains[frame, :, 1], "o", color="C1", markeredgecolor="white", markersize=5)
        axes.set(xlabel=f"action {dims[0]} (scaled)", ylabel=f"action {dims[1]} (scaled)", xlim=(-1.02, 1.02), ylim=(-1.02, 1.02))
    where = f"step {frame} of {len(land.levels) - 1}" + (f", noise level {level + 1} of {n_levels}" if n_levels > 1 else "")
    axes.set_title(f"{title}\n{where}" if title else where)
    return []
