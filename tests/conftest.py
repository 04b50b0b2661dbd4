"""Shared fixtures: tiny networks, one thread."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch as th

# Fixed before any pool of threads starts: tiny networks run fastest on one, and pytest-xdist brings the parallelism.
os.environ.setdefault("OMP_NUM_THREADS", "1")
th.set_num_threads(1)
# Before anything imports Triton: without a GPU, its kernels are interpreted.
if not th.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# A shell that runs the tests in the background ignores Ctrl-C, and all that they start would, too.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    th.manual_seed(0)
    th.set_grad_enabled(True)  # a test that is interrupted within no_grad() can leave torch without


@pytest.fixture
def datasets_in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Minari's datasets of a test are its own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
