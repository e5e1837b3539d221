"""What a run's directory tells a report.

Kinds of events are read beyond those that `journal` names: "dataset" (`dataset_facts`: which
tokens), "baseline" (the fields of a `BigramLoss`), and those of `report_sft`. A run that lacks
one has a report that does not speak of it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from casallm.config import Tree, build
from casallm.data.manifest import Manifest
from casallm.errors import CheckpointError, ConfigError
from casallm.estimate.architecture import ModelConfig
from casallm.estimate.cost import Interval
from casallm.storage.store import Store
from casallm.train.attempts import Attempt, attempt_numbers, read_attempt, utc_now
from casallm.train.journal import EVENTS, METRICS, merged_metrics, merged_samples, read_lines
from casallm.train.metrics import Line
from casallm.train.redaction import redacted
from casallm.train.report_commands import commands_of
from casallm.train.report_data import AttemptRow, Baseline, ReportData, Section
from casallm.train.report_sft import chat_samples, sft_sections
from casallm.train.run import saved_settings
from casallm.train.status import read_finished
from casallm.units import format_bytes, format_usd


def load_report_data(run: Store) -> ReportData:
    """What the run's directory tells, at whatever point the run is; CheckpointError if no run."""
    saved = saved_settings(run)
    if saved is None:
        raise CheckpointError(
            f"{run.url} has no config.yaml, so it is no run: check the name with `casallm runs`"
        )
    settings, dataset = redacted(saved[0]), saved[1]
    attempts = [a for n in attempt_numbers(run) if (a := read_attempt(run, n))]
    events = {a.number: read_lines(run, a.number, EVENTS) for a in attempts}
    everything = [event for number in sorted(events) for event in events[number]]
    newest = attempts[-1].info if attempts else {}
    finished = read_finished(run)
    ended = _end(events[attempts[-1].number]) if attempts else None
    train = settings.get("train", {})
    lines, samples = merged_metrics(run), merged_samples(run)
    stage = str(settings.get("stage", "pretrain"))
    if stage == "sft":
        sections = sft_sections(settings, dataset, everything, lines)
        samples = chat_samples(samples)
    else:
        facts = _last(everything, "dataset")
        sections = [_data_section(settings, dataset, facts, tokens_seen=_tokens_seen(lines))]
    return ReportData(
        name=run.url.rstrip("/").rsplit("/", 1)[-1],
        url=run.url,
        stage=stage,
        state="finished" if finished else "stopped" if ended else "running",
        reason=str((finished or ended or {}).get("reason", "")),
        total_steps=int(train["steps"]),
        tokens_per_step=int(train["global_batch_size"]) * int(train["context_length"]),
        context_length=int(train["context_length"]),
        model=_model(settings),
        lines=lines,
        samples=samples,
        attempts=_attempt_rows(run, attempts, events),
        baseline=_baseline(everything),
        predicted_usd=_interval(attempts[0].info.get("predicted_usd")) if attempts else None,
        hardware=_hardware(newest.get("machine", {})),
        sections=(*sections, _machine_section(newest)),
        settings={**settings, "dataset": dataset},
        commands=commands_of(run.url, settings, is_over=finished is not None),
        written_at=format_time(utc_now()),
    )


def dataset_facts(manifest: Manifest) -> dict[str, Any]:
    """What an event "dataset" says: the source, its size, and the vocabulary."""
    splits = {
        name: {
            "tokens": split.tokens,
            "documents": split.documents,
            "bytes_of_text": split.bytes_of_text,
        }
        for name, split in manifest.splits.items()
    }
    tokenizer = manifest.tokenizer.model_dump(mode="json")
    return {"source": manifest.source, "splits": splits, "tokenizer": tokenizer}


def _model(settings: Tree) -> ModelConfig | None:
    try:
        return build(ModelConfig, settings.get("model", {}))
    except ConfigError:
        return None


def _end(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The attempt's last word, if it had one."""
    return events[-1] if events and events[-1].get("kind") == "end" else None


def _last(events: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    return next((event for event in reversed(events) if event.get("kind") == kind), {})


def _attempt_rows(
    run: Store, attempts: Sequence[Attempt], events: Mapping[int, Sequence[Mapping[str, Any]]]
) -> list[AttemptRow]:
    rows = []
    paid = 0.0
    for attempt in attempts:
        lines = read_lines(run, attempt.number, METRICS)
        first_step = attempt.parent.step if attempt.parent else 0
        end = _end(events[attempt.number])
        is_newest = attempt is attempts[-1]
        usd = max(
            (u for line in lines if (u := _number(line.get("usd"))) is not None), default=None
        )
        rows.append(
            AttemptRow(
                number=attempt.number,
                started=format_time(str(attempt.info.get("time", ""))),
                machine=_hardware(attempt.info.get("machine", {})),
                first_step=first_step,
                last_step=int(
                    max((_number(line.get("step")) or 0 for line in lines), default=first_step)
                ),
                first_tokens=_number(lines[0].get("tokens")) if lines else None,
                ending=_ending(end, is_newest=is_newest),
                is_lost=end is None and not is_newest,
                usd=None if usd is None else usd - paid,
            )
        )
        paid = usd if usd is not None else paid
    return rows


def _ending(end: Mapping[str, Any] | None, *, is_newest: bool) -> str:
    if end is not None:
        return f"{end.get('outcome', 'ended')}: {end.get('reason', '')}".rstrip(": ")
    return "no end on record yet" if is_newest else "lost without a word"


def _tokens_seen(lines: Sequence[Line]) -> float:
    return max((_number(line.get("tokens")) or 0.0 for line in lines), default=0.0)


def _baseline(events: Sequence[Mapping[str, Any]]) -> Baseline | None:
    event = _last(events, "baseline")
    nats = _number(event.get("nats_per_token"))
    return None if nats is None else Baseline(nats, _number(event.get("bits_per_byte")))


def _hardware(machine: Mapping[str, Any]) -> str:
    if not machine:
        return "unknown"
    if machine.get("device_kind") == "cuda":
        return f"{machine.get('n_gpus')} x {machine.get('device_name')}"
    return f"{machine.get('n_cores')} CPU cores"


def _data_section(
    settings: Tree, dataset: Tree, facts: Mapping[str, Any], *, tokens_seen: float
) -> Section:
    source = str(settings.get("data", {}).get("source", "?"))
    library = facts.get("source", {}).get("botocore")
    rows = [("Source", f"{source} (botocore {library})" if library else source)]
    splits = facts.get("splits", {})
    for name, title in (("train", "Training text"), ("val", "Held-out text")):
        if name in splits:
            rows.append((title, _split_text(splits[name])))
    if splits.get("train", {}).get("tokens"):
        rows.append(("Passes over it", f"{tokens_seen / splits['train']['tokens']:.2f}"))
    tokenizer = facts.get("tokenizer")
    if tokenizer:
        words = f"{tokenizer.get('name')}, {tokenizer.get('vocab_size'):,} tokens"
        rows.append(("Tokenizer", words))
    rows += [
        ("Tokenizer fingerprint", str(dataset.get("tokenizer_fingerprint", "?"))),
        ("Manifest sha256", str(dataset.get("manifest_sha256", "?"))),
    ]
    return Section("Data", tuple(rows))


def _split_text(split: Mapping[str, Any]) -> str:
    return (
        f"{split['tokens']:,} tokens in {split['documents']:,} documents"
        f" ({format_bytes(split['bytes_of_text'])})"
    )


def _machine_section(info: Mapping[str, Any]) -> Section:
    machine = info.get("machine", {})
    rows = [("Hardware", _hardware(machine))]
    if machine.get("gpu_memory_bytes"):
        rows.append(("Memory of a GPU", format_bytes(machine["gpu_memory_bytes"])))
    if machine.get("memory_bytes"):
        rows.append(("Main memory", format_bytes(machine["memory_bytes"])))
    if "ranks" in info:
        rows.append(("Ranks", str(info["ranks"])))
    price = _number(info.get("usd_per_hour"))
    if price is not None:
        rows.append(("Price", f"{format_usd(price)} an hour"))
    software = [
        f"{name} {machine[name]}" for name in ("casallm", "torch", "python") if name in machine
    ]
    if software:
        rows.append(("Software", ", ".join(software)))
    return Section("Machine", tuple(rows))


def _interval(value: Any) -> Interval | None:
    return Interval(**value) if isinstance(value, dict) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def format_time(text: str) -> str:
    """An ISO-8601 time in UTC as people read it: 22 Nov 2026, 09:31 UTC."""
    try:
        return datetime.fromisoformat(text).strftime("%-d %b %Y, %H:%M UTC")
    except ValueError:
        return text
