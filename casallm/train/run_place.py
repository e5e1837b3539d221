"""Where runs live, by name, and where this machine keeps copies of what is in a bucket."""

import hashlib
from pathlib import Path

from casallm.errors import CheckpointError
from casallm.storage.store import Store

RUNS = Path("runs")


def run_url(name: str | None) -> str:
    """The path or URL of run `name`: itself if it is one, `runs/<name>` if not.

    Without a name the run under `runs/` whose newest attempt began last; CheckpointError if
    there is none.
    """
    if name is None:
        starts = list(RUNS.glob("*/attempts/*/attempt.json"))
        if not starts:
            raise CheckpointError(
                "there are no runs under runs/ here: name one, or make one with `make pretrain`"
            )
        return str(max(starts, key=lambda path: path.stat().st_mtime).parents[2])
    is_place = "/" in name or "://" in name or name in (".", "..")
    return name if is_place else str(RUNS / name)


def scratch_of(run: Store) -> Path:
    """This machine's directory for the run's local copies; outside the run."""
    name = hashlib.sha256(run.url.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "casallm" / name
