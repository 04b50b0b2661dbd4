"""The global random generators that an online run draws from, to go on where it was saved."""

import random
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces


def random_state(device: th.device, action_space: spaces.Space[Any]) -> dict[str, Any]:
    """State of the generators of torch, NumPy, Python and the action space."""
    version, words, gauss = random.getstate()
    state = {
        "torch": th.get_rng_state().numpy(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": (version, np.array(words, np.int64), gauss),
        "action_space": action_space.np_random.bit_generator.state,
    }
    return {**state, "cuda": th.cuda.get_rng_state(device).numpy()} if device.type == "cuda" else state


def set_random_state(state: dict[str, Any], device: th.device, action_space: spaces.Space[Any]) -> None:
    """Put them back; what belongs to another kind of device is left out."""
    th.set_rng_state(th.as_tensor(state["torch"]))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    action_space.np_random.bit_generator.state = state["action_space"]
    if device.type == "cuda" and "cuda" in state:
        th.cuda.set_rng_state(th.as_tensor(state["cuda"]), device)
