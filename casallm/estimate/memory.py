"""What training keeps in a GPU's memory, and so the largest micro-batch that fits.

Weights, gradients and optimizer state follow from the parameters. What the backward pass needs of
the forward pass is counted tensor by tensor as `casallm.model.gpt` saves it without compilation;
`tests/estimate/test_memory.py` holds that count against torch's saved-tensor hooks, to the byte.
Compiled, torch recomputes what is cheap: that count is an estimate, a little above what is kept.
"""

from dataclasses import dataclass
from typing import Literal

from casallm.estimate.architecture import ModelConfig, count_matmul_params, count_params
from casallm.estimate.hardware import GIB, Hardware

Precision = Literal["bf16", "fp8", "fp32"]
Recompute = Literal["none", "selective", "full"]
Stack = Literal["compiled", "eager"]
DataParallel = Literal["ddp", "zero1", "fsdp"]
"""Every GPU holds the model; all but the optimizer's state and master weights, which are sharded;
or all state is sharded and the weights gathered block by block."""
Sharding = Literal[DataParallel, "model"]
"""Or the model's parts stay where they are: tensor and pipeline parallelism."""

STATE_BYTES_PER_PARAM = {"weights": 4, "gradients": 4, "optimizer": 8}
"""fp32 master weights and gradients, and AdamW's two moments."""

CONTEXT_BYTES = GIB
"""CUDA's context, NCCL's buffers and the workspaces of the matrix libraries."""

USABLE_FRACTION = 0.94
"""The rest is lost to the allocator's fragmentation."""


@dataclass(frozen=True)
class Shards:
    """How the state of a model lies on the GPUs that train it."""

    sharding: Sharding = "ddp"
    n_gpus: int = 1
    parts: int = 1
    """Of a model that is split, over which its weights and gradients are spread."""


WHOLE = Shards()
"""All of it on every GPU."""


@dataclass(frozen=True)
class SavedTensors:
    """Bytes that autograd keeps of one forward pass, by where they arise."""

    blocks: int
    """Every block of the model."""
    ends: int
    """Token ids, the last norm, the log-probabilities."""
    weight_copies: int
    """Weights cast for the matrix products of a mixed-precision pass."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.blocks + self.ends + self.weight_copies


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass needs, copies of the weights included."""
    logits: int
    """The scores over the vocabulary and their gradient, at their widest moment."""
    margin: int
    """CUDA's context and the allocator's losses."""

    @property
    def total(self) -> int:
        """All of it."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.logits + self.margin


def saved_tensors(
    config: ModelConfig, n_sequences: int, context_length: int, precision: Precision = "bf16"
) -> SavedTensors:
    """What an uncompiled forward pass with loss saves for the backward pass; exact.

    Counted once where several operations save the same storage; parameters are not counted. fp8
    is counted as bf16.
    """
    n_tokens = n_sequences * context_length
    ends = 8 + 8 + _norm_bytes(config, config.d_model, 1) + 4 * config.vocab_size
    ends += _compute_bytes(precision) * config.d_model
    return SavedTensors(
        blocks=n_tokens * config.n_layers * _block_bytes(config, precision),
        ends=n_tokens * ends + 4,
        weight_copies=_weight_copies(config, precision),
    )


def compiled_block_bytes(config: ModelConfig, precision: Precision = "bf16") -> int:
    """Bytes that a compiled block keeps of one token: what matrix products and attention need.

    Norms, activations and rotations are cheap and computed again; their inputs are kept.
    """
    d_kv = config.kv_heads * config.d_head
    attention = 2 * config.d_model + 2 * config.d_model + 2 * d_kv
    mlp = config.ff_width * (1 if config.family == "classic" else 2)
    return _compute_bytes(precision) * (attention + mlp) + 4 * config.n_heads + 16


def training_memory(
    config: ModelConfig,
    n_sequences: int,
    context_length: int,
    *,
    precision: Precision = "bf16",
    recompute: Recompute = "none",
    stack: Stack = "compiled",
    shards: Shards = WHOLE,
    split: int = 1,
) -> Memory:
    """Bytes on one GPU at the peak of a step of `n_sequences`, each shared by `split` GPUs."""
    state = _state_bytes(count_params(config), precision, shards)
    activations = _activation_bytes(
        config, n_sequences, context_length, precision=precision, recompute=recompute, stack=stack
    )
    if shards.sharding != "ddp":
        activations -= _weight_copies(config, precision)
    if shards.sharding == "fsdp":
        activations += _weight_copies(config, precision) // min(shards.n_gpus, config.n_layers)
    activations //= split
    wide = 4 if stack == "compiled" else 10
    logits = n_sequences * context_length * config.padded_vocab_size * wide // split
    used = sum(state.values()) + activations + logits
    margin = CONTEXT_BYTES + round(used * (1 / USABLE_FRACTION - 1))
    return Memory(**state, activations=activations, logits=logits, margin=margin)


def largest_micro_batch(
    config: ModelConfig,
    context_length: int,
    hardware: Hardware,
    *,
    precision: Precision = "bf16",
    recompute: Recompute = "none",
    stack: Stack = "compiled",
    shards: Shards = WHOLE,
    split: int = 1,
) -> int:
    """The most sequences that fit `hardware` in one forward and backward pass; 0 if none does."""

    def total(n_sequences: int) -> int:
        return training_memory(
            config,
            n_sequences,
            context_length,
            precision=precision,
            recompute=recompute,
            stack=stack,
            shards=shards,
            split=split,
        ).total

    fixed, one = total(0), total(1)
    return max(0, int((hardware.memory_bytes - fixed) // (one - fixed)))


def _state_bytes(n_params: int, precision: Precision, shards: Shards) -> dict[str, int]:
    """What a GPU holds of weights, gradients and optimizer.

    ZeRO-1 keeps the weights of the passes and fp32 gradients: 6 + 12/n bytes a parameter, in fp32
    8 + 8/n, as Megatron's guide to its distributed optimizer counts them. A model that is split
    does so as well, with its part of the weights and gradients.
    """
    sharers = 1 if shards.sharding == "ddp" else shards.n_gpus
    state = {name: size * n_params // sharers for name, size in STATE_BYTES_PER_PARAM.items()}
    if shards.sharding in ("zero1", "model"):
        masters = 0 if precision == "fp32" else state["weights"]
        state["weights"] = _compute_bytes(precision) * n_params // shards.parts + masters
        state["gradients"] = STATE_BYTES_PER_PARAM["gradients"] * n_params // shards.parts
    return state


def _activation_bytes(
    config: ModelConfig,
    n_sequences: int,
    context_length: int,
    *,
    precision: Precision,
    recompute: Recompute,
    stack: Stack,
) -> int:
    saved = saved_tensors(config, n_sequences, context_length, precision)
    n_tokens = n_sequences * context_length
    blocks = saved.blocks
    ends = saved.ends
    if stack == "compiled":
        blocks = n_tokens * config.n_layers * compiled_block_bytes(config, precision)
        ends -= n_tokens * 4 * config.vocab_size
    one_block = blocks // config.n_layers
    inputs = n_tokens * _compute_bytes(precision) * config.d_model * config.n_layers
    if recompute == "full":
        blocks = inputs + one_block
    elif recompute == "selective":
        blocks = (blocks + inputs + one_block) // 2
    return blocks + ends + saved.weight_copies


def _block_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes saved by one uncompiled block for one token."""
    size = _compute_bytes(precision)
    d_kv = config.kv_heads * config.d_head
    norms = 2 * (_norm_bytes(config, config.d_model, 1) + size * config.d_model)
    attention = size * (2 * config.d_model + 2 * d_kv) + 4 * config.n_heads
    if config.family == "modern":
        attention += _norm_bytes(config, config.d_model, config.n_heads)
        attention += _norm_bytes(config, d_kv, config.kv_heads)
    mlp = size * config.ff_width * (2 if config.family == "classic" else 4)
    return norms + attention + mlp


def _norm_bytes(config: ModelConfig, width: int, n_rows: int) -> int:
    """What a norm over `n_rows` rows, together `width` wide, saves of one token.

    In fp32: LayerNorm its input, mean and deviation; RMSNorm its input, that input over its root
    mean square, and the inverse root.
    """
    return 4 * width + 8 * n_rows if config.family == "classic" else 8 * width + 4 * n_rows


def _weight_copies(config: ModelConfig, precision: Precision) -> int:
    """Weights cast for the products; where weights are sharded, those of a block at a time."""
    return 0 if precision == "fp32" else 2 * count_matmul_params(config)


def _compute_bytes(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2
