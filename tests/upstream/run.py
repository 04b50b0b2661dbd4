"""Run Stable-Baselines3's own tests with our classes in the place of SAC and TD3.

The tests are those of the source distribution of the installed version, downloaded once into ``.cache/upstream``. The package under
test is the installed one.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "upstream"
REPLACEMENTS = [("SAC", "NCLQL"), ("TD3", "NCLQL"), ("SAC", "LQL")]


def fetch_tests(release: str) -> Path:
    """Download and unpack the source distribution of a release, unless it is there already.

    :return: its folder
    """
    name = f"stable_baselines3-{release}"
    folder, archive = CACHE / name, CACHE / f"{name}.tar.gz"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        what = ["--no-deps", "--no-binary", ":all:", f"stable-baselines3=={release}", "--dest", str(CACHE)]
        if subprocess.run([sys.executable, "-m", "pip", "download", *what]).returncode or not archive.is_file():
            sys.exit(
                f"Could not download the source distribution of stable-baselines3 {release}, which holds the tests (pip's error is "
                f"above). Run this again with a network, or put {archive.name} from PyPI in {CACHE}."
            )
    # Through a temporary folder: one that bears the final name is complete.
    with tempfile.TemporaryDirectory(dir=CACHE) as unpacked:
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (Path(unpacked) / name).rename(folder)
    return folder


def run_tests(folder: Path, replaced: str, replacement: str, jobs: str, pytest_args: list[str]) -> int:
    """Run the tests of one class with another in its place.

    :return: pytest's exit status
    """
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "--rootdir", ".", "-p", "plugin", "-q", "tests"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", jobs]
    environment = {
        **os.environ,
        "SB3_DIFFRL_REPLACE": replaced,
        "SB3_DIFFRL_WITH": replacement,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
        # The folder has a copy of the package, too: the installed one is under test.
        "PYTHONSAFEPATH": "1",
    }
    return subprocess.run([*command, *pytest_args], cwd=folder, env=environment).returncode


def main() -> int:
    """Run the replacements asked for.

    :return: 0 if all of them went as expected
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Other arguments go to pytest: -m 'not expensive' leaves out a test that takes minutes and gigabytes.",
    )
    parser.add_argument(
        "--replace",
        nargs=2,
        action="append",
        metavar=("THEIRS", "OURS"),
        help=f"run OURS in the place of THEIRS, may be repeated (default: {', '.join(map(' '.join, REPLACEMENTS))})",
    )
    parser.add_argument("--jobs", default="auto", help="parallel processes, with pytest-xdist (default: one for each core)")
    args, pytest_args = parser.parse_known_args()
    folder = fetch_tests(version("stable-baselines3"))
    statuses = [run_tests(folder, theirs, ours, args.jobs, pytest_args) for theirs, ours in args.replace or REPLACEMENTS]
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
