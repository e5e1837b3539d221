"""What all tests share: property tests are not timed, and real runs come first.

Machines are busy, so no example has a deadline. Whole runs take ten seconds and more: begun
first, they leave the gaps to the small tests. (A file stays on one worker by `--dist loadfile`, so
that what its tests share is made once; xdist 3.8 does not see its own groups with pytest 9.2.)
"""

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


CALM_RUNS = {"calm", "tuned"}
"""Fixtures that are whole runs, shared by the tests of a session."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    return 0 if CALM_RUNS & _fixtures(item) else 1 if "documents" in _fixtures(item) else 2


def _fixtures(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))
