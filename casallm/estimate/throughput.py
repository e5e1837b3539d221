"""How fast a model trains on a machine, part by part, and how sure that is.

The time of an optimizer step on one GPU is a sum of what the chip does one after the other:

* matrix: the products' arithmetic at the share of the peak that large ones sustain, plus the
  traffic of their operands, in fp8 with the casts. The second makes narrow models slower: with k
  columns to sum over, it is worth `peak / bandwidth / k` of the first.
* attention: 7 n_layers d_attn context FLOPs a token (2 forward, 5 backward with its own
  recomputation, the masked half not done), at a rate that grows with head and context.
* tail: norms, activations, residual additions, softmax: bytes over the memory's bandwidth.
* communication: what the slowest link carries and does not hide behind arithmetic, the idle
  ends of a pipeline, and the waiting of many nodes for each other.
* optimizer: AdamW's 40 bytes a parameter.

The few constants were fitted to published runs (`casallm.estimate.calibration`) and lie, with
their provenance, in `throughput.json`. A run's own measured rate replaces all of this.
"""

import json
import math
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources

from casallm.errors import ConfigError
from casallm.estimate.architecture import (
    ModelConfig,
    count_matmul_params,
    count_params,
    flops_per_token,
)
from casallm.estimate.hardware import Hardware
from casallm.estimate.memory import Precision, Recompute, Sharding, Stack

ACHIEVED_BANDWIDTH = 0.85
"""Share of the memory's nominal bandwidth that streaming kernels reach."""

FP8_GAIN = 1.78
"""Rate of large products in fp8 over bf16: 1,280 and 720 TFLOP/s on an H100 (SemiAnalysis,
December 2024)."""

OPERAND_BYTES = {"bf16": 6, "fp32": 6, "fp8": 10}
"""Bytes moved for each operand of a product, forward and backward. fp8: 4, and 6 for its cast: read
for the scale, read again, written in both orders, as its products sum along rows only."""

GATHERED_BYTES = {"bf16": 6, "fp32": 6, "fp8": 4}
"""Bytes of a sharded weight that travel in a pass: gathered twice, its gradient scattered once."""

REDUCED_BYTES = {"bf16": 6, "fp32": 8, "fp8": 5}
"""Bytes of a weight of which only the optimizer's state is sharded, in a step: its fp32 gradient
scattered, its new value gathered."""

SHORT_CONTEXT = 250
"""Context at which attention reaches half its rate: FlashAttention-2 trains at 204 TFLOP/s with 512
tokens and at 302 with 8,192 on an H100 (Dao-AILab/flash-attention, pull request 2688)."""

INTERLEAVED = 4
"""Parts of a pipeline stage that take turns, of 1 to 12 in published recipes; each divides the time
that its ends are idle."""

LAUNCH_SECONDS = {"compiled": 0.2e-3, "eager": 0.5e-3}
"""The host's time for a block, forward and backward: a floor when the GPU's work is tiny."""

SCORE_BYTES = {"compiled": 12, "eager": 20}
"""Bytes that the loss moves for each score of the vocabulary, forward and backward: a fused one
writes bf16 scores, reads them twice, and turns them into their gradient in place."""

PRUDENCE = 0.88
"""Share of the rate of published programs that is promised for casallm's own, which nobody has
measured yet: what whole runs keep of their own benchmark. nanochat on 8 A100: 55.6k of 66.2k
tokens/s a GPU (84 %); fms-fsdp on 128 A100: 3,500 of 3,760 (93 %)."""

Z90 = 1.2815515655446004
"""The standard normal's 90th percentile."""


@dataclass(frozen=True)
class Setup:
    """One way to train one model on one machine."""

    config: ModelConfig
    context_length: int
    hardware: Hardware
    micro_batch_size: int
    global_batch_size: int
    """Sequences of one optimizer step, all GPUs together."""
    gpus_per_node: int = 8
    n_nodes: int = 1
    stack: Stack = "compiled"
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    sharding: Sharding = "ddp"
    node_bandwidth: float | None = None
    """Bytes a second between nodes where it is known; else the usual for the GPU."""
    sequence_split: int = 1
    """GPUs that share a sequence: tensor or context parallelism."""
    stages: int = 1
    """Of a pipeline; each has its part of the blocks."""

    @property
    def n_gpus(self) -> int:
        """All GPUs of all nodes."""
        return self.gpus_per_node * self.n_nodes

    @property
    def parts(self) -> int:
        """GPUs that share one copy of the model's work."""
        return self.sequence_split * self.stages

    @property
    def n_working(self) -> int:
        """GPUs less those that are too few for another copy of a split model."""
        return self.n_gpus // self.parts * self.parts

    @property
    def micro_steps(self) -> float:
        """Forward and backward passes of one GPU through the model in an optimizer step."""
        at_once = self.micro_batch_size * self.n_working / self.sequence_split
        return max(1.0, self.global_batch_size / at_once)

    @property
    def tensor_split(self) -> int:
        """GPUs that share every product; others that share a sequence split its context."""
        return min(self.sequence_split, self.gpus_per_node) if self.sharding == "model" else 1

    @property
    def pass_tokens(self) -> float:
        """Tokens of one GPU in such a pass."""
        return self.micro_batch_size * self.context_length / self.sequence_split


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on."""

    matrix: float
    attention: float
    tail: float
    communication: float
    optimizer: float
    tokens: float
    """Tokens of the step, all GPUs together."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.matrix + self.attention + self.tail + self.communication + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job, in steady state."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Constants:
    """What was fitted; see `throughput.json` for how and on what."""

    matmul: float
    """Share of the sustained rate that the products reach; compiling changes them little."""
    tail_eager: float
    """Bytes of the tail over those counted in `_tail_bytes`."""
    tail_compiled: float
    """The same, compiled: kernels are fused."""
    attention_eager: float
    """Share of the sustained rate that fused attention reaches on an A100 with heads of 128, at
    the longest contexts."""
    attention_compiled: float
    """The same in compiled programs, which are younger and have FlashAttention-2."""
    exposed: float
    """Share of the link's time that is not hidden behind arithmetic."""
    hop_seconds: float
    """Waiting of each block's collectives for every doubling of the nodes."""
    recompute_share: float
    """Cost of a recomputed forward pass over that of the first one."""
    straggling: float
    """Share of the rate lost at every doubling of the nodes beyond what the links explain."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the logarithm of the rate; they add in squares."""

    system: float
    """Between programs that do the same."""
    skew: float
    """How much more that is on the slow side: physics bounds the fast one, nothing the slow."""
    chip: float
    """For a GPU on which no published run was used."""
    layout: float
    """For what is chosen here and was chosen otherwise there: micro-batch, sharding, batch."""
    doubling: float
    """For every doubling of the nodes."""
    measured: float
    """Of a run's own rate, once it has been measured."""


@dataclass(frozen=True)
class Throughput:
    """Tokens a second of the whole job in steady state: log-normal on either side of the median."""

    p50: float
    sigma: float
    """Of the faster half."""
    skew: float = 1.0
    """The slower half's deviation over that."""

    @property
    def p10(self) -> float:
        """Nine of ten runs are faster."""
        return self.p50 * math.exp(-Z90 * self.sigma * self.skew)

    @property
    def p90(self) -> float:
        """One of ten runs is faster."""
        return self.p50 * math.exp(Z90 * self.sigma)


def predict(setup: Setup, *, is_own: bool = False) -> Throughput:
    """The rate of `setup`, with its uncertainty: of published programs, or of casallm's own.

    Its spread is alike on both sides: prudence has moved the middle towards the slow one.
    """
    spread = load_spread()
    doublings = math.log2(setup.n_nodes)
    chip = 0.0 if setup.hardware.is_calibrated else spread.chip
    variance = spread.system**2 + spread.layout**2 + chip**2 + (spread.doubling * doublings) ** 2
    published = Throughput(step_time(setup).tokens_per_second, math.sqrt(variance), spread.skew)
    if not is_own:
        return published
    promised = prudence(setup.hardware) * published.p50
    return Throughput(promised, published.sigma * math.sqrt(spread.skew))


def prudence(hardware: Hardware) -> float:
    """`PRUDENCE`, and on a GPU that no run has calibrated less by the spread that stands for that.

    A B200's products are worth 2.0 of an H200's; in training GPT 1.3B it was 1.55 times as fast
    (arXiv 2512.02189).
    """
    return PRUDENCE if hardware.is_calibrated else PRUDENCE * math.exp(-load_spread().chip)


def measured(tokens_per_second: float) -> Throughput:
    """A run's own rate: it replaces the prediction and is nearly certain."""
    if not (math.isfinite(tokens_per_second) and tokens_per_second > 0):
        raise ConfigError(
            f"measured tokens per second are {tokens_per_second:g}, but must be positive:"
            " take them from the run's progress line"
        )
    return Throughput(tokens_per_second, load_spread().measured)


def mfu(tokens_per_second: float, setup: Setup) -> float:
    """Model FLOPs utilisation by the standard convention, of the peak in bf16."""
    flops = flops_per_token(setup.config, setup.context_length)
    return tokens_per_second * flops / (setup.hardware.peak_flops * setup.n_gpus)


def step_time(setup: Setup, constants: Constants | None = None) -> StepTime:
    """Seconds of one optimizer step on each GPU, part by part."""
    known = constants or load_constants()
    bandwidth = setup.hardware.memory_bandwidth * ACHIEVED_BANDWIDTH
    repeated = _repeated(setup, known)
    matrix = _matrix_seconds(setup, known, repeated)
    attention = _attention_seconds(setup, known)
    tail_ratio = known.tail_compiled if setup.stack == "compiled" else known.tail_eager
    tail = tail_ratio * _tail_bytes(setup, repeated) / bandwidth
    floor = setup.config.n_layers * LAUNCH_SECONDS[setup.stack]
    idle = max(0.0, floor - matrix - attention - tail)
    shards = 1 if setup.sharding == "ddp" else setup.n_gpus
    optimizer = 40 * count_params(setup.config) / shards / bandwidth
    tokens = setup.pass_tokens * setup.micro_steps
    micro = setup.micro_steps
    busy = micro * (matrix + attention + tail + idle)
    lost = known.straggling * math.log2(setup.n_nodes) + _bubble(setup)
    return StepTime(
        matrix=micro * matrix,
        attention=micro * attention,
        tail=micro * (tail + idle),
        communication=_communication_seconds(setup, known) + lost * busy,
        optimizer=optimizer,
        tokens=tokens * setup.n_working,
    )


@cache
def load_constants() -> Constants:
    """The fitted constants that ship with the package."""
    fitted = _fitted()["constants"]
    return Constants(**{field.name: fitted[field.name] for field in fields(Constants)})


@cache
def load_spread() -> Spread:
    """The spread of published runs around the model, as it ships with the package."""
    fitted = _fitted()["spread"]
    return Spread(**{field.name: fitted[field.name] for field in fields(Spread)})


@cache
def _fitted() -> dict[str, dict[str, float]]:
    text = resources.files("casallm.estimate").joinpath("throughput.json").read_text("utf-8")
    return dict(json.loads(text))


def _repeated(setup: Setup, known: Constants) -> float:
    """Forward passes of the blocks' products done a second time, as a share of one."""
    share = {"none": 0.0, "selective": 0.5, "full": 1.0}[setup.recompute]
    return share * known.recompute_share


def _matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of every product of a block."""
    d_kv = config.kv_heads * config.d_head
    attention = [(config.d_model, config.d_model + 2 * d_kv), (config.d_model, config.d_model)]
    widening = 1 if config.family == "classic" else 2
    mlp = [(config.d_model, widening * config.ff_width), (config.ff_width, config.d_model)]
    return attention + mlp


def _matrix_seconds(setup: Setup, known: Constants, repeated: float) -> float:
    """Of one micro-step: a product is done once forward and twice backward."""
    config, hardware = setup.config, setup.hardware
    rate = hardware.peak_flops * hardware.sustained_fraction * known.matmul
    if setup.precision == "fp32":
        rate /= 2 if hardware.has_bf16 else 8
    block_rate = rate * (FP8_GAIN if setup.precision == "fp8" else 1.0)
    bandwidth = hardware.memory_bandwidth * ACHIEVED_BANDWIDTH
    n_tokens = setup.pass_tokens
    passes = 1 + repeated / 3
    seconds = 0.0
    for n_in, n_out in _matrices(config):
        values = n_tokens * (n_in + n_out) + n_in * n_out / setup.tensor_split
        moved = OPERAND_BYTES[setup.precision] * values
        block = 6 * n_tokens * n_in * n_out / block_rate + moved / bandwidth
        seconds += config.n_layers * passes * block
    vocab = config.padded_vocab_size
    moved = 6 * (n_tokens * (config.d_model + vocab) + config.d_model * vocab)
    return seconds + 6 * n_tokens * config.d_model * vocab / rate + moved / bandwidth


def _attention_seconds(setup: Setup, known: Constants) -> float:
    config, hardware = setup.config, setup.hardware
    context = setup.context_length
    passes = {"none": 7, "selective": 7, "full": 9}[setup.recompute]
    flops = passes * config.n_layers * config.d_model * context * setup.pass_tokens
    by_width = config.d_head / (config.d_head + 32) * 1.25
    by_length = context / (context + SHORT_CONTEXT)
    reached = known.attention_eager * hardware.attention_fraction
    if setup.stack == "compiled":
        reached = known.attention_compiled * hardware.compiled_attention_fraction
    share = hardware.sustained_fraction * reached * by_width * by_length
    return flops / (hardware.peak_flops * share)


def _tail_bytes(setup: Setup, repeated: float) -> float:
    """Of one micro-step, two bytes a value: two norms (10 widths), two residual additions (12),
    the activation (5 or, gated, 8 MLP widths), and the scores of the vocabulary.
    """
    config = setup.config
    mlp = (5 if config.family == "classic" else 8) * config.ff_width
    per_token = 2 * config.n_layers * (22 * config.d_model + mlp) * (1 + repeated / 3)
    per_token += SCORE_BYTES[setup.stack] * config.padded_vocab_size
    return per_token * setup.pass_tokens


def _communication_seconds(setup: Setup, known: Constants) -> float:
    """Of an optimizer step: DDP reduces fp32 gradients once, with a sharded optimizer the weights
    return once; sharded weights travel in every micro-step; those of a parallel model stay, and
    its copies reduce gradients once.
    """
    n_gpus = setup.n_gpus
    if n_gpus == 1:
        return 0.0
    n_params = count_matmul_params(setup.config)
    times, volume, copies = 1.0, 8.0, n_gpus
    if setup.sharding == "fsdp":
        times, volume = setup.micro_steps, GATHERED_BYTES[setup.precision]
    elif setup.sharding == "zero1":
        volume = REDUCED_BYTES[setup.precision]
    elif setup.sharding == "model":
        copies = n_gpus // setup.parts
        volume *= min(1.0, setup.gpus_per_node / setup.parts)
    moved = volume * n_params * (copies - 1) / copies
    hops = 3 * setup.config.n_layers * math.log2(setup.n_nodes)
    waiting = times * known.hop_seconds * hops
    return known.exposed * (times * moved / _slowest_link(setup) + _exchange(setup)) + waiting


def _slowest_link(setup: Setup) -> float:
    link = setup.hardware.link_bandwidth
    if setup.n_nodes == 1:
        return link
    return min(link, setup.node_bandwidth or setup.hardware.node_bandwidth)


def _exchange(setup: Setup) -> float:
    """Seconds in which GPUs that share a sequence exchange it: its activations before and after
    attention and MLP, forward and backward, in bf16 (Korthikanti et al. 2022, arXiv 2205.05198).

    Beyond a node, and where whole weights are gathered, keys and values alone go around.
    """
    config = setup.config
    tensor = setup.tensor_split
    values = 8 * (tensor - 1) * config.d_model
    values += 6 * (setup.sequence_split // tensor - 1) * config.kv_heads * config.d_head
    moved = 2 * values * config.n_layers * setup.pass_tokens * setup.micro_steps
    return moved / setup.hardware.link_bandwidth


def _bubble(setup: Setup) -> float:
    """Share of the busy time that the ends of a pipeline wait (Narayanan et al. 2021, arXiv
    2104.04473, section 2.2)."""
    in_turn = setup.micro_steps * setup.stages
    return (setup.stages - 1) / (INTERLEAVED * in_turn)
