"""A run of the real command line, as a process of its own, on a model of 40,000 parameters."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SETTINGS = (
    "model.n_layers=2",
    "model.d_model=32",
    "model.n_heads=2",
    "model.vocab_size=400",
    "optim.lr=2e-3",
    "train.steps=24",
    "train.context_length=32",
    "train.global_batch_size=7",
    "train.compile=off",
    "checkpoint.every_steps=4",
    "eval.every_steps=12",
    "eval.sequences=8",
    "log.every_steps=1",
    "log.wandb=off",
)
PRETRAIN = ("pretrain", "--preset", "tiny", *SETTINGS)
PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Done:
    """How a process ended."""

    code: int
    stdout: str
    stderr: str


class RealRun:
    """One run and the command that makes it, in the folder of its documents or recipe."""

    def __init__(
        self,
        documents: Path,
        name: str,
        *,
        ranks: int,
        command: Sequence[str] = PRETRAIN,
        url: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = documents.parent
        self.directory = self.folder / "runs" / name
        self.url = url or f"runs/{name}"
        self._environment = {**os.environ, **(environment or {})}
        self._command = [
            *(sys.executable, "-m", "casallm", *command),
            *("--run", self.url, "--data", str(documents), "--ranks", str(ranks)),
        ]
        self._process: subprocess.Popen[str] | None = None

    def start(self, *settings: str, log: str | None = None) -> "RealRun":
        """Begin or continue the run; later settings win."""
        self._log = self.directory.with_name(log or f"{self.directory.name}.log")
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("w") as file:
            self._process = subprocess.Popen(
                [*self._command, *settings],
                cwd=self.folder,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        return self

    def wait_for_exit(self) -> Done:
        """How the process ended by itself."""
        stdout, _ = self._process.communicate(timeout=PATIENCE_SECONDS)
        return Done(self._process.returncode, stdout, self._log.read_text())

    def is_over_within(self, seconds: float) -> bool:
        """Whether the process ends by itself before so many seconds are over."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll() is not None

    def wait_for_step(self, step: int) -> None:
        """Return when the newest attempt has recorded `step`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()
            if self.newest_step() >= step:
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached:\n{self._log.read_text()}")

    def newest_step(self) -> int:
        """The last step that the process has told of."""
        return max(map(int, re.findall(r"^step=(\d+)/", self._log.read_text(), re.M)), default=0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor alone."""
        self._process.send_signal(number)

    def processes(self) -> list[int]:
        """The supervisor and everything beneath it, ranks included."""
        supervisor = psutil.Process(self._process.pid)
        return [supervisor.pid, *(child.pid for child in supervisor.children(recursive=True))]

    def ranks(self) -> list[int]:
        """The process ids of this run's ranks, whoever is their parent by now."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "casallm.train.rank" in words and self._is_ours(Path(words[-1])):
                found.append(process.pid)
        return sorted(found)

    def _is_ours(self, control: Path) -> bool:
        try:
            return json.loads((control / "spec.json").read_text())["run_url"] == self.url
        except OSError:
            return False

    def weights(self) -> str:
        """`weights_sha256` of the newest good checkpoint."""
        done = subprocess.run(
            [sys.executable, "-m", "casallm", "verify", self.url, "--json"],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        return json.loads(done.stdout)["weights_sha256"]

    def metrics(self) -> list[dict]:
        """The merged training lines of the finished run."""
        lines = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "loss" in line]

    def newest_checkpoint(self) -> Path:
        """The directory of the newest committed checkpoint."""
        return sorted(self.directory.glob("checkpoints/*/manifest.json"))[-1].parent
