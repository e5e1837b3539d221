"""What the machines can do: peak arithmetic, memory and links, by SkyPilot's names.

Peaks are the dense figures of NVIDIA's data sheets (those "with sparsity" halved), in FLOP/s;
V100 and T4 have no bf16 and are listed with fp16. Bandwidths are bytes a second, links one way.

No chip holds its peak: `sustained_fraction` is what large matrix products really reach. Measured:
A100 268 of 312 TFLOP/s (Bekman, ML Engineering, 2024), H100 and H200 720 of 989 (SemiAnalysis,
December 2024), T4 24 of 65 (its 70 W throttle it; NVIDIA's forum), B200 1,450 of 2,250 (arXiv
2604.23466; cuBLAS for moments 1,610, NVIDIA Tilus). Assumed from power limits and kin: the others.
"""

import math
from dataclasses import dataclass

from casallm.config import nearest
from casallm.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One accelerator, or one CPU core."""

    name: str
    peak_flops: float
    """Dense bf16 FLOP/s (fp16 on V100 and T4, fp32 on a CPU core)."""
    peak_fp8_flops: float | None
    memory_bytes: int
    """What CUDA reports as total, not what the box says."""
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second, one way, to the other GPUs of a usual node of eight."""
    has_bf16: bool
    sustained_fraction: float = 0.75
    """Share of the peak that large matrix products reach for hours on end."""
    attention_fraction: float = 1.0
    """Further share left to fused attention, relative to an A100: the common kernels do not use
    Hopper's and Blackwell's matrix instructions, and there are none of the best for Volta."""
    node_bandwidth: float = 12.5e9
    """Bytes a second, one way, of one usual cloud node to the others, all its adapters together."""
    is_calibrated: bool = False
    """Whether published training runs on it were used to fit the throughput model."""
    compiled_attention_fraction: float = 1.0
    """The same in compiled programs. Forward and backward with heads of 128 the common kernels do
    331 TFLOP/s on an H100, Hopper's own 539 (cuDNN) and 581 (FlashAttention-3; arXiv 2407.08608,
    figures 5 and 6): 0.65 and 1.05 to 1.14 of an A100's share. Compiled programs call either, so
    what lies between."""


# name, peak, fp8 peak, memory, memory bandwidth, link, bf16, sustained, attention, node,
# calibrated, attention in compiled programs
_GPUS = (
    Hardware("V100", 125e12, None, 16 * GIB, 900e9, 150e9, False, 0.7, 0.4, 3e9, False, 0.4),
    Hardware(
        "V100-32GB", 125e12, None, 32 * GIB, 900e9, 150e9, False, 0.7, 0.4, 12.5e9, False, 0.4
    ),
    Hardware("T4", 65e12, None, 15 * GIB, 320e9, 12e9, False, 0.37, 0.4, 6e9, False, 0.4),
    Hardware("L4", 121e12, 242e12, 22 * GIB, 300e9, 24e9, True, 0.45, 1.0, 12.5e9),
    Hardware("A10G", 70e12, None, 22 * GIB, 600e9, 24e9, True, 0.7, 1.0, 12.5e9),
    Hardware("A10", 125e12, None, 22 * GIB, 600e9, 24e9, True, 0.5, 1.0, 12.5e9),
    Hardware("L40S", 362e12, 733e12, 44 * GIB, 864e9, 24e9, True, 0.65, 1.0, 12.5e9),
    Hardware("RTX4090", 165e12, 330e12, 23 * GIB, 1008e9, 12e9, True, 0.9, 1.0, 12.5e9),
    Hardware("A100", 312e12, None, int(39.5 * GIB), 1555e9, 300e9, True, 0.86, 1.0, 200e9, True),
    Hardware(
        "A100-80GB", 312e12, None, int(79.2 * GIB), 2039e9, 300e9, True, 0.86, 1.0, 200e9, True
    ),
    Hardware("A100-80GB-PCIE", 312e12, None, 79 * GIB, 1935e9, 25e9, True, 0.78),
    Hardware(
        "H100-PCIE", 756e12, 1513e12, 79 * GIB, 2000e9, 25e9, True, 0.73, 0.6, 12.5e9, False, 0.85
    ),
    Hardware(
        "H100", 989e12, 1979e12, int(79.6 * GIB), 3350e9, 450e9, True, 0.73, 0.6, 400e9, True, 0.85
    ),
    Hardware(
        "H200", 989e12, 1979e12, int(139.8 * GIB), 4800e9, 450e9, True, 0.73, 0.6, 400e9, True, 0.85
    ),
    Hardware("B200", 2250e12, 4500e12, 178 * GIB, 7700e9, 900e9, True, 0.64, 0.6, 400e9),
)
GPUS: dict[str, Hardware] = {gpu.name: gpu for gpu in _GPUS}

MOST_GPUS = 72
"""In one machine whose links are the fast ones: an NVL72 rack."""

_ALIASES = {"a100-40gb": "A100", "h100-80gb": "H100", "h100-sxm": "H100", "h200-sxm": "H200"}

CPU_CORE = Hardware("CPU", 80e9, None, 0, 10e9, 5e9, True)
"""A core of a cloud machine: 2 AVX2 FMA units x 8 fp32 lanes x 2 at 2.5 GHz. A nominal peak."""


def gpu_named(name: str) -> Hardware:
    """The GPU that SkyPilot calls `name`; ConfigError with the nearest known name."""
    folded = {known.lower(): gpu for known, gpu in GPUS.items()}
    wanted = name.strip().lower()
    gpu = folded.get(_ALIASES.get(wanted, wanted).lower())
    if gpu is None:
        raise ConfigError(
            f"there is no GPU {name!r}{nearest(name, GPUS)} (known: {', '.join(GPUS)})"
        )
    return gpu


def parse_gpu(text: str) -> tuple[Hardware, int]:
    """`A100:8` as the GPU and how many of it in a machine; a bare name is one."""
    name, colon, count = text.partition(":")
    if colon and not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"GPU {text!r} is not NAME:COUNT: write it as A100:8 or H100:1")
    if colon and int(count) > MOST_GPUS:
        raise ConfigError(
            f"GPU {text!r}: no machine has more than {MOST_GPUS} GPUs: say how many machines with"
            f" --nodes, as in --gpu {name}:8 --nodes 4"
        )
    return gpu_named(name), int(count) if colon else 1


def hardware_of_device(device_name: str, memory_bytes: int) -> Hardware | None:
    """The table's entry for what torch calls a device ("NVIDIA A100-SXM4-80GB"), if it has one."""
    words = device_name.upper().replace("-", " ").replace("RTX ", "RTX").split()
    matches = [gpu for gpu in _GPUS if _chip(gpu) in words]
    if not matches:
        matches = [gpu for gpu in _GPUS if any(word.startswith(_chip(gpu)) for word in words)]
    if not matches:
        return None
    return min(matches, key=lambda gpu: abs(math.log(gpu.memory_bytes / max(memory_bytes, 1))))


def mfu(tokens_per_second: float, flops_per_token: float, hardware: Hardware, count: int) -> float:
    """Model FLOPs utilisation: the share of the peak that went into the model's own arithmetic."""
    return tokens_per_second * flops_per_token / (hardware.peak_flops * count)


def _chip(gpu: Hardware) -> str:
    """The name without its memory size."""
    return gpu.name.split("-")[0]
