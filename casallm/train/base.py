"""The checkpoint that a run starts from: found by the run's name, verified, and hashed."""

from dataclasses import dataclass

from casallm.errors import CheckpointError
from casallm.storage.store import Store, open_store
from casallm.train.attempts import CheckpointName
from casallm.train.checkpoint import Checkpoint, fetch, list_checkpoints, newest_good
from casallm.train.run import BaseConfig, load_config, saved_settings
from casallm.train.run_place import RUNS, run_url, scratch_of
from casallm.train.status import read_finished
from casallm.train.tensor_file import weights_sha256_of_files


@dataclass(frozen=True)
class BaseName:
    """The run that somebody wants to start from, and at which step if that was said."""

    url: str
    step: int | None = None

    @classmethod
    def parse(cls, text: str | None) -> "BaseName":
        """What RUN or RUN@STEP names; by default the newest finished pretraining run here."""
        if text is None:
            return cls(_newest_pretrained())
        name, _, step = text.rpartition("@")
        if name and step.isdecimal():
            return cls(run_url(name), int(step))
        return cls(run_url(text))

    def fits(self, base: BaseConfig) -> bool:
        """Whether `base` is what this names; the newest step is whichever was taken."""
        checkpoint = CheckpointName.parse(base.checkpoint)
        is_step = self.step is None or (checkpoint is not None and checkpoint.step == self.step)
        return base.run == self.url and is_step


def open_base(base: BaseConfig) -> Checkpoint:
    """The verified checkpoint, on this machine; CheckpointError if it is gone or not whole."""
    run, name = open_store(base.run), CheckpointName.parse(base.checkpoint)
    if name is None:
        raise CheckpointError(f"base.checkpoint is {base.checkpoint!r}, no checkpoint's name")
    return fetch(run, name, scratch_of(run))


def choose_base(name: BaseName) -> tuple[BaseConfig, str]:
    """The checkpoint that `name` means, and the sha256 of its weights; every file is verified."""
    run = open_store(name.url)
    if saved_settings(run) is None:
        raise CheckpointError(
            f"{name.url} is an exported model, and only runs can be started from so far: name the"
            " run that it was exported from"
            if run.exists("config.json")
            else f"{name.url} has no config.yaml, so it is no run: check it with `casallm runs`"
        )
    checkpoint = _newest(run) if name.step is None else _of_step(run, name.step)
    sha256 = weights_sha256_of_files(checkpoint.paths("model"))
    return BaseConfig(run=name.url, checkpoint=str(checkpoint.name)), sha256


def _newest(run: Store) -> Checkpoint:
    checkpoint = newest_good(run, scratch_of(run))
    if checkpoint is None:
        raise CheckpointError(f"{run.url} has no checkpoint to start from yet: let it train longer")
    return checkpoint


def _of_step(run: Store, step: int) -> Checkpoint:
    names = {name.step: name for name in list_checkpoints(run)}
    if step not in names:
        kept = ", ".join(f"{each:,}" for each in sorted(names)) or "none"
        raise CheckpointError(
            f"{run.url} keeps no checkpoint of step {step:,} (kept: {kept}): name one of those, or"
            " no step for the newest"
        )
    return fetch(run, names[step], scratch_of(run))


def _newest_pretrained() -> str:
    finished = sorted(RUNS.glob("*/finished.json"), key=lambda path: -path.stat().st_mtime)
    for path in finished:
        run = open_store(str(path.parent))
        if read_finished(run) and load_config(run)[0].stage == "pretrain":
            return run.url
    raise CheckpointError(
        "there is no finished pretraining run under runs/ here: name one with FROM= (--from), or"
        " make one with `make pretrain`"
    )
