"""How a model is laid out on a machine: micro-batch, recomputation, sharding, global batch.

What is not said is chosen as a good engineer would: the fastest way that fits the memory, by the
throughput model itself, but a simpler one while it is not much slower. DDP, where every GPU holds
the whole model, is what casallm trains with; others are predicted for the runs of other programs.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from casallm.errors import ConfigError
from casallm.estimate.architecture import ModelConfig, count_params
from casallm.estimate.hardware import GPUS, Hardware
from casallm.estimate.memory import (
    Memory,
    Precision,
    Recompute,
    Sharding,
    Shards,
    Stack,
    largest_micro_batch,
    training_memory,
)
from casallm.estimate.throughput import Setup, step_time
from casallm.units import format_bytes, format_count

MAX_MICRO_TOKENS = 65_536
"""Tokens of one forward pass beyond which nothing is gained."""

MIN_STEP_TOKENS = 16_384
"""Tokens of a GPU in an optimizer step below which people rather enlarge the global batch."""

MAX_BATCH_TOKENS = 2**25
"""But hardly beyond this: Llama 3 405B ended with 16M tokens, DeepSeek-V3 with 63M."""

TIGHT = 1.15
"""Programs train models whose memory, as counted here, is this much more than a GPU has: they cut
the loss in pieces. The tightest sharded layout may be so large where nothing else fits."""

DDP_BONUS = 1.15
"""DDP that need not recompute all is preferred while it is at most this much slower: it is simpler,
and casallm's own."""

SPLIT_GAIN = 1.25
"""Compiled programs split a model into products and stages where that is so much faster, as with
slow links, or where nothing else fits."""

SPLIT_PARAMS = 20e9
"""Parameters above which they do so wherever it is faster at all."""

RECOMPUTES: Mapping[tuple[Sharding, Stack], tuple[Recompute, ...]] = {
    ("ddp", "eager"): ("none", "selective", "full"),
    ("ddp", "compiled"): ("none", "selective", "full"),
    ("zero1", "eager"): ("none", "selective", "full"),
    ("zero1", "compiled"): ("none", "selective", "full"),
    ("fsdp", "eager"): ("selective", "full"),
    ("fsdp", "compiled"): ("selective",),
}
"""What is weighed unless asked for. Programs that shard recompute selectively, as a rule also where
the memory would allow not to (Korthikanti et al. 2022, arXiv 2205.05198). Where that is not
enough, eager programs recompute all; compiled ones, which are younger, split the model. ZeRO-1 is
laid out only where it is asked for: which programs use it cannot be told from model and machine."""

MAX_STAGES = 8
"""Stages of a pipeline beyond which products are split further (NVIDIA's published recipes)."""

HELD_FRACTION = 0.4
"""Share of the memory that weights and gradients of a stage may take."""


@dataclass(frozen=True)
class Wishes:
    """What was asked for of the layout; None leaves the choice open."""

    stack: Stack = "compiled"
    precision: Precision = "bf16"
    micro_batch_size: int | None = None
    recompute: Recompute | None = None
    sharding: Sharding | None = None
    batch_tokens: int | None = None
    node_bandwidth: float | None = None


def default_batch_tokens(n_params: int) -> int:
    """Tokens of an optimizer step: 0.5M at 124M parameters, growing with the horizon^0.383.

    nanochat's measured law for 20 tokens a parameter, rounded down to a power of two.
    """
    return int(2 ** math.floor(19 + 0.383 * math.log2(max(n_params, 2**14) / 124e6)))


@lru_cache(maxsize=4096)
def plan_layout(
    config: ModelConfig,
    context_length: int,
    hardware: Hardware,
    *,
    gpus_per_node: int,
    n_nodes: int = 1,
    wishes: Wishes | None = None,
) -> Setup:
    """The best layout that fits and is as wished; ConfigError where none fits.

    A single GPU shards nothing, whatever is wished.
    """
    wanted = wishes or Wishes()
    _check_precision(hardware, wanted.precision)
    n_gpus = gpus_per_node * n_nodes
    if n_gpus == 1 and wanted.sharding != "ddp":
        wanted = replace(wanted, sharding=None)
    enlarged = min(n_gpus * MIN_STEP_TOKENS, MAX_BATCH_TOKENS)
    batch_tokens = wanted.batch_tokens or max(default_batch_tokens(count_params(config)), enlarged)
    base = Setup(
        config=config,
        context_length=context_length,
        hardware=hardware,
        micro_batch_size=1,
        global_batch_size=max(
            batch_tokens // context_length, n_gpus * (wanted.micro_batch_size or 1)
        ),
        gpus_per_node=gpus_per_node,
        n_nodes=n_nodes,
        stack=wanted.stack,
        precision=wanted.precision,
        node_bandwidth=wanted.node_bandwidth,
    )
    layouts = [*_layouts(base, wanted), *_split_layouts(base, wanted, "model")]
    layouts = layouts or [*_tight_layouts(base, wanted), *_split_layouts(base, wanted, "fsdp")]
    layouts = layouts or list(_split_layouts(base, wanted, "zero1"))
    if not layouts:
        raise ConfigError(_nothing_fits(base, wanted))
    return max(layouts, key=_preference)


def fits_ddp(setup: Setup) -> bool:
    """Whether every GPU can hold the whole model, its state and at least one sequence."""
    return most_sequences(replace(setup, sharding="ddp", sequence_split=1, stages=1)) >= 1


def most_sequences(setup: Setup) -> int:
    """The largest micro-batch that fits a GPU in this layout; 0 if none does."""
    return largest_micro_batch(
        setup.config,
        setup.context_length,
        setup.hardware,
        precision=setup.precision,
        recompute=setup.recompute,
        stack=setup.stack,
        shards=Shards(setup.sharding, setup.n_gpus, setup.parts),
        split=setup.sequence_split,
    )


def setup_memory(setup: Setup) -> Memory:
    """What `setup` takes of every GPU."""
    return training_memory(
        setup.config,
        setup.micro_batch_size,
        setup.context_length,
        precision=setup.precision,
        recompute=setup.recompute,
        stack=setup.stack,
        shards=Shards(setup.sharding, setup.n_gpus, setup.parts),
        split=setup.sequence_split,
    )


def _preference(setup: Setup) -> float:
    rate = step_time(setup).tokens_per_second
    if setup.sharding == "ddp" and setup.recompute != "full":
        return rate * DDP_BONUS
    is_simple = setup.sharding in ("fsdp", "zero1")
    if is_simple or count_params(setup.config) > SPLIT_PARAMS:
        return rate
    return rate / SPLIT_GAIN


def _layouts(base: Setup, wanted: Wishes) -> Iterator[Setup]:
    for (sharding, stack), usual in RECOMPUTES.items():
        is_open = sharding == "ddp" or (sharding == "fsdp" and base.n_gpus > 1)
        is_wanted = is_open if wanted.sharding is None else wanted.sharding == sharding
        if stack != base.stack or not is_wanted:
            continue
        for recompute in (wanted.recompute,) if wanted.recompute else usual:
            setup = replace(base, sharding=sharding, recompute=recompute)
            for size in _micro_batch_sizes(setup, wanted):
                yield replace(setup, micro_batch_size=size)


def _split_layouts(base: Setup, wanted: Wishes, sharding: Sharding) -> Iterator[Setup]:
    """Layouts in which as few GPUs as possible share a sequence, and a split model's blocks; those
    that recompute least. GPUs that are too few for another copy stay idle.
    """
    usual: tuple[Recompute, ...] = ("full",)
    if sharding == "model":
        usual = ("none", "selective", "full")
    is_known = sharding != "model" or base.stack == "compiled"
    is_wanted = wanted.sharding == sharding or (wanted.sharding is None and sharding != "zero1")
    if base.n_gpus == 1 or not is_known or not is_wanted:
        return
    for recompute in (wanted.recompute,) if wanted.recompute else usual:
        setup = replace(base, sharding=sharding, recompute=recompute)
        for split in (2**k for k in range(base.n_gpus.bit_length())):
            stages = _stages(setup, split) if sharding == "model" else 1
            if stages is None:
                continue
            shared = replace(setup, sequence_split=split, stages=stages)
            sizes = list(_micro_batch_sizes(shared, wanted))
            yield from (replace(shared, micro_batch_size=size) for size in sizes)
            if sizes:
                return


def _stages(setup: Setup, split: int) -> int | None:
    """Stages of a pipeline over which bf16 weights and fp32 gradients are spread enough, if so
    many can be had."""
    held = 6 * count_params(setup.config) / split
    stages = 1
    while held / stages > HELD_FRACTION * setup.hardware.memory_bytes:
        stages *= 2
    return stages if stages <= min(MAX_STAGES, setup.n_gpus // split) else None


def _tight_layouts(base: Setup, wanted: Wishes) -> Iterator[Setup]:
    """What needs a little more than there is: the tightest layout, or what a program is told to do.

    Told is a sharded layout with its micro-batch: that it runs is known better than its memory.
    """
    is_told = wanted.sharding in ("zero1", "fsdp") and wanted.micro_batch_size is not None
    is_tightest = wanted.sharding in (None, "fsdp") and wanted.recompute in (None, "full")
    is_open = is_told or (is_tightest and (wanted.micro_batch_size or 1) == 1)
    if base.n_gpus == 1 or not is_open:
        return
    setup = replace(
        base,
        sharding=wanted.sharding or "fsdp",
        recompute=wanted.recompute or "full",
        micro_batch_size=wanted.micro_batch_size or 1,
    )
    if setup_memory(setup).total <= TIGHT * base.hardware.memory_bytes:
        yield setup


def _micro_batch_sizes(setup: Setup, wanted: Wishes) -> Iterator[int]:
    largest = most_sequences(setup)
    if wanted.micro_batch_size:
        if wanted.micro_batch_size <= largest:
            yield wanted.micro_batch_size
        return
    split = setup.sequence_split
    cap = min(largest, max(1, MAX_MICRO_TOKENS * split // setup.context_length))
    cap = min(cap, max(1, setup.global_batch_size * split // setup.n_gpus))
    size = 1
    while size <= cap:
        yield size
        size *= 2


def _check_precision(hardware: Hardware, precision: Precision) -> None:
    if precision == "fp8" and hardware.peak_fp8_flops is None:
        able = ", ".join(name for name, gpu in GPUS.items() if gpu.peak_fp8_flops)
        raise ConfigError(f"{hardware.name} has no fp8: take precision bf16, or one of {able}")


def _nothing_fits(base: Setup, wanted: Wishes) -> str:
    size = format_count(count_params(base.config))
    memory = format_bytes(base.hardware.memory_bytes)
    machine = f"{base.n_gpus} x {base.hardware.name}"
    if wanted.micro_batch_size and wanted.micro_batch_size > 1:
        asked = [(wanted.recompute or r, wanted.sharding or s) for r, s in _ALL]
        largest = max(most_sequences(replace(base, recompute=r, sharding=s)) for r, s in asked)
        if largest:
            return (
                f"{wanted.micro_batch_size} sequences of {base.context_length} tokens of a {size}"
                f" model do not fit {machine}: the most that fit a GPU by itself are {largest}"
            )
    less = "take GPUs with more memory, a smaller model, or a shorter context"
    what = f"a {size} model with context {base.context_length} does not fit"
    if wanted.sharding == "ddp":
        return (
            f"{what} a single {base.hardware.name} of {memory}, and DDP keeps all of it on each"
            f" GPU: {less}; --sharding fsdp answers for a program that shards it"
        )
    return f"{what} {machine} of {memory} each: {less}, or more GPUs"


_ALL: tuple[tuple[Recompute, Sharding], ...] = (("none", "ddp"), ("full", "ddp"), ("full", "fsdp"))
