"""A new user's walk: the wheel is built and installed into an environment of its own, and every command is run there.

The environment sees the packages that this one has (so that nothing is downloaded), but not the checkout: the wheel's files alone.
"""

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATASET = "sb3-diffrl/pointmaze/umaze-quick-v0"
ONLINE = ["--eval-freq", "60", "--eval-episodes", "1", "--params", "learning_starts:50", "policy_kwargs:dict(net_arch=[8])"]
PLANNER = ["--params", "batch_size:16", "policy_kwargs:dict(d_model=16, head_dim=8)", "horizon:3", "stride:2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment in it that has the wheel."""
    folder = tmp_path_factory.mktemp("home")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "env" / "bin" / "python"),
        "install",
        "-q",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    # After the wheel's: a plain path entry, so the checkout's own .pth file is not read.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder


def run(home: Path, *words: str, code: int = 0) -> str:
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DISPLAY", "COVERAGE_PROCESS_START")}
    environ |= {"MINARI_DATASETS_PATH": str(home / "minari"), "OMP_NUM_THREADS": "1"}
    command = [str(home / "env" / "bin" / "sb3-diffrl"), *words]
    result = subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == code, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout


def train(home: Path, *words: str) -> str:
    return run(home, "train", "--num-threads", "1", "--device", "cpu", "--seed", "0", "-v", "0", *words)


def test_the_wheel_is_what_runs(home: Path) -> None:
    code = "import sb3_diffrl, sb3_diffrl.configs as c; print(sb3_diffrl.__file__, c.packaged_hyperparams('nclql').exists())"
    result = subprocess.run(
        [str(home / "env" / "bin" / "python"), "-c", code], cwd=home, check=True, capture_output=True, text=True
    )
    assert str(home) in result.stdout
    assert result.stdout.strip().endswith("True")
    assert "sb3_diffrl 0." in run(home, "--version")


def test_online_train_evaluate_plot(home: Path) -> None:
    train(home, "--algo", "nclql", "--env", "Pendulum-v1", "-n", "120", *ONLINE)
    folder = home / "logs" / "nclql" / "Pendulum-v1_1"
    assert (folder / "Pendulum-v1.zip").exists()
    run(home, "enjoy", str(folder), "-n", "1", "--video", "films", "-w", "TimeLimit:max_episode_steps=5")
    assert [path.name for path in (home / "films").glob("*.mp4")] == ["video1-episode-0.mp4"]
    run(home, "plot", "curves", "logs", "-o", "curves.png")
    assert (home / "curves.png").stat().st_size > 5_000


def test_offline_from_dataset_to_score(home: Path) -> None:
    run(home, "dataset", "make", "sb3-diffrl/pointmaze/umaze-v0", "--quick", "--n-steps", "400")
    train(home, "--algo", "pg", "--dataset", DATASET, "-n", "4", "--eval-freq", "-1", *PLANNER)
    folder = home / "logs" / "pg" / "sb3-diffrl-pointmaze-umaze-quick-v0_1"
    assert "normalised score" in run(home, "evaluate", str(folder), "-n", "1", "-w", "TimeLimit:max_episode_steps=3")
    run(home, "plot", "plans", str(folder), "-o", "plans.png", "--n-plans", "2", "--n-starts", "2")
    assert (home / "plans.png").stat().st_size > 5_000


@pytest.mark.slow
def test_the_whole_walk(home: Path) -> None:
    if not (home / "minari").exists():
        run(home, "dataset", "make", "sb3-diffrl/pointmaze/umaze-v0", "--quick", "--n-steps", "400")
    train(home, "--algo", "lql", "--env", "Pendulum-v1", "-n", "120", *ONLINE)
    train(home, "--algo", "planner", "--dataset", DATASET, "-n", "4", "--eval-freq", "-1", *PLANNER)
    train(home, "--algo", "diffusion_bc", "--dataset", DATASET, "-n", "4", "--eval-freq", "-1", "--params", "batch_size:16")
    tune = ["tune", "--algo", "nclql", "--env", "Pendulum-v1", "-n", "60", "--n-trials", "3", "--n-evaluations", "1"]
    run(home, *tune, "--eval-episodes", "1", "--num-threads", "1", "--params", "learning_starts:50")
    assert (home / "logs" / "nclql" / "tune-Pendulum-v1_1" / "best.yml").exists()
    assert len(list((home / "logs" / "nclql").glob("report_*.csv"))) == 1
    lql = str(home / "logs" / "lql" / "Pendulum-v1_1")
    run(home, "plot", "q-landscape", lql, "-o", "landscape.gif", "--n-chains", "4")
    run(home, "plot", "profiles", "logs/lql", "-o", "profiles.png")
    cloned = home / "logs" / "diffusion_bc" / "sb3-diffrl-pointmaze-umaze-quick-v0_1"
    run(home, "plot", "timesteps", str(cloned), "-o", "timesteps.png")
    run(home, "dataset", "record", "mine/pendulum/lql-v0", lql, "--n-steps", "20")
    assert "mine/pendulum/lql-v0" in run(home, "dataset", "list")
    run(home, "record", str(cloned), "-n", "1", "-w", "TimeLimit:max_episode_steps=3")
    run(home, "train", "--from", lql, "-v", "0")
    assert {"landscape.gif", "profiles.png", "timesteps.png"} <= {path.name for path in home.iterdir()}
