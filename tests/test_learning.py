"""Whole runs that learn something, minutes each: `make test-slow`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_demo_solves_its_task(tmp_path: Path) -> None:
    demo = Path(__file__).parent.parent / "examples" / "demo.py"
    result = subprocess.run([sys.executable, str(demo)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.search(r"NC-LQL .*\(solved", result.stdout), result.stdout
