"""What a report tells of a fine-tuning: its conversations, its losses by source, its chat.

Read from the events "dataset" (what `sft` says of its mixture) and "chat" (the fields of a
`ChatEvaluation`, `when`: before or after, and the `name` that was asked for).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from casallm.config import Tree
from casallm.train.metrics import Line, evaluation_lines, losses_by_source
from casallm.train.report_data import Section
from casallm.units import format_count

SHOWN_ANSWERS = 3
"""Of each kind of question, so many answers are shown."""

SCORES = {
    "says_name": "Says its name when asked",
    "says_name_unasked": "Says it unasked",
    "ends": "Stops by itself",
    "repetition": "Repeats itself",
    "recalls": "Recalls what it was told",
}
_NOTES = {
    "says_name": "{} ways to ask that it never saw",
    "says_name_unasked": "{} ordinary prompts",
    "ends": "{} answers",
    "repetition": "runs of four words that were there before, {} answers",
    "recalls": "{} facts told earlier in the chat",
}


def sft_sections(
    settings: Tree, hashes: Tree, events: Sequence[Mapping[str, Any]], lines: Sequence[Line]
) -> list[Section]:
    """The sections about a fine-tuning, those that there is something to say in."""
    facts = _last(events, kind="dataset")
    chats = {when: _last(events, kind="chat", when=when) for when in ("before", "after")}
    sections = [
        _conversations(settings, hashes, facts),
        _losses(lines),
        _scores(chats["before"], chats["after"]),
        _answers(chats["after"]),
    ]
    return [section for section in sections if section.rows]


def chat_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples with the answer on lines of its own."""
    return [{**sample, "prompt": f"{sample.get('prompt', '')}\n\n"} for sample in samples]


def _conversations(settings: Tree, hashes: Tree, facts: Mapping[str, Any]) -> Section:
    base = settings.get("base") or {}
    rows = [
        ("Started from", f"{base.get('run', '?')}, {base.get('checkpoint', '?')}"),
        ("Recipe", str(settings.get("data", {}).get("source", "?"))),
    ]
    rows += [(str(each["name"]), _source_text(each)) for each in facts.get("sources", ())]
    if facts:
        rows.append(
            (
                "In all",
                f"{facts['conversations']:,} conversations, {format_count(facts['tokens'])} tokens,"
                f" of which {format_count(facts['learned_tokens'])} are learned",
            )
        )
        rows.append(
            (
                "Packed",
                f"{facts['rows_per_epoch']:,} rows an epoch, {facts['fill_fraction']:.1%} full",
            )
        )
    rows += [
        ("Mixture fingerprint", str(hashes.get("mixture_fingerprint", "?"))),
        ("sha256 of the base's weights", str(hashes.get("base_weights_sha256", "?"))),
    ]
    return Section("Conversations", tuple(rows))


def _source_text(report: Mapping[str, Any]) -> str:
    text = f"{report['train']:,} learned, {report['validation']:,} held out"
    if report["shortened"]:
        text += f", {report['shortened']:,} cut at a turn"
    if report["dropped"]:
        dropped = (f"{n:,} {reason.replace('_', ' ')}" for reason, n in report["dropped"].items())
        text += f"; left out: {', '.join(dropped)}"
    return text


def _losses(lines: Sequence[Line]) -> Section:
    evaluations = evaluation_lines(lines)
    known = [line for line in evaluations if line.get("val_loss") is not None]
    if not known:
        return Section("Validation loss by source", ())
    best = min(known, key=lambda line: line["val_loss"] or 0.0)
    rows = [
        (name, f"{loss:.3f}")
        for name, loss in losses_by_source(known[-1]).items()
        if loss is not None
    ]
    rows.append(
        ("All, lowest", f"{best['val_loss']:.3f} at step {best['step']:,.0f}; the last counts")
    )
    return Section("Validation loss by source", tuple(rows))


def _scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> Section:
    if not after:
        return Section("Chat", ())
    rows = [("Its name", str(after.get("name", "?")))]
    for score, title in SCORES.items():
        text = f"{after['scores'][score]:.0%}"
        if before:
            text += f", before {before['scores'][score]:.0%}"
        rows.append((title, f"{text} ({_NOTES[score].format(after['n_asked'][score])})"))
    return Section("Chat", tuple(rows))


def _answers(after: Mapping[str, Any]) -> Section:
    """The first few answers to each kind of question, which stand one after the other."""
    answers, shown = list(after.get("answers", ())), []
    start = 0
    for kind in ("says_name", "says_name_unasked", "recalls"):
        shown += answers[start : start + SHOWN_ANSWERS]
        start += after.get("n_asked", {}).get(kind, 0)
    return Section("Answers", tuple((str(asked), str(said) or "-") for asked, said in shown))


def _last(events: Sequence[Mapping[str, Any]], **fields: str) -> Mapping[str, Any]:
    matching = (e for e in reversed(events) if all(e.get(k) == v for k, v in fields.items()))
    return next(matching, {})
