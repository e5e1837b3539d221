"""Deleting what a run no longer needs, and nothing else.

Three rules make it safe at any instant of a kill and against any number of older or newer
writers. A manifest goes first and the files after it, so that a half-deleted checkpoint is no
checkpoint. Old checkpoints go only after `keep` newer ones have been verified, in a history read
after the newest was committed and headed by the deleting attempt itself: a start that claims the
run later sees that commit too. And of unfinished things only those of older attempts are touched.
"""

import logging
import re

from casallm.storage.store import Store
from casallm.train.attempts import (
    Attempt,
    CheckpointName,
    assert_leading,
    list_committed,
    read_chain,
)
from casallm.train.checkpoint import find_problems
from casallm.train.manifest import directory_of

log = logging.getLogger(__name__)

_OWNER = re.compile(r"checkpoints/step-\d+-a(\d+)/")


def remove_checkpoint(run: Store, name: CheckpointName) -> None:
    """Delete checkpoint `name`, its manifest first."""
    directory = directory_of(name)
    run.delete(f"{directory}/manifest.json")
    for entry in run.list(f"{directory}/"):
        run.delete(entry.name)


def collect_unfinished(run: Store, attempt: Attempt) -> None:
    """Delete what earlier attempts left without a manifest, and their dangling uploads."""
    assert_leading(run, attempt)
    run.discard_unfinished(lambda name: _is_older(name, attempt))
    folders = {entry.name.split("/")[1] for entry in run.list("checkpoints/")}
    begun = {name for name in map(CheckpointName.parse, folders) if name}
    for name in sorted(begun - set(list_committed(run))):
        if name.attempt < attempt.number:
            log.info("%s was never finished and is deleted", name)
            remove_checkpoint(run, name)


def apply_retention(
    run: Store, attempt: Attempt, keep: int, verified: set[CheckpointName]
) -> list[CheckpointName]:
    """Delete what lies beyond the newest `keep` verified checkpoints; what was deleted.

    Called after a commit of `attempt`. `verified` names those known to be whole; others are
    checked before they count, and added. Checkpoints off the run's history are deleted too.
    """
    chain = read_chain(run)
    if not chain.links or chain.links[0].attempt.number != attempt.number:
        assert_leading(run, attempt)
    doomed: list[CheckpointName] = []
    kept = 0
    for name in reversed(list_committed(run)):
        if name.attempt > attempt.number:
            continue
        if not chain.has(name.step, name.attempt) or kept >= keep:
            doomed.append(name)
        elif name in verified or not find_problems(run, name):
            verified.add(name)
            kept += 1
    for name in doomed:
        remove_checkpoint(run, name)
        verified.discard(name)
    return doomed


def _is_older(name: str, attempt: Attempt) -> bool:
    """Whether whoever was writing `name` cannot be a start of this run that is on its way."""
    match = _OWNER.match(name)
    return int(match[1]) < attempt.number if match else not name.startswith("attempts/")
