from collections.abc import Iterator

import pytest

from tests.faults.fixtures import credentials, memory_path, s3, s3_on_disk, stop_servers

__all__ = ["credentials", "memory_path", "s3", "s3_on_disk"]


@pytest.fixture(scope="session", autouse=True)
def _servers() -> Iterator[None]:
    yield
    stop_servers()
