"""What only rank 0 does: record, sample, save, watch the money, and notice a newer attempt."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from casallm.data.tokenizer import Tokenizer
from casallm.errors import StoreError
from casallm.model.gpt import GPT
from casallm.storage.store import Store
from casallm.train.attempts import Attempt
from casallm.train.budget import Purse, plan_early_end
from casallm.train.checkpoint import TrainState
from casallm.train.checkpoint_writer import CheckpointWriter
from casallm.train.evaluation import Prompt, Validation, generate_samples
from casallm.train.journal import AttemptLog
from casallm.train.metrics import Measurement, Metrics, Yardstick, evaluation_line, training_line
from casallm.train.optim import Optimizers
from casallm.train.progress import Progress
from casallm.train.run import RunConfig
from casallm.train.trainer import Interval

log = logging.getLogger(__name__)

PACE_INTERVALS = 9
"""An early end is planned by the median of so many: one slow interval must not end a run."""

SETTLED_INTERVALS = 3
"""Before so many are seen (data may still arrive), only an end that near is believed."""


@dataclass(frozen=True)
class Sampler:
    """Goes on from the same prompts at every evaluation."""

    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    context_length: int
    seed: int

    def samples(self, model: GPT) -> list[tuple[str, str]]:
        """Each prompt with its continuation by the model as it is now."""
        texts = generate_samples(
            model,
            self.tokenizer,
            self.prompts,
            context_length=self.context_length,
            seed=self.seed,
        )
        return [(prompt.text, text) for prompt, text in zip(self.prompts, texts, strict=True)]


@dataclass(kw_only=True)
class Leader:
    """Rank 0's observer of one generation."""

    config: RunConfig
    run: Store
    attempt: Attempt
    journal: AttemptLog
    writer: CheckpointWriter
    metrics: Metrics
    progress: Progress
    sampler: Sampler
    model: GPT
    purse: Purse
    yardstick: Yardstick
    elapsed_before: float
    """Training time of the attempts before this one, in seconds."""

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._is_out_of_time = False
        self._paces: deque[float] = deque(maxlen=PACE_INTERVALS)

    def on_step(self, step: int) -> None:
        """Move the bar."""
        self.progress.advance(step)

    def on_interval(self, interval: Interval) -> None:
        """Record the steps since the last interval."""
        measured = Measurement(
            step=interval.step,
            tokens=interval.tokens,
            loss=interval.loss,
            lr=interval.lr,
            grad_norm=interval.grad_norm,
            interval_tokens=interval.n_steps * self.config.tokens_per_step,
            interval_seconds=interval.seconds,
            elapsed_seconds=self.elapsed_before + time.monotonic() - self._started,
            usd=self.purse.usd_so_far(time.time()),
            attempt=self.attempt.number,
        )
        self.metrics.log(training_line(measured, self.yardstick))

    def on_validation(
        self, state: TrainState, result: Validation, by_source: Mapping[str, Validation]
    ) -> None:
        """Record the evaluation and what the model writes by now."""
        self.metrics.log(
            evaluation_line(
                state.step,
                state.tokens,
                val_loss=result.loss,
                val_bpb=result.bits_per_byte,
                by_source={name: each.loss for name, each in by_source.items()},
            )
        )
        for prompt, text in self.sampler.samples(self.model):
            self.journal.sample(step=state.step, tokens=state.tokens, prompt=prompt, text=text)

    def is_save_due(self, state: TrainState) -> bool:
        """Whether the writer wants a checkpoint now."""
        return self.writer.is_due(state.step)

    def save(self, state: TrainState, model: nn.Module, optimizers: Optimizers) -> None:
        """Stage a checkpoint of these tensors."""
        self.writer.save(state, dict(model.named_parameters()), optimizers.state())

    def save_last(
        self, state: TrainState, model: nn.Module, optimizers: Optimizers, seconds: float | None
    ) -> None:
        """Save and wait; a machine with `seconds` to live gives up before it dies."""
        begin = time.monotonic()
        self._is_out_of_time = not self.writer.wait_until_idle(seconds)
        if self._is_out_of_time:
            log.warning("the last checkpoint is still on its way: nothing newer was begun")
            return
        self.save(state, model, optimizers)
        left = None if seconds is None else max(0.0, seconds - (time.monotonic() - begin))
        self._is_out_of_time = not self.writer.wait(left)
        if self._is_out_of_time:
            log.warning("time ran out before step %d was durable", state.step)

    def safe_step(self) -> int:
        """The step of the newest durable checkpoint; 0 if there is none."""
        newest = self.writer.newest_durable
        return newest.step if newest else 0

    def is_fenced(self) -> bool:
        """Whether the writer found a newer attempt."""
        return self.writer.is_fenced

    def close(self) -> None:
        """Let all of it reach the store, unless the time for that is over.

        A checkpoint publishes the metrics before it, so that no training is lost with the last.
        """
        if self._is_out_of_time:
            self.progress.close()
            return
        self.writer.close()
        self.metrics.close()
        try:
            self.journal.close()
        except StoreError as error:
            log.warning("the last lines of metrics are not in %s: %s", self.run.url, error)

    def early_end(self, step: int, last: int, seconds_per_step: float) -> int | None:
        """A nearer last step, if budget or deadline demand one; the bar counts to what is last."""
        self._paces.append(seconds_per_step)
        end = plan_early_end(
            step,
            last,
            seconds_left=self.purse.seconds_left(time.time()),
            seconds_per_step=statistics.median_low(self._paces),
        )
        near = step + SETTLED_INTERVALS * self.config.log.every_steps
        if end and end > near and len(self._paces) < SETTLED_INTERVALS:
            end = None
        self.progress.total_steps = end or last
        return end
