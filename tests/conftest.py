"""Shared fixtures: tiny networks, one thread."""

import os

import pytest
import torch as th

# Fixed before any pool of threads starts: tiny networks run fastest on one, and pytest-xdist brings the parallelism.
os.environ.setdefault("OMP_NUM_THREADS", "1")
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    th.manual_seed(0)
