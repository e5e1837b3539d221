"""Weights & Biases as a mirror of the metrics: it may fail in any way, training does not notice.

The mirror is a process of its own (`wandb_process`), fed through a pipe. Measured with wandb
0.26: in the training process `init` against a server that does not answer returned neither
within its `init_timeout` nor in two minutes, and held up the exit of the interpreter as long. A
process can be left behind or killed. `metrics.jsonl` is the truth: whatever the mirror misses is
in there.
"""

import hashlib
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from casallm.train.metrics import Line
from casallm.train.redaction import redacted

log = logging.getLogger(__name__)

Setting = Literal["auto", "off", "offline", "online"]

CLOSE_SECONDS = 15.0
"""How long the end of a run waits for wandb; a preempted machine has 30 seconds in all."""

START_SECONDS = 60.0
"""How long wandb may take to begin before the mirror is given up."""


@dataclass(frozen=True)
class MirrorSetup:
    """What the mirror's process has to know."""

    mode: Literal["auto", "offline", "online"]
    run_id: str
    name: str
    config: dict[str, Any]
    """Shown on the run's page, without secrets."""
    directory: str
    """A local directory for wandb's files."""
    start_seconds: float = START_SECONDS


def mirror_run_id(name: str, first_start: str) -> str:
    """The one id of a run, the same for all its attempts.

    `first_start` is when the run's first attempt began: a new run of an old name is a new run.
    """
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[-40:] or "run"
    return f"{slug}-{hashlib.sha256(f'{name} {first_start}'.encode()).hexdigest()[:8]}"


def choose_mode(setting: Setting, environment: Mapping[str, str]) -> Setting:
    """What `log.wandb` and wandb's own variables ask for together; either can turn it off."""
    wanted = environment.get("WANDB_MODE", "").lower()
    is_disabled = environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    if setting == "off" or is_disabled or wanted == "disabled":
        return "off"
    if setting == "auto" and wanted in ("offline", "dryrun"):
        return "offline"
    if setting == "auto" and wanted in ("online", "run"):
        return "online"
    return setting


def open_mirror(
    setting: Setting, *, run_id: str, name: str, config: Mapping[str, Any], directory: Path
) -> "WandbMirror | None":
    """A mirror of the run, or None where it is turned off or cannot even be started."""
    mode = choose_mode(setting, os.environ)
    if mode == "off":
        return None
    setup = MirrorSetup(mode, run_id, name, redacted(config), str(directory.resolve()))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return WandbMirror(setup)
    except OSError as error:
        log.warning("metrics are not mirrored to wandb (%s)", error)
        return None


class WandbMirror:
    """A sink that hands lines to wandb's process and never waits for it while training."""

    def __init__(self, setup: MirrorSetup) -> None:
        self._errors = Path(setup.directory) / "mirror.log"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "casallm.train.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for the trainer, which closes the mirror
            )
        self._rows: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._rows.put(json.dumps(asdict(setup)))
        self._writer = threading.Thread(target=self._write, name="wandb-rows", daemon=True)
        self._reader = threading.Thread(target=self._relay, name="wandb-words", daemon=True)
        self._writer.start()
        self._reader.start()

    def log(self, line: Line) -> None:
        """Queue one line."""
        self._rows.put(json.dumps(line))

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Let wandb finish, but not for longer than this; then end it."""
        self._rows.put(None)
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            log.warning(
                "wandb did not finish in %.0f s and was left: metrics.jsonl has everything",
                timeout_seconds,
            )
            _kill_group(self._process.pid)
            self._process.wait()
        self._reader.join(timeout=1.0)

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (row := self._rows.get()) is not None:
                pipe.write(row + "\n")
                pipe.flush()
            pipe.close()
        except (OSError, ValueError):
            return  # the process is gone, and has said why

    def _relay(self) -> None:
        """Say in this process what the other one has to say, also by its exit code."""
        assert self._process.stdout is not None
        for row in self._process.stdout:
            level, _, text = row.rstrip("\n").partition(" ")
            log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        if self._process.wait() > 0:
            log.warning(
                "wandb failed (%s says how): metrics are no longer mirrored, metrics.jsonl has"
                " them all",
                self._errors,
            )


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
