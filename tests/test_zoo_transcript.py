"""A new user's walk: the wheel is built and installed into an empty environment, and every command is run there.

The environment has what the wheel asks for, and no more: its requirements, and theirs, are linked from this one (so that nothing is
downloaded). Of the checkout it has nothing.
"""

import os
import subprocess
import sys
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
DATASET = "sb3-diffrl/pointmaze/umaze-quick-v0"
ONLINE = ["--eval-freq", "60", "--eval-episodes", "1", "--params", "learning_starts:50", "policy_kwargs:dict(net_arch=[8])"]
PLANNER = ["--params", "batch_size:16", "policy_kwargs:dict(d_model=16, head_dim=8)", "horizon:3", "stride:2"]


def required(dist: Distribution, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> dict[str, Distribution]:
    """What pip installs with a distribution, by name."""
    found: dict[str, Distribution] = {}
    for requirement in map(Requirement, dist.requires or []):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        key = (requirement.name.lower(), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            other = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # of another platform, or ourselves
        found |= {key[0]: other, **required(other, key[1], seen)}
    return found


def environment(folder: Path, wheel: Path, *extras: str) -> Path:
    """An environment with ``pip install "sb3_diffrl[extras]"`` in it, and the folder of its commands."""
    venv.create(folder, with_pip=False)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    installed = Distribution.at(next(packages.glob("sb3_diffrl-*.dist-info")))
    for dist in required(installed, frozenset(extras), {("sb3_diffrl", frozenset())}).values():
        for name in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(dist.locate_file(name))))
    return folder / "bin"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two environments in it: ``env`` with what the walk needs, ``bare`` without extras."""
    folder = tmp_path_factory.mktemp("home")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    environment(folder / "env", wheel, "zoo", "plots", "robotics")
    environment(folder / "bare", wheel)
    return folder


def run(home: Path, *words: str, code: int = 0, env: str = "env") -> str:
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DISPLAY", "COVERAGE_PROCESS_START")}
    environ |= {"MINARI_DATASETS_PATH": str(home / "minari"), "OMP_NUM_THREADS": "1"}
    command = [str(home / env / "bin" / "sb3-diffrl"), *words]
    result = subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == code, f"{words}: {result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr
    return result.stdout if code == 0 else result.stderr


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


def test_without_extras_every_command_says_which_gives_it(home: Path) -> None:
    code = "import importlib.util as u; print([name for name in ('rl_zoo3', 'rliable', 'gymnasium_robotics') if u.find_spec(name)])"
    python = [str(home / "bare" / "bin" / "python"), "-c", code]
    assert subprocess.run(python, cwd=home, check=True, capture_output=True, text=True).stdout.strip() == "[]"
    for words in ("list", "train --algo nclql --env Pendulum-v1", "evaluate logs/nclql/Pendulum-v1_1", "dataset list"):
        printed = run(home, *words.split(), code=1, env="bare")
        assert printed == 'error: The command needs RL Zoo: pip install "sb3_diffrl[zoo]"\n', words


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
    assert (cloned / "videos" / "video1-episode-0.mp4").exists()
    run(home, "train", "--from", lql, "-v", "0")
    assert (home / "logs" / "lql" / "Pendulum-v1_2" / "Pendulum-v1.zip").exists()
    # What tuning has found is trained with.
    best = str(home / "logs" / "nclql" / "tune-Pendulum-v1_1" / "best.yml")
    train(home, "--algo", "nclql", "--env", "Pendulum-v1", "--config", best, "--eval-freq", "-1")
    assert {"landscape.gif", "profiles.png", "timesteps.png"} <= {path.name for path in home.iterdir()}
