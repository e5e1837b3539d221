"""What all tests share: property tests are not timed, and real runs come first.

Machines are busy, so no example has a deadline. Whole runs take ten seconds and more: begun first,
they are spread over the workers while the small tests fill the gaps.
"""

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "documents" not in getattr(item, "fixturenames", ()))
