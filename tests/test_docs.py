"""The code that users copy runs: README, documentation, examples."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, block in enumerate(BLOCK.findall(page.read_text()))
]


def run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_pages_have_code() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS)
def test_code_on_a_page_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, but for budgets: a few updates show as much as many."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    short = re.sub(r"learn\((total_timesteps=)?[\d_]+", r"learn(\g<1>130", block)
    short = re.sub(r"learning_starts=[\d_]+", "learning_starts=100", short)
    short = re.sub(r"n_eval_episodes=\d+", "n_eval_episodes=1", short)
    run([sys.executable, "-c", short], tmp_path)


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--steps", "1050", "--episodes", "2"]
    for _ in range(2):  # repeatable
        printed = run(command, tmp_path)
    assert re.search(r"random policy +-\d+\.\d", printed)
    assert re.search(r"NC-LQL +-\d+\.\d \+- \d", printed)
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"nclql_pendulum.zip", "learning_curve.png"}


def test_offline_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    command = [sys.executable, str(ROOT / "examples" / "offline.py"), "--sac-steps", "150", "--data-steps", "450"]
    command += ["--clone-steps", "50", "--episodes", "1"]
    for _ in range(2):  # repeatable
        printed = run(command, tmp_path)
    assert re.search(r"DiffusionBC +-\d+\.\d \+- ", printed)
    assert "Dataset: 450 steps, mean return -" in printed
    assert (tmp_path / "offline" / "clone.zip").exists()


def test_planning_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium_robotics")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    command = [sys.executable, str(ROOT / "examples" / "maze.py"), "--steps", "20", "--data-steps", "500", "--env-steps", "5"]
    for _ in range(2):  # repeatable
        printed = run(command, tmp_path)
    assert re.search(r"pg +reward \d+ in 5 steps", printed)
    assert {path.name for path in (tmp_path / "planning").iterdir()} == {"pg.zip", "plans.png"}


def test_digits_example(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--steps", "200", "--times", "50"]
    for sampler in ("uniform", "adaptive"):
        printed = run([*command, "--timestep-sampler", sampler], tmp_path)
        bounds = [float(bound) for bound in re.findall(r"held-out bound +(-?\d+\.\d+) bits", printed)]
        assert len(bounds) == 5
        assert bounds[-1] < bounds[0] - 1
    assert (tmp_path / "digits" / "digits.png").stat().st_size > 10_000


def test_every_figure_and_table_on_a_page_exists() -> None:
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for target in re.findall(r'^--8<-- "([^"]+)"', text, re.MULTILINE):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_importing_the_package_is_cheap() -> None:
    """It loads nothing until a class is asked for, and a class loads nothing that it does not need."""
    code = (
        "import sys; LINE; print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'stable_baselines3', 'minari'}))"
    )
    assert run([sys.executable, "-c", code.replace("LINE", "import sb3_diffrl")], ROOT).strip() == "[]"
    assert "minari" not in run([sys.executable, "-c", code.replace("LINE", "from sb3_diffrl import NCLQL")], ROOT)
