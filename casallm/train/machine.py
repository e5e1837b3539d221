"""What this machine is: its GPUs or cores, memory, and the software that computes on it."""

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from casallm import __version__
from casallm.estimate.hardware import CPU_CORE, Hardware, hardware_of_device


@dataclass(frozen=True)
class Machine:
    """One node, as far as training cares."""

    device_kind: str
    """cuda or cpu."""
    device_name: str
    n_gpus: int
    gpu_memory_bytes: int
    n_cores: int
    memory_bytes: int
    python: str
    torch: str
    casallm: str

    @property
    def hardware(self) -> Hardware | None:
        """The table's entry for one device (for a CPU: one core), if it has one."""
        if self.device_kind == "cpu":
            return CPU_CORE
        return hardware_of_device(self.device_name, self.gpu_memory_bytes)

    def devices_of(self, ranks: int) -> int:
        """How many of `hardware` compute in a run of `ranks` on this node."""
        return self.n_cores if self.device_kind == "cpu" else ranks

    def describe(self) -> str:
        """The machine in a few words."""
        if self.device_kind == "cpu":
            return f"{self.n_cores} CPU cores"
        return f"{self.n_gpus} x {self.device_name}"

    def facts(self) -> dict[str, Any]:
        """Everything known, for the ledger and the report."""
        return asdict(self)


def this_machine() -> Machine:
    """The machine we are on; asks torch for GPUs without starting CUDA."""
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = torch.cuda.get_device_properties(0) if n_gpus else None
    return Machine(
        device_kind="cuda" if n_gpus else "cpu",
        device_name=properties.name if properties else platform.processor() or platform.machine(),
        n_gpus=n_gpus,
        gpu_memory_bytes=properties.total_memory if properties else 0,
        n_cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
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
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a kernel file
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
