"""How far a run is, read from its directory alone and without torch: no machine is asked."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from casallm.config import Tree, parse_yaml
from casallm.errors import StoreNotFoundError
from casallm.storage.store import Store
from casallm.train.attempts import Chain, list_committed, read_chain
from casallm.train.journal import EVENTS, METRICS, read_lines, spent_usd
from casallm.units import format_duration, format_usd


@dataclass(frozen=True)
class RunProgress:
    """A run as its own files tell it."""

    url: str
    attempts: int = 0
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    usd: float = 0.0
    usd_per_step: float | None = None
    checkpoint: str | None = None
    checkpoint_age: float | None = None
    """Seconds since the newest durable checkpoint was written."""
    preemptions: int = 0
    finished: str | None = None
    """Why the run is over; None while it is not."""
    last: str = ""
    """The reason that the newest attempt gave for what it did last, if any."""

    @property
    def usd_to_finish(self) -> float | None:
        """Dollars for the steps that are left, at the price of those done."""
        if self.finished is not None:
            return 0.0
        if self.steps is None or self.usd_per_step is None:
            return None
        return (self.steps - self.step) * self.usd_per_step

    def lines(self) -> list[str]:
        """The progress as rows of a table."""
        steps = f" of {self.steps:,}" if self.steps else ""
        loss = f", loss {self.loss:.3f}" if self.loss is not None else ""
        to_finish = self.usd_to_finish
        more = f", about {format_usd(to_finish)} to finish" if to_finish else ""
        age = "" if self.checkpoint_age is None else f", {format_duration(self.checkpoint_age)} old"
        return [
            f"step         {self.step:,}{steps}{loss}",
            f"dollars      {format_usd(self.usd)} for its machines so far{more}",
            f"checkpoint   {self.checkpoint or 'none yet'}{age}",
            f"attempts     {self.attempts}, {self.preemptions} preempted",
            *([f"finished     {self.finished}"] if self.finished else []),
        ]


def read_progress(run: Store) -> RunProgress:
    """Everything about the run that its directory says; zeros for one that does not exist yet."""
    chain = read_chain(run)
    if not chain.links:
        return RunProgress(run.url)
    newest = chain.links[0].attempt.number
    events = [line for n in range(1, newest + 1) for line in read_lines(run, n, EVENTS)]
    metrics = [line for line in read_lines(run, newest, METRICS) if "loss" in line]
    checkpoint, age = _newest_checkpoint(run, events)
    finished = _finished(run, chain)
    last = metrics[-1] if metrics else {}
    return RunProgress(
        url=run.url,
        attempts=newest,
        step=int(finished["step"] if finished else last.get("step", 0)),
        steps=_steps(run),
        loss=last.get("loss"),
        usd=spent_usd(run),
        usd_per_step=_usd_per_step(metrics),
        checkpoint=checkpoint,
        checkpoint_age=age,
        preemptions=sum(
            1 for e in events if e.get("kind") == "end" and e.get("outcome") == "stopped"
        ),
        finished=str(finished["reason"]) if finished else None,
        last=str(events[-1].get("reason", "")) if events else "",
    )


def _finished(run: Store, chain: Chain) -> dict[str, Any] | None:
    """The record that the run is over, unless one wrote it who did not lead."""
    try:
        record = json.loads(run.read("finished.json"))
        return record if chain.has(int(record["step"]), int(record["attempt"])) else None
    except (StoreNotFoundError, ValueError, KeyError, TypeError):
        return None


def _newest_checkpoint(run: Store, events: list[dict[str, Any]]) -> tuple[str | None, float | None]:
    committed = list_committed(run)
    if not committed:
        return None, None
    newest = max(committed)
    times = [e["time"] for e in events if e.get("checkpoint") == str(newest)]
    if not times:
        return str(newest), None
    written = datetime.fromisoformat(times[-1])
    return str(newest), max(0.0, (datetime.now(UTC) - written).total_seconds())


def _usd_per_step(metrics: list[dict[str, Any]]) -> float | None:
    paid = [(line["step"], line["usd"]) for line in metrics if line.get("usd") is not None]
    if len(paid) < 2 or paid[-1][0] <= paid[0][0]:
        return None
    return float(paid[-1][1] - paid[0][1]) / (paid[-1][0] - paid[0][0])


def read_identity(run: Store) -> Tree:
    """What the run computes, by its own `config.yaml`, every value as text; {} without one."""
    try:
        text = run.read("config.yaml").decode("utf-8", "replace")
    except StoreNotFoundError:
        return {}
    identity = parse_yaml(text, where=f"{run.url}/config.yaml").get("identity")
    return identity if isinstance(identity, dict) else {}


def _steps(run: Store) -> int | None:
    """How long the run is to be."""
    train = read_identity(run).get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return int(steps) if isinstance(steps, str) and steps.isdigit() else None
