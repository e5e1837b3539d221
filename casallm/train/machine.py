"""What this machine is: its GPUs or cores, memory, and the software that computes on it."""

import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from casallm import __version__
from casallm.estimate.hardware import CPU_CORE, Hardware, hardware_of_device

MATRIX_WIDTH = 1024
MEASUREMENTS = 8


@dataclass(frozen=True)
class Machine:
    """One node, as far as training cares."""

    device_kind: str
    """cuda or cpu."""
    device_name: str
    n_gpus: int
    gpu_memory_bytes: int
    cpu_flops: float
    """What matrix products reach on all cores, measured; 0 where there are GPUs."""
    n_cores: int
    memory_bytes: int
    python: str
    torch: str
    casallm: str

    @property
    def hardware(self) -> Hardware | None:
        """The table's entry for one device, if it has one; all cores of a CPU are one device."""
        if self.device_kind == "cpu":
            return replace(CPU_CORE, peak_flops=self.cpu_flops)
        return hardware_of_device(self.device_name, self.gpu_memory_bytes)

    def devices_of(self, ranks: int) -> int:
        """How many of `hardware` compute in a run of `ranks` on this node."""
        return 1 if self.device_kind == "cpu" else ranks

    def describe(self) -> str:
        """The machine in a few words."""
        if self.device_kind == "cpu":
            return f"{self.n_cores} CPU cores"
        return f"{self.n_gpus} x {self.device_name}"

    def facts(self) -> dict[str, Any]:
        """Everything known, for the ledger and the report."""
        return asdict(self)


def this_machine() -> Machine:
    """The machine we are on; starts CUDA in this process where there are GPUs."""
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = torch.cuda.get_device_properties(0) if n_gpus else None
    return Machine(
        device_kind="cuda" if n_gpus else "cpu",
        device_name=properties.name if properties else platform.processor() or platform.machine(),
        n_gpus=n_gpus,
        gpu_memory_bytes=properties.total_memory if properties else 0,
        cpu_flops=0.0 if n_gpus else _measured_cpu_flops(),
        n_cores=_usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        torch=torch.__version__,
        casallm=__version__,
    )


def supports_bf16(machine: Machine) -> bool:
    """Whether bf16 matrix products are fast here: Ampere or newer, or a CPU with AVX512-BF16."""
    if machine.device_kind == "cuda":
        hardware = machine.hardware
        return hardware is None or hardware.has_bf16
    return _has_cpu_bf16()


def _has_cpu_bf16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _measured_cpu_flops() -> float:
    """The best rate of a large matrix product, in the type that training would use here."""
    import torch

    dtype = torch.bfloat16 if _has_cpu_bf16() else torch.float32
    a = torch.ones(MATRIX_WIDTH, MATRIX_WIDTH, dtype=dtype)
    seconds = []
    for _ in range(MEASUREMENTS):
        begin = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - begin)
    return 2 * MATRIX_WIDTH**3 / min(seconds)
