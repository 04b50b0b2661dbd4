"""Signals, full disks and folders that cannot be written, in processes of their own: message, exit code, and where the model is."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sb3_diffrl import NCLQL
from sb3_diffrl.cli import main

from .cli_tools import ONLINE

ENV = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}


def start(*words: object, tmp_path: Path, n: int = 100_000) -> "subprocess.Popen[str]":
    """``sb3-diffrl train`` of a tiny agent, with a temporary folder of its own."""
    command = [sys.executable, "-m", "sb3_diffrl", "train", "--algo", "nclql", "--env", "Pendulum-v1", "-n", str(n), "--seed", "0"]
    command += [*ONLINE, "--eval-freq", "-1", *map(str, words)]
    (tmp_path / "t").mkdir(exist_ok=True)
    env = {**ENV, "TMPDIR": str(tmp_path / "t")}
    # A group of its own, as a terminal gives.
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def test_terminate_saves_and_resume_goes_on(tmp_path: Path) -> None:
    process = start("-f", tmp_path, "--save-freq", 60, "--eval-freq", 1000, tmp_path=tmp_path)
    folder = tmp_path / "nclql" / "Pendulum-v1_1"
    wait_for(folder / "rl_model_60_steps.zip", process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    assert f"Go on with: sb3-diffrl train --resume {folder}" in printed
    steps = NCLQL.load(folder / "Pendulum-v1.zip").num_timesteps
    assert 60 <= steps < 100_000
    path = folder / "Pendulum-v1" / "run.yml"
    path.write_text(path.read_text().replace("n_timesteps: 100000", f"n_timesteps: {steps + 100}"))
    (folder / "evaluations.npz").write_bytes(b"PK\x03\x04 half of it")  # as a process that was killed leaves it
    with pytest.warns(UserWarning, match=r"evaluations\.npz is damaged.*begin anew"):
        assert main(["train", "--resume", str(folder), "--num-threads", "1", "--device", "cpu", "-v", "0"]) == 0
    assert NCLQL.load(folder / "Pendulum-v1.zip").num_timesteps == steps + 100


def test_signals_to_envs_too(tmp_path: Path) -> None:
    cases = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
    folders = [tmp_path / str(code) for _, code in cases]
    words = ["--save-freq", 60, "--vec-env", "subproc"]
    processes = [start("-f", folder, *words, tmp_path=tmp_path) for folder in folders]
    for process, folder, (number, code) in zip(processes, folders, cases, strict=True):
        run = folder / "nclql" / "Pendulum-v1_1"
        wait_for(run / "rl_model_60_steps.zip", process)
        os.killpg(process.pid, number)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == code, printed
        assert f"Go on with: sb3-diffrl train --resume {run}" in printed
        assert "Traceback" not in printed
        assert NCLQL.load(run / "Pendulum-v1.zip").num_timesteps >= 60
        assert (run / "replay_buffer.pkl").exists()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_env_is_named(tmp_path: Path) -> None:
    process = start("-f", tmp_path, "--save-freq", 60, "--vec-env", "subproc", tmp_path=tmp_path)
    wait_for(tmp_path / "nclql" / "Pendulum-v1_1" / "rl_model_60_steps.zip", process)
    # The env's process is a child of the one that starts such processes.
    (killed,) = [inner for child in children(process.pid) for inner in children(child)]
    os.kill(killed, signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1, printed
    assert "error: The process of an environment has ended" in printed
    assert "The model of step" in printed
    assert "Traceback" not in printed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a quarter of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting needs rights that this process does not have")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_training_and_the_model_is_kept_elsewhere(small_disk: Path, tmp_path: Path) -> None:
    process = start("-f", small_disk, "--save-freq", 60, tmp_path=tmp_path)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert "error: [Errno 28] No space left on device. Nothing was saved, and a former file is as it was" in printed
    kept = re.search(r"The model of step (\d+) is in (\S*\.zip); move it to \S* and go on with: sb3-diffrl", printed)
    assert kept is not None, printed
    assert NCLQL.load(kept[2]).num_timesteps == int(kept[1]) > 0
    # What was written before is whole.
    checkpoints = list(small_disk.rglob("rl_model_*_steps.zip"))
    assert checkpoints
    for path in checkpoints:
        assert NCLQL.load(path).num_timesteps == int(path.stem.split("_")[2])
    assert not list(small_disk.rglob("*.saving"))


def test_folders_that_cannot_be_written_are_named_before_training(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (tmp_path / "file").write_text("")
    words = [("-f", small_disk), ("-f", tmp_path / "file"), ("-f", tmp_path, "-tb", tmp_path / "file" / "board")]
    processes = [start(*each, tmp_path=tmp_path) for each in words]
    for process, each in zip(processes, words, strict=True):
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 1, printed
        assert re.search(rf"error: \[Errno \d+\] .*{each[-1]}", printed), printed
        assert "Traceback" not in printed


SCRIPT = """
import sys
from stable_baselines3.common.callbacks import CheckpointCallback
from sb3_diffrl import NCLQL
from sb3_diffrl.callbacks import StopOnSignal

folder, way = sys.argv[1:]
kwargs = dict(learning_starts=10, batch_size=8, buffer_size=1000, policy_kwargs={"net_arch": [8]}, device="cpu")
model = NCLQL("MlpPolicy", "Pendulum-v1", **kwargs)
checkpoints = CheckpointCallback(20, folder)
if way == "callback":
    with StopOnSignal() as stop:
        model.learn(100_000, callback=[checkpoints, stop])
    model.save(f"{folder}/model")
    sys.exit(128 + stop.signal)
try:
    model.learn(100_000, callback=checkpoints)
except KeyboardInterrupt:
    model.save(f"{folder}/model")
    raise
"""


def test_signals_in_a_program_of_ones_own(tmp_path: Path) -> None:
    cases = [("callback", signal.SIGTERM, 143), ("callback", signal.SIGINT, 130)]
    cases += [("plain", signal.SIGINT, -signal.SIGINT), ("plain", signal.SIGTERM, -signal.SIGTERM)]
    folders = [tmp_path / str(i) for i in range(len(cases))]
    command = [sys.executable, "-c", SCRIPT]
    processes = [
        subprocess.Popen([*command, str(folder), way], stderr=subprocess.PIPE, text=True, env=ENV)
        for folder, (way, *_) in zip(folders, cases, strict=True)
    ]
    for process, folder, (way, number, code) in zip(processes, folders, cases, strict=True):
        wait_for(folder / "rl_model_40_steps.zip", process)
        process.send_signal(number)
        _, printed = process.communicate(timeout=60)
        assert process.returncode == code, printed
        saved = list(folder.glob("*.zip"))
        # Python itself ends a program that does not ask for SIGTERM: its checkpoints are there.
        assert (folder / "model.zip" in saved) == ((way, number) != ("plain", signal.SIGTERM))
        newest = max(saved, key=lambda path: path.stat().st_mtime)
        assert NCLQL.load(newest, device="cpu").num_timesteps >= 20


EXEC = """
import os, signal
from sb3_diffrl.cli.training import _NotedInterrupt

with _NotedInterrupt() as interrupt:
    try:
        exec("os.kill(os.getpid(), signal.SIGTERM)")
    except KeyboardInterrupt:
        print("caught")
raise SystemExit(128 + interrupt.noted)
"""


def test_a_signal_within_an_exec_leaves_the_exit_code_of_a_search_alone(tmp_path: Path) -> None:
    (tmp_path / "stopped_in_exec.py").write_text(EXEC)
    command = [sys.executable, "-m", "stopped_in_exec"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert process.stdout.split() == ["caught"], process.stderr
    assert process.returncode == 143
