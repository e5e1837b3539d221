"""What all tests share: property tests are not timed, and real runs come first.

Machines are busy, so no example has a deadline. Whole runs take ten seconds and more: begun first,
they leave the gaps to the small tests; those that are held against one calm run stay on one worker,
so that it is made once.
"""

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


CALM_RUNS = {"calm", "tuned"}
"""Fixtures that are whole runs, shared by the tests of a session."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    fixtures = {item: set(getattr(item, "fixturenames", ())) for item in items}
    items.sort(key=lambda item: not fixtures[item] & {"documents", *CALM_RUNS})
    for item in items:
        for name in fixtures[item] & CALM_RUNS:
            item.add_marker(pytest.mark.xdist_group(name))
