"""The one training loop: every stage is this loop over other batches.

A step: `grad_accum_steps` micro-batches forward and backward, gradients averaged over the ranks
by DDP, clipped, applied. The loss that is differentiated is the sum over this rank's targets
divided by the targets of the whole global batch, times the ranks (DDP averages), so neither
ranks nor micro-batches change it. Losses stay on the device until `log.every_steps`; whether to
stop is asked every step and acted on one step later, on all ranks alike.

The trainer knows no stage, no file and no cloud: batches come from a `BatchLoader`, and all that
only one rank does (speaking, writing, deciding) is done by an `Observer`, which the others lack.
"""

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from casallm.data.loader import Batch
from casallm.errors import StoreError, TrainingError
from casallm.model.gpt import GPT
from casallm.model.loss import TrainingLoss
from casallm.train.checkpoint import Decision, TrainState
from casallm.train.control import SHORTEST_NOTICE_SECONDS, Control, Outcome, StopRequest
from casallm.train.distributed import FlagExchange, World, agree, meet, sum_over_ranks
from casallm.train.evaluation import Validation, validate
from casallm.train.optim import Optimizers, clip_gradients
from casallm.train.run import RunConfig
from casallm.train.schedule import FinishEarly, last_step, lr_fraction

log = logging.getLogger(__name__)

COMPILE_FROM_STEPS = 200
"""`train.compile=auto` compiles runs of at least this many steps: it costs a minute or more."""

STOP, FENCED = 1, 2
COMPILE, FINISH_EARLY = "compile", "finish_early"
"""Kinds of decisions on record."""


class BatchLoader(Protocol):
    """What a stage builds: batches of any step, and the held-out ones."""

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of optimizer step `step`."""

    def validation(self, n_sequences: int) -> Iterator[Batch]:
        """This rank's share of the first held-out sequences."""

    def close(self) -> None:
        """No more batches are asked for."""


@dataclass(frozen=True)
class Interval:
    """The steps between two looks at the losses; rate and norm are those of the last one."""

    step: int
    tokens: int
    n_steps: int
    loss: float
    """Mean over the steps, in nats a target."""
    lr: float
    grad_norm: float
    """Before clipping."""
    seconds: float
    """Training time alone: evaluations and saves are left out."""


class Observer(Protocol):
    """Rank 0's view of the training: it records, saves, samples and watches the money."""

    def on_step(self, step: int) -> None:
        """That many steps are done."""

    def on_interval(self, interval: Interval) -> None:
        """The losses of some steps have come home."""

    def on_validation(
        self, state: TrainState, result: Validation, by_source: Mapping[str, Validation]
    ) -> None:
        """The model was evaluated, on all that is held out and on each source of it."""

    def is_save_due(self, state: TrainState) -> bool:
        """Whether now is the time for a checkpoint."""

    def save(self, state: TrainState, model: nn.Module, optimizers: Optimizers) -> None:
        """Stage a checkpoint; it is written behind the training."""

    def save_last(
        self, state: TrainState, model: nn.Module, optimizers: Optimizers, seconds: float | None
    ) -> None:
        """Save, and return when it is durable or `seconds` are over."""

    def safe_step(self) -> int:
        """The step of the newest durable checkpoint; 0 if there is none."""

    def is_fenced(self) -> bool:
        """Whether another attempt leads the run by now."""

    def early_end(self, step: int, last: int, seconds_per_step: float) -> int | None:
        """A nearer last step, if money or time run out."""


@dataclass(kw_only=True)
class Trainer:
    """Trains `model` from `state` on; `run` returns how it ended."""

    config: RunConfig
    world: World
    model: GPT
    loader: BatchLoader
    optimizers: Optimizers
    state: TrainState
    control: Control
    token_bytes_V: torch.Tensor
    """Bytes of text behind each token id; 0 for special tokens."""
    observer: Observer | None
    """On rank 0 only."""
    sources: Mapping[str, Callable[[int], Iterator[Batch]]] = field(default_factory=dict)
    """This rank's share of the first held-out sequences of each source, where there are several."""

    def __post_init__(self) -> None:
        self._loss: nn.Module = TrainingLoss(self.model)
        self._flags = FlagExchange(self.world, 2)
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._proposed_end = 0
        self._window_start = 0.0

    def run(self) -> Outcome:
        """Train until the last step, or until somebody asks to stop."""
        if not self._is_over:
            self._prepare()
        self._window_start = time.monotonic()
        while not self._is_over:
            stop = self._exchange_flags()
            if stop:
                return self._stop(stop)
            self._train_step()
            if self.observer:
                self.observer.on_step(self.state.step)
            if self._is_due(self.config.log.every_steps):
                self._flush()
            if self._is_due(self.config.eval.every_steps):
                self._evaluate()
            with self._clock_paused():
                self._save_if_due()
        self._save_last(None)
        return Outcome("finished", self.state.step, self._end_reason())

    @property
    def _early(self) -> list[FinishEarly]:
        records = (d for d in self.state.decisions if d.kind == FINISH_EARLY)
        return [FinishEarly(record.step, int(record.value)) for record in records]

    @property
    def _last_step(self) -> int:
        return last_step(self.config.train.steps, self._early)

    @property
    def _is_over(self) -> bool:
        return self.state.step >= self._last_step

    def _is_due(self, every_steps: int) -> bool:
        return self.state.step % every_steps == 0 or self._is_over

    def _prepare(self) -> None:
        """Choose between compiled and eager code, wrap for DDP, and rehearse once.

        DDP rebuilds its buckets after the first backward pass, which would let the first step
        after a resume add gradients in another order: that pass is a rehearsal, thrown away.
        """
        batch = next(iter(self.loader.batches(self.state.step)))
        self._loss = self._compiled(self._loss, batch)
        if self.world.size > 1:
            self._loss = DistributedDataParallel(self._loss, gradient_as_bucket_view=True)
        self._backward(batch)
        self.optimizers.zero_grad()
        gc.collect()
        gc.freeze()

    def _compiled(self, eager: nn.Module, batch: Batch) -> nn.Module:
        recorded = [d.value for d in self.state.decisions if d.kind == COMPILE]
        wanted = bool(recorded[-1]) if recorded else self._wants_compile()
        if not wanted:
            return eager
        compiled: nn.Module = torch.compile(eager, dynamic=False)  # type: ignore[assignment]
        works = agree(self.world, self._probe(eager, compiled, batch))
        if not recorded or works != recorded[-1]:
            self._decide(COMPILE, works)
        if not works:
            log.warning("torch.compile does not work here: training goes on without it, slower")
        return compiled if works else eager

    def _wants_compile(self) -> bool:
        setting = self.config.train.compile
        return setting == "on" or (
            setting == "auto" and self.config.train.steps >= COMPILE_FROM_STEPS
        )

    def _probe(self, eager: nn.Module, compiled: nn.Module, batch: Batch) -> bool:
        """Whether compiled code runs, forward and backward, and agrees with eager code."""
        try:
            with self._autocast():
                loss = compiled(*_inputs(batch))
            loss.backward()
            with self._autocast(), torch.no_grad():
                expected = eager(*_inputs(batch))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("torch.compile failed: %s", str(error).strip().splitlines()[0])
            return False
        finally:
            self.optimizers.zero_grad()
        return math.isclose(loss.item(), expected.item(), rel_tol=0.02)

    def _exchange_flags(self) -> int:
        """Tell the other ranks of a wish to stop or to end early; act on those of last step."""
        wants_stop = STOP if self.control.stop_request() else 0
        if self.observer and self.observer.is_fenced():
            wants_stop = FENCED
        self.control.beat(self.world.rank, self.state.step)
        stop, end = self._flags.swap([wants_stop, self._proposed_end])
        self._proposed_end = 0
        if end and end < self._last_step:
            self._decide(FINISH_EARLY, max(end, self.state.step + 1))
        return stop

    def _decide(self, kind: str, value: int | bool) -> None:
        decision = Decision(self.state.step, kind, value)
        self.state = replace(self.state, decisions=(*self.state.decisions, decision))

    def _train_step(self) -> None:
        step = self.state.step
        loss = torch.zeros((), device=self.world.device)
        for batch, is_last in _mark_last(self.loader.batches(step)):
            with contextlib.nullcontext() if is_last else self._no_sync():
                loss += self._backward(batch)
        norm = clip_gradients(self.model, self.config.optim.clip_norm)
        self.optimizers.step(self._lr_fraction(step))
        self._losses.append(loss)
        self._norms.append(norm.detach())
        sequences = self.state.sequences + self.config.train.global_batch_size
        self.state = replace(
            self.state,
            step=step + 1,
            sequences=sequences,
            tokens=sequences * self.config.train.context_length,
        )

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Add the gradient of one micro-batch; its share of the global mean loss, detached."""
        with self._autocast():
            loss = self._loss(*_inputs(batch)) / batch.n_targets_global
        (loss * self.world.size).backward()
        return loss.detach()

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._loss, DistributedDataParallel):
            return self._loss.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> torch.autocast:
        return autocast(self.config, self.world.device)

    def _lr_fraction(self, step: int) -> float:
        return lr_fraction(step, self.config.train.steps, self.config.schedule, self._early)

    def _flush(self) -> None:
        """Bring the losses of the steps since the last flush home and hand them on."""
        if not self._losses:
            return
        losses = sum_over_ranks(self.world, torch.stack(self._losses)).tolist()
        norms = torch.stack(self._norms).tolist()
        self._losses, self._norms = [], []
        self._raise_if_diverged(losses, norms)
        now = time.monotonic()
        seconds, self._window_start = now - self._window_start, now
        if self.observer:
            step, n_steps = self.state.step, len(losses)
            lr = self.config.optim.lr * self._lr_fraction(step - 1)
            mean = math.fsum(losses) / n_steps
            self.observer.on_interval(
                Interval(step, self.state.tokens, n_steps, mean, lr, norms[-1], seconds)
            )
            end = self.observer.early_end(step, self._last_step, seconds / n_steps)
            self._proposed_end = end or 0

    def _raise_if_diverged(self, losses: list[float], norms: list[float]) -> None:
        first = self.state.step - len(losses) + 1
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._divergence(f"the loss is {loss} and the gradient norm {norm}", step)

    def _divergence(self, what: str, step: int) -> TrainingError:
        return TrainingError(
            f"{what} at step {step:,}: start a run of another name with a lower optim.lr (now"
            f" {self.config.optim.lr:g}) or train.precision=fp32"
        )

    def _evaluate(self) -> None:
        self._flush()
        n_sequences = self.config.eval.sequences
        with self._clock_paused(), self._autocast():
            result = self._validate(self.loader.validation(n_sequences))
            by_source = {
                name: self._validate(batches(n_sequences)) for name, batches in self.sources.items()
            }
            if self.observer:
                self.observer.on_validation(self.state, result, by_source)
            gc.collect(1)

    def _validate(self, batches: Iterator[Batch]) -> Validation:
        return validate(self.world, self.model, batches, self.token_bytes_V)

    def _save_if_due(self) -> None:
        if self.observer and self.observer.is_save_due(self.state):
            self._raise_if_last_diverged()
            self.observer.save(self.state, self.model, self.optimizers)

    def _save_last(self, seconds: float | None) -> None:
        """Save and wait until it is durable, or until `seconds` are over.

        From here on no rank needs another: those without an observer end while rank 0 saves.
        """
        meet(self.world)
        if self.observer:
            self._raise_if_last_diverged()
            self.control.begin_last_save()
            self.observer.save_last(self.state, self.model, self.optimizers, seconds)

    def _raise_if_last_diverged(self) -> None:
        """Refuse weights that are not numbers: the last gradient was the same on all ranks."""
        norm = self._norms[-1].item() if self._norms else 0.0
        if not math.isfinite(norm):
            raise self._divergence(f"the gradient norm is {norm}", self.state.step)

    def _stop(self, flag: int) -> Outcome:
        if flag == FENCED:
            reason = "another start of this run leads it by now; this one wrote nothing more"
            return Outcome("failed", self.state.step, reason)
        self._flush()
        request = self.control.stop_request() or _stop_of_another_node()
        reason = request.reason
        try:
            self._save_last(request.seconds_left)
        except StoreError as error:
            if not (self.observer and self.observer.safe_step()):
                raise
            reason = f"{reason}; step {self.state.step:,} could not be saved: {error}"
        step = self.observer.safe_step() if self.observer else self.state.step
        return Outcome("stopped", step, reason)

    def _end_reason(self) -> str:
        if not self._early:
            return f"all {self.state.step:,} steps are done"
        return (
            f"budget or deadline: annealed from step {self._early[0].step:,} and ended at step"
            f" {self.state.step:,} of {self.config.train.steps:,}"
        )

    @contextlib.contextmanager
    def _clock_paused(self) -> Iterator[None]:
        """Keep what happens inside out of tokens per second."""
        begin = time.monotonic()
        yield
        self._window_start += time.monotonic() - begin


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The precision of the run's matrix products on `device`, as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def _stop_of_another_node() -> StopRequest:
    """Only the flag has come here, not how long that node lives: as short as a cloud's notice."""
    return StopRequest("another node stops", time.time() + SHORTEST_NOTICE_SECONDS)


def _inputs(batch: Batch) -> tuple[torch.Tensor | None, ...]:
    return batch.inputs_BT, batch.targets_BT, batch.positions_BT, batch.document_offsets


def _mark_last(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last."""
    current = next(batches)
    for following in batches:
        yield current, False
        current = following
    yield current, True
