"""Recording that is interrupted, killed, or runs out of disk: whole or not at all."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import gymnasium as gym
import minari
import numpy as np
import pytest

from sb3_diffrl import OfflineDataset
from sb3_diffrl.offline.recording import record_dataset
from sb3_diffrl.offline.writing import DataFormat, DatasetWriter

from .envs import RandomEnv
from .minari_data import ACTION_SPACE, OBS_SPACE, same, write_episodes


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def pendulum(length: int = 12) -> gym.Env[Any, Any]:
    return gym.make("Pendulum-v1", max_episode_steps=length)


def test_nothing_is_overwritten_and_nothing_is_done_first() -> None:
    before = write_episodes("test/mine-v0", [2])

    def no_env() -> gym.Env[Any, Any]:
        raise AssertionError("The env was made")

    with pytest.raises(FileExistsError, match=r"'test/mine-v0' already.*overwrite=True"):
        record_dataset(None, no_env, "test/mine-v0", n_steps=3)
    assert same(before, minari.load_dataset("test/mine-v0"))


def test_overwriting_replaces_the_dataset() -> None:
    write_episodes("test/mine-v0", [2, 3])
    record_dataset(None, "Pendulum-v1", "test/mine-v0", n_steps=4, overwrite=True)
    assert minari.load_dataset("test/mine-v0").total_steps == 4


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_recording_leaves_everything_as_it_was(error: type[BaseException], overwrite: bool, root: Path) -> None:
    if overwrite:
        before = write_episodes("test/mine-v0", [2])

    class Failing(RandomEnv):
        life = 0

        def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.life += 1
            if self.life == 50:
                raise error
            return super().step(action)

    env = Failing(OBS_SPACE, ACTION_SPACE)
    with pytest.warns(UserWarning, match="cannot be rebuilt"), pytest.raises(error):
        record_dataset(None, env, "test/mine-v0", n_steps=100, overwrite=overwrite)
    assert list(minari.list_local_datasets()) == (["test/mine-v0"] if overwrite else [])
    assert not list(root.glob(".recording-*"))
    if overwrite:
        assert same(before, minari.load_dataset("test/mine-v0"))


def test_a_killed_recording_leaves_nothing_that_could_be_read(root: Path) -> None:
    code = """
import os
import gymnasium as gym
from sb3_diffrl.offline.recording import record_dataset

env, steps = gym.make("Pendulum-v1", max_episode_steps=10), []

def policy(observation):
    steps.append(1)
    if len(steps) == 55:
        os._exit(9)
    return env.action_space.sample()

record_dataset(policy, env, "test/killed-v0", n_steps=100)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert list(root.glob(".recording-*/data/main_data.hdf5"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert minari.list_local_datasets() == {}
    with pytest.raises(FileNotFoundError):
        minari.load_dataset("test/killed-v0")
    assert record_dataset(None, "Pendulum-v1", "test/killed-v0", n_steps=100).total_steps == 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_dies_while_it_replaces_a_dataset_leaves_the_former_or_the_new_one(
    number: signal.Signals, tmp_path: Path, root: Path
) -> None:
    """It dies before the first thing that it renames, deletes or makes, then before the second, and so on."""
    write_episodes("test/mine-v0", [2])

    def replace(at: int) -> int:
        met = 0

        def die(event: str, _arguments: tuple[Any, ...]) -> None:
            nonlocal met
            met += event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
            if met == at:
                met += 1
                os.kill(os.getpid(), number)

        with DatasetWriter("test/mine-v0", OBS_SPACE, ACTION_SPACE, overwrite=True) as writer:
            writer.add_episode(np.zeros((4, 2)), np.zeros((3, 1)), np.zeros(3), np.zeros(3, bool), np.arange(3) == 2)
            sys.addaudithook(die)
            writer.publish()
        return 3

    found = []
    for at in range(1, 50):
        child = faults.forked(lambda at=at: replace(at), tmp_path / "result")  # type: ignore[misc]
        has_died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
        found.append(OfflineDataset.load("test/mine-v0").n_steps)
        assert not list(root.glob("test/.*"))
        if not has_died:
            break
        shutil.rmtree(root / "test/mine-v0")
        write_episodes("test/mine-v0", [2])
    # Before the two renames, between them, and after them
    assert found == sorted(found)
    assert (found[0], found[-1], has_died) == (2, 3, False)
    assert found.count(2) > 3


@pytest.fixture
def _small_disk(root: Path) -> Iterator[None]:
    """A disk of a megabyte and a half, with a dataset."""
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(root)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting needs rights that this process does not have")
    write_episodes("test/mine-v0", [2])
    yield
    subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.mark.usefixtures("_small_disk")
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_a_full_disk_is_named_and_leaves_everything_as_it_was(data_format: DataFormat, root: Path, tmp_path: Path) -> None:
    def record() -> None:
        record_dataset(None, "Pendulum-v1", "test/mine-v0", n_steps=1_000_000, data_format=data_format, overwrite=True)

    # In a process of its own: where HDF5 finds the disk full, it may end the process.
    error = faults.outcome(record, tmp_path / "result")["error"]
    assert error.startswith(f"OSError: [Errno {errno.ENOSPC}] No space left on device. No dataset was written, and a former one")
    assert str(root) in error
    assert [path.name for path in root.iterdir()] == ["test"]
    assert minari.load_dataset("test/mine-v0").total_steps == 2


def test_an_error_of_the_system_that_hdf5_meets_is_named(root: Path, tmp_path: Path) -> None:
    def record() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        record_dataset(None, "Pendulum-v1", "test/large-v0", n_steps=20_000)

    error = faults.outcome(record, tmp_path / "result")["error"]
    assert error.startswith(f"OSError: [Errno {errno.EFBIG}] File too large. No dataset was written")
    assert not list(root.iterdir())
