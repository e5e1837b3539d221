"""What only rank 0 does: record, sample, save, watch the money, and notice a newer attempt."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from casallm.data.tokenizer import Tokenizer
from casallm.errors import AttemptError
from casallm.model.gpt import GPT
from casallm.train.budget import Purse, plan_early_end
from casallm.train.checkpoint import CheckpointWriter, TrainState
from casallm.train.evaluation import Validation, generate_samples
from casallm.train.journal import AttemptLog
from casallm.train.metrics import Measurement, Metrics, Yardstick, evaluation_line, training_line
from casallm.train.optim import Optimizers
from casallm.train.progress import Progress
from casallm.train.run import RunConfig
from casallm.train.trainer import Interval

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampler:
    """Continues the same prompts at every evaluation."""

    tokenizer: Tokenizer
    prompts: Sequence[str]
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
        return list(zip(self.prompts, texts, strict=True))


class Leader:
    """Rank 0's observer of one generation."""

    def __init__(
        self,
        config: RunConfig,
        journal: AttemptLog,
        writer: CheckpointWriter,
        *,
        metrics: Metrics,
        progress: Progress,
        sampler: Sampler,
        model: GPT,
        purse: Purse,
        yardstick: Yardstick,
        attempt: int,
        elapsed_before: float,
    ) -> None:
        self._config = config
        self._journal = journal
        self._writer = writer
        self._metrics = metrics
        self._progress = progress
        self._sampler = sampler
        self._model = model
        self._purse = purse
        self._yardstick = yardstick
        self._attempt = attempt
        self._elapsed_before = elapsed_before
        self._started = time.monotonic()
