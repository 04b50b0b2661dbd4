"""RL Zoo changes Gymnasium when it is imported: tests that import it put Gymnasium back for the tests of other files."""

from collections.abc import Iterator

import gymnasium
import pytest

PLACES = (gymnasium.wrappers, gymnasium.wrappers.common)


@pytest.fixture(scope="module", autouse=True)
def gymnasium_put_back() -> Iterator[None]:
    kept = [place.TimeLimit for place in PLACES]
    yield
    for place, time_limit in zip(PLACES, kept, strict=True):
        place.TimeLimit = time_limit  # type: ignore[attr-defined]
