"""A pytest plugin: Stable-Baselines3's tests with one of our classes in the place of one of its own. See ``run.py``.

The environment variables ``SB3_DIFFRL_REPLACE`` and ``SB3_DIFFRL_WITH`` name the two classes.
"""

import builtins
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_diffrl

REPLACED = os.environ["SB3_DIFFRL_REPLACE"]
REPLACEMENT = getattr(sb3_diffrl, os.environ["SB3_DIFFRL_WITH"])
EXPECTED_FAILURES = Path(__file__).with_name("expected_failures.toml")

# The tests import the class from here, after this module is loaded.
setattr(stable_baselines3, REPLACED, REPLACEMENT)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the modules without the replaced class: some import packages that are not needed otherwise."""
    unrelated = collection_path.is_file() and not re.search(rf"\b{REPLACED}\b", collection_path.read_text())
    return True if unrelated else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the replaced class, and mark the ones expected to fail."""
    kept = [item for item in items if isinstance(item, pytest.Function) and involves_replaced(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    tests: dict[str, pytest.Item] = {upstream_id(item): item for item in kept}
    for test, mark in expected_failures():
        if test in tests:
            tests[test].add_marker(mark)
        else:
            items.append(UnknownTest.from_parent(session, name=test))


class UnknownTest(pytest.Item):
    """Stands, and fails, for an expected failure that is not among the tests. An error raised above would be lost by xdist."""

    def runtest(self) -> None:
        """Fail."""
        pytest.fail(f"{EXPECTED_FAILURES.name} lists {self.name}, which is no test of {REPLACED}", pytrace=False)


def involves_replaced(item: pytest.Function) -> bool:
    """Whether the test is parametrised with the replaced class or, where no algorithm is a parameter, names it."""
    callspec = getattr(item, "callspec", None)
    algorithms = [as_algorithm(value) for value in callspec.params.values()] if callspec is not None else []
    if any(algorithms):
        return REPLACEMENT in algorithms
    return REPLACED in names(item.function.__code__)


def as_algorithm(parameter: Any) -> type[BaseAlgorithm] | None:
    """The algorithm that a parameter is or, in lower case, names."""
    if isinstance(parameter, str):
        parameter = getattr(stable_baselines3, parameter.upper(), None)
    return parameter if isinstance(parameter, type) and issubclass(parameter, BaseAlgorithm) else None


def names(code: CodeType) -> set[str]:
    """Global names and attributes in a function and in those defined inside it."""
    return set(code.co_names).union(*(names(const) for const in code.co_consts if isinstance(const, CodeType)))


def upstream_id(item: pytest.Item) -> str:
    """The test's id in Stable-Baselines3, without the folder."""
    return re.sub(rf"\b{REPLACEMENT.__name__}\b", REPLACED, item.nodeid.removeprefix("tests/"))


def expected_failures() -> Iterator[tuple[str, pytest.MarkDecorator]]:
    """Ids of the tests expected to fail, each with its mark."""
    for entry in tomllib.loads(EXPECTED_FAILURES.read_text()).get(REPLACED, []):
        error = pytest.RaisesExc(getattr(builtins, entry["raises"]), match=entry["match"])
        for test in entry["tests"]:
            yield test, pytest.mark.xfail(raises=error, reason=entry["reason"], strict=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts."""
    counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "xfailed", "skipped", "failed", "error")}
    line = ", ".join(f"{count} {name}" for name, count in counts.items())
    terminalreporter.write_line(f"{REPLACEMENT.__name__} in {REPLACED}'s place: {sum(counts.values())} tests, {line}")
