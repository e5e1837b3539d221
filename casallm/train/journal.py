"""What an attempt writes as it goes: metrics, samples, events; and the run's merged view of them.

Each attempt writes `metrics.jsonl`, `samples.jsonl` and `events.jsonl` in its own directory only.
On a local disk a line is appended as it comes, so that a kill loses none. A bucket cannot append:
there the lines are kept in memory and the object is written whole, once a minute and before every
checkpoint is committed; what a kill loses lies beyond that checkpoint and is done again. A minute
without a line leaves an event, so that it is known until when the machine was paid for.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from casallm.config import canonical_json
from casallm.errors import StoreError, StoreNotFoundError
from casallm.estimate.cost import usd_so_far
from casallm.storage.store import Store
from casallm.train.attempts import Attempt, attempt_numbers, read_attempt, read_chain, utc_now

log = logging.getLogger(__name__)

METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.jsonl"

Line = dict[str, Any]


class AttemptLog:
    """The metric lines, samples and events of one attempt.

    May be used from several threads, but of one process at a time: the object is written whole.
    Opened again for the same attempt (its ranks were restarted), it continues what is there. In a
    bucket it is published every `publish_every_seconds` (None: only when `publish` is called).
    """

    def __init__(
        self, run: Store, attempt: Attempt, *, publish_every_seconds: float | None = 60.0
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._closed = threading.Event()
        self._lines: dict[str, bytearray] = {}
        self._published: dict[str, int] = {}
        for name in (METRICS, SAMPLES, EVENTS):
            content = _read_whole_lines(run, f"{attempt.directory}/{name}")
            self._lines[name] = bytearray(content)
            self._published[name] = len(content)
        if not self._lines[EVENTS]:
            start = {key: value for key, value in attempt.info.items() if key != "kind"}
            self.event("start", **start)
        if run.local_path is None and publish_every_seconds is not None:
            threading.Thread(
                target=self._publish_often, args=(publish_every_seconds,), daemon=True
            ).start()

    def metric(self, line: Mapping[str, Any]) -> None:
        """Add one metric line."""
        self._append(METRICS, line)

    def sample(self, *, step: int, tokens: int, prompt: str, text: str) -> None:
        """Add what the model made of a prompt."""
        self._append(SAMPLES, {"step": step, "tokens": tokens, "prompt": prompt, "text": text})

    def event(self, kind: str, **fields: Any) -> None:
        """Add one event: start, machine, price, save, preemption, end, and whatever comes."""
        self._append(EVENTS, {"kind": kind, **fields, "time": utc_now()})

    def publish(self) -> None:
        """Make everything added so far readable by others; returns when it is."""
        if self._run.local_path is not None:
            return
        with self._publishing:
            for name in (METRICS, SAMPLES, EVENTS):
                with self._lock:
                    content = bytes(self._lines[name])
                if len(content) != self._published[name]:
                    self._run.write(f"{self._attempt.directory}/{name}", content)
                    self._published[name] = len(content)

    def close(self) -> None:
        """Publish the last lines, and stop publishing."""
        self._closed.set()
        self.publish()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        text = (canonical_json(line) + "\n").encode()
        with self._lock:
            if self._run.local_path is None:
                self._lines[name] += text
            else:
                _append_to_file(self._run.local_path / self._attempt.directory / name, text)

    def _count(self) -> int:
        """Bytes of all lines so far."""
        with self._lock:
            return sum(map(len, self._lines.values()))

    def _publish_often(self, seconds: float) -> None:
        lines = self._count()
        while not self._closed.wait(seconds):
            if self._count() == lines:
                self.event("alive")
            lines = self._count()
            try:
                self.publish()
            except StoreError as error:
                log.warning("metrics are not in %s for now: %s", self._run.url, error)


def read_lines(run: Store, attempt: int, name: str) -> list[Line]:
    """The lines of `metrics.jsonl` or `events.jsonl` of an attempt; torn ones are left out."""
    try:
        data = run.read(f"attempts/{attempt:06d}/{name}")
    except StoreNotFoundError:
        return []
    return list(_parse_lines(data))


def merged_metrics(run: Store) -> list[Line]:
    """The metric lines of the run's valid history, in step order, each step once.

    A step may have two lines, one of training and one of evaluation. What an attempt wrote
    beyond the step that its successor started from is left out.
    """
    return _merged(run, METRICS, lambda line: "val_loss" in line)


def merged_samples(run: Store) -> list[Line]:
    """The samples of the run's valid history, in step order, each prompt once a step."""
    return _merged(run, SAMPLES, lambda line: line.get("prompt"))


def spent_usd(run: Store) -> float:
    """The dollars of all attempts, each until it was last heard of; counts are cumulative.

    An attempt that died before its first step was billed as well, from its machine's boot on.
    """
    spent = 0.0
    for number in attempt_numbers(run):
        spent = max(spent, _usd_when_last_heard_of(run, number))
        for line in reversed(read_lines(run, number, METRICS)):
            if isinstance(line.get("usd"), int | float):
                spent = max(spent, float(line["usd"]))
                break
    return spent


def _usd_when_last_heard_of(run: Store, number: int) -> float:
    """By the events of the attempt; 0 where its price is not known."""
    attempt = read_attempt(run, number)
    if attempt is None:
        return 0.0
    try:
        times = [line["time"] for line in (attempt.info, *read_lines(run, number, EVENTS))]
        last = max(datetime.fromisoformat(time).timestamp() for time in times)
        since, before = attempt.info["billed_since"], attempt.info["usd_before"]
        return usd_so_far(last - since, attempt.info["usd_per_hour"], before)
    except (KeyError, TypeError, ValueError):
        return 0.0


def lifetimes_seconds(run: Store, before: int) -> list[float]:
    """How long each of the twenty attempts before attempt `before` lived, by its own clock."""
    lifetimes = []
    for number in [n for n in attempt_numbers(run) if n < before][-20:]:
        try:
            times = [
                datetime.fromisoformat(line["time"]) for line in read_lines(run, number, EVENTS)
            ]
            lifetimes.append(max(0.0, (times[-1] - times[0]).total_seconds()))
        except (IndexError, KeyError, TypeError, ValueError):
            continue
    return lifetimes


def _merged(run: Store, name: str, key: Callable[[Line], Any]) -> list[Line]:
    """The lines along the chain; of those of one step and one `key` the last."""
    merged: list[Line] = []
    for link in reversed(read_chain(run).links):
        since = link.attempt.parent.step if link.attempt.parent else -1
        for line in read_lines(run, link.attempt.number, name):
            step = line.get("step")
            if type(step) is int and since < step and (link.until is None or step <= link.until):
                _place(merged, line, key)
    return merged


def _place(merged: list[Line], line: Line, key: Callable[[Line], Any]) -> None:
    """Append `line`, dropping what it does again (ranks were restarted from an older step)."""
    while merged and merged[-1]["step"] > line["step"]:
        merged.pop()
    for index in reversed(range(len(merged))):
        if merged[index]["step"] != line["step"]:
            break
        if key(merged[index]) == key(line):
            merged[index] = line
            return
    merged.append(line)


def _parse_lines(data: bytes) -> Iterator[Line]:
    for text in data.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            yield line


def _read_whole_lines(run: Store, name: str) -> bytes:
    """What the object holds so far; a line that a kill cut off is ended."""
    try:
        content = run.read(name)
    except StoreNotFoundError:
        return b""
    if content and not content.endswith(b"\n"):
        content += b"\n"
        if run.local_path is not None:
            _append_to_file(run.local_path / name, b"\n")
    return content


def _append_to_file(path: Path, text: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(text)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}): free some space or check its rights"
        ) from error
