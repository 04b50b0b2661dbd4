"""Figures: learning curves, profiles, the critic's landscape with chains on it, plans in a maze, timestep densities."""

try:
    import matplotlib
    import rliable  # noqa: F401
except ImportError as error:
    raise ImportError('Plots need matplotlib and rliable: pip install "sb3_diffrl[plots]"') from error

import os

if not os.environ.get("DISPLAY") and not os.environ.get("MPLBACKEND"):
    matplotlib.use("Agg")  # draws to files: no screen needed

from sb3_diffrl.plots.curves import plot_curves, plot_profiles
from sb3_diffrl.plots.landscape import plot_q_landscape
from sb3_diffrl.plots.plans import plot_plans
from sb3_diffrl.plots.scores import Curve, read_curves
from sb3_diffrl.plots.timesteps import plot_timesteps

__all__ = ["Curve", "plot_curves", "plot_plans", "plot_profiles", "plot_q_landscape", "plot_timesteps", "read_curves"]
