"""The command line, run in this process with tiny budgets."""

from pathlib import Path

import pytest

from sb3_diffrl.cli import main

DATASET = "sb3-diffrl/pointmaze/umaze-quick-v0"
#: A run in a second: small critics, few chains.
TINY = ["--num-threads", "1", "--device", "cpu", "--no-progress", "--verbose", "0"]
ONLINE = [*TINY, "--params", "learning_starts:50", "batch_size:16", "policy_kwargs:dict(net_arch=[8, 8])"]
OFFLINE = {
    "diffusion_bc": ["policy_kwargs:dict(net_arch=[16])", "num_inference_steps:2"],
    "planner": [
        "policy_kwargs:dict(d_model=16, head_dim=8)",
        "num_inference_steps:2",
        "num_action_steps:2",
        "horizon:3",
        "stride:2",
    ],
}
OFFLINE["pg"] = OFFLINE["planner"]


def say(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """Run a command, and return what it printed."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    return captured.out + captured.err


def newest(folder: Path) -> Path:
    """The latest run, among whatever else is there."""
    runs = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("tune-")]
    return max(runs, key=lambda path: int(path.name.rsplit("_", 1)[1]))


def train_online(logs: Path, *words: object, algo: str = "nclql", env: str = "Pendulum-v1", n: int = 120) -> Path:
    """Train an online agent, and return the folder of the run."""
    arguments = ["train", "--algo", algo, "--env", env, "-n", n, "--eval-freq", 60, "--eval-episodes", 1, "--seed", 1, "-f", logs]
    assert main([str(word) for word in (*arguments, *ONLINE, *words)]) == 0
    return newest(logs / algo)


def train_offline(logs: Path, algo: str, *words: object, n: int = 4, dataset: str = DATASET) -> Path:
    """Train an offline agent on the quick maze, and return the folder of the run."""
    arguments = ["train", "--algo", algo, "--dataset", dataset, "-n", n, "--eval-freq", -1, "--seed", 1, "-f", logs, *TINY]
    params = ["--params", "batch_size:16", *OFFLINE[algo]]
    assert main([str(word) for word in (*arguments, *params, *words)]) == 0
    return newest(logs / algo)
