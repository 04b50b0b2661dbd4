"""Settings per domain, at two sizes: ``cpu`` trains in tens of minutes on two cores, ``paper`` is the papers' and wants a GPU."""

from typing import Any, Literal

Domain = Literal["pointmaze", "antmaze", "kitchen", "locomotion"]
Size = Literal["cpu", "paper"]

_SMALL: dict[str, Any] = {
    "policy_kwargs": {"d_model": 48, "head_dim": 24, "net_arch": (128, 128)},
    "batch_size": 64,
    "ema_decay": 0.999,
    "learning_rate": 1e-3,
    "clip_sample": 3.0,
}
_FULL: dict[str, Any] = {"policy_kwargs": {"d_model": 256, "head_dim": 64}, "ema_decay": 0.9999}
_POINT: dict[str, Any] = {"pad": "last", "velocity_indices": (2, 3), "discount": 0.99}
# The flattened observation of AntMaze begins with 13 positions, then 14 velocities.
_ANT: dict[str, Any] = {"pad": "last", "velocity_indices": tuple(range(13, 27)), "discount": 0.997}
# Franka's: 9 positions and 9 velocities of the robot, 21 positions and 20 velocities of the objects
_KITCHEN: dict[str, Any] = {"pad": "last", "velocity_indices": (*range(9, 18), *range(39, 59)), "stride": 4}
_FALLS: dict[str, Any] = {"horizon": 4, "stride": 1, "terminal_reward": -100.0, "value_weight": 2.0}

#: Domain -> size -> keyword arguments of ``DiffusionPlanner`` and ``PG``.
PRESETS: dict[Domain, dict[Size, dict[str, Any]]] = {
    "pointmaze": {
        "cpu": {**_SMALL, **_POINT, "horizon": 12, "stride": 15},
        "paper": {**_FULL, **_POINT, "horizon": 32, "stride": 4},
    },
    "antmaze": {
        "cpu": {**_SMALL, **_ANT, "horizon": 8, "stride": 25},
        "paper": {**_FULL, **_ANT, "policy_kwargs": {"d_model": 256, "depth": 8, "head_dim": 64}, "horizon": 40, "stride": 25},
    },
    "kitchen": {
        "cpu": {**_SMALL, **_KITCHEN, "horizon": 8},
        "paper": {**_FULL, **_KITCHEN, "horizon": 32},
    },
    "locomotion": {
        "cpu": {**_SMALL, **_FALLS, "clip_sample": 10.0},
        "paper": {**_FULL, **_FALLS, "policy_kwargs": {"d_model": 256, "head_dim": 32}},
    },
}
