"""Runs as others use them: found by name, listed, and their newest good weights loaded."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from casallm.data.conversation import Conversation, Message, prompt_ids
from casallm.data.tokenizer import Tokenizer, load_tokenizer
from casallm.errors import CheckpointError
from casallm.evals.chat import Answer
from casallm.inference.engine import Engine
from casallm.inference.sampling import SamplingConfig
from casallm.model.gpt import GPT, build_gpt
from casallm.storage.store import Store
from casallm.train.attempts import CheckpointName
from casallm.train.checkpoint import Checkpoint, load_tensors, newest_good
from casallm.train.run import load_config
from casallm.train.run_place import scratch_of

MAX_SLOTS = 32
"""Prompts that are answered at once."""


@dataclass(frozen=True)
class Trained:
    """A model as its newest good checkpoint has it, and the vocabulary it speaks."""

    checkpoint: CheckpointName
    model: GPT
    tokenizer: Tokenizer
    context_length: int


def load_trained(run: Store, checkpoint: Checkpoint | None = None) -> Trained:
    """The model of a checkpoint, by default the newest good one, on the GPU if there is one.

    CheckpointError if the run has none.
    """
    config, _ = load_config(run)
    checkpoint = checkpoint or newest_good(run, scratch_of(run))
    if checkpoint is None:
        raise CheckpointError(
            f"{run.url} has no checkpoint yet: let it train longer, or see `casallm runs`"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_gpt(config.model, config.train.context_length, seed=None, device=device)
    load_tensors(checkpoint, "model", {name: p.data for name, p in model.named_parameters()})
    tokenizer = run_tokenizer(run)
    return Trained(checkpoint.name, model.eval(), tokenizer, config.train.context_length)


def continue_prompts(
    run: Store, prompts: Sequence[str], *, max_new_tokens: int, sampling: SamplingConfig
) -> list[str]:
    """The run's continuation of each prompt, prompts left out."""
    trained = load_trained(run)
    tokenizer = trained.tokenizer
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    engine = _engine_for(trained, ids, max_new_tokens)
    generated = engine.generate(ids, max_new_tokens, sampling, stop_ids=[tokenizer.bos_id])
    return [tokenizer.decode(new) for new in generated]


def answer_prompts(
    run: Store, prompts: Sequence[str], *, max_new_tokens: int, sampling: SamplingConfig
) -> list[str]:
    """The run's answer to each prompt, as the first words of a chat."""
    chats = [(Message("user", prompt),) for prompt in prompts]
    answers = answer_chats(
        load_trained(run), chats, max_new_tokens=max_new_tokens, sampling=sampling
    )
    return [answer.text for answer in answers]


def answer_chats(
    trained: Trained,
    chats: Sequence[Conversation],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
) -> list[Answer]:
    """What the model says next in each chat; ConfigError where there is no room for it."""
    tokenizer = trained.tokenizer
    ids = [prompt_ids(chat, tokenizer) for chat in chats]
    engine = _engine_for(trained, ids, max_new_tokens)
    generated = engine.generate(
        ids, max_new_tokens, sampling, stop_ids=[tokenizer.end_id, tokenizer.bos_id]
    )
    return [Answer(tokenizer.decode(new), len(new) < max_new_tokens) for new in generated]


def _engine_for(trained: Trained, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Engine:
    """An engine whose cache is no longer than the longest prompt and its answer."""
    longest = max(map(len, prompts)) + max_new_tokens
    return Engine(trained.model, min(len(prompts), MAX_SLOTS), min(longest, trained.context_length))


def run_tokenizer(run: Store) -> Tokenizer:
    """The vocabulary that the run keeps."""
    if run.local_path is not None:
        return load_tokenizer(run.local_path / "tokenizer")
    with tempfile.TemporaryDirectory() as directory:
        for entry in run.list("tokenizer/"):
            run.get(entry.name, Path(directory) / Path(entry.name).name)
        return load_tokenizer(Path(directory))
