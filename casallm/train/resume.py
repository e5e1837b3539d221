"""Starting a run, or starting it again: from its newest good checkpoint, as its one leader."""

import logging
from pathlib import Path
from typing import Any

from casallm.errors import StoreError
from casallm.storage.store import Store
from casallm.train.attempts import Attempt, claim, next_number
from casallm.train.checkpoint import Checkpoint, list_checkpoints, newest_good
from casallm.train.retention import collect_unfinished

log = logging.getLogger(__name__)


def start_attempt(run: Store, scratch: Path, **info: Any) -> tuple[Attempt, Checkpoint | None]:
    """The run's next attempt and the verified checkpoint, now local, that it starts from.

    `info` goes into `attempt.json`. AttemptError if another start won the attempt;
    CheckpointError if the run has checkpoints and none is whole. If the attempt before commits
    one more checkpoint while this one starts, that is where this one starts.
    """
    first = number = next_number(run)
    while True:
        seen = set(list_checkpoints(run, before=first))
        checkpoint = newest_good(run, scratch, before=first)
        name = checkpoint.name if checkpoint else None
        attempt = claim(run, parent=name, number=number, **info)
        late = set(list_checkpoints(run, before=first)) - seen
        if not late or (name and max(late) <= name):
            break
        log.info("attempt %d is left: %s was committed meanwhile", number, max(late))
        number += 1
    try:
        collect_unfinished(run, attempt)
    except StoreError as error:
        log.warning("what earlier attempts left in %s is not deleted: %s", run.url, error)
    return attempt, checkpoint
