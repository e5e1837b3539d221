"""Real runs: small documents, and the calm run of three ranks that others are held against."""

from pathlib import Path

import pytest

from tests.data.conftest import make_texts, prepared, texts, write_documents
from tests.train.real_run import RealRun

__all__ = ["calm", "documents", "prepared", "run", "texts"]


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of documents; its shards are made by the first run that needs them."""
    return write_documents(tmp_path_factory.mktemp("documents") / "d.jsonl", make_texts(400))


@pytest.fixture(scope="session")
def calm(documents: Path) -> RealRun:
    """A run of three ranks that nothing disturbed."""
    run = RealRun(documents, "calm", ranks=3)
    done = run.start().wait_for_exit()
    assert done.code == 0, done.stderr
    return run


@pytest.fixture
def run(documents: Path, request: pytest.FixtureRequest) -> RealRun:
    """A run of three ranks with the settings of the calm one, not started yet."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return RealRun(documents, name, ranks=3)
