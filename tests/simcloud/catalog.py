"""A small price catalog where SkyPilot 0.14 looks for it, so that it never asks the network.

A file without its `.md5` companion counts as edited by the user and is never refreshed. The GPU
rows are AWS's prices of 2026 as SkyPilot's public catalog has them; those of the CPU machines are
made up. The quota table is empty, which switches SkyPilot's own quota check off.
"""

import csv
from pathlib import Path

SCHEMA = "v8"
IMAGE = "ami-0c3bc6c2c633f3dd3"
ZONES = {
    "us-east-1": ("use1-az1", "use1-az2", "use1-az6"),
    "us-east-2": ("use2-az1", "use2-az2"),
    "us-west-2": ("usw2-az1", "usw2-az2"),
}
# instance, GPU, count, vCPUs, GiB, MiB of one GPU, on demand, spot
GPU_MACHINES = (
    ("p4d.24xlarge", "A100", 8, 96, 1152, 40960, 21.957642, 6.289),
    ("p4de.24xlarge", "A100-80GB", 8, 96, 1152, 81920, 27.447053, 9.7332),
    ("p5.48xlarge", "H100", 8, 192, 2048, 81920, 55.04, 14.25),
    ("p5.4xlarge", "H100", 1, 16, 256, 81920, 6.88, ""),
)
CPU_MACHINES = (
    ("m6i.large", 2, 8, 0.096),
    ("m6i.xlarge", 4, 16, 0.192),
    ("m6i.2xlarge", 8, 32, 0.384),
    ("m6i.4xlarge", 16, 64, 0.768),
    ("m6i.8xlarge", 32, 128, 1.536),
)
GPU_MEMORY_GB = {"A100": 40, "A100-80GB": 80, "A10G": 24, "H100": 80, "H200": 141, "L4": 24}
IMAGE_TAGS = (
    "skypilot:custom-gpu-ubuntu-cuda13",
    "skypilot:custom-gpu-ubuntu",
    "skypilot:custom-cpu-ubuntu",
)


def install_catalog(home: Path) -> None:
    """Write the catalog below `home`."""
    folder = home / ".sky" / "catalogs" / SCHEMA
    _write(
        folder / "aws/vms.csv",
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,"
        "Region,AvailabilityZone,Arch",
        [
            row
            for region, zones in ZONES.items()
            for zone in zones
            for row in _machines(region, zone)
        ],
    )
    _write(
        folder / "aws/images.csv",
        "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId",
        [
            [tag, region, "ubuntu", "22.04", IMAGE, "20241104", ""]
            for tag in IMAGE_TAGS
            for region in ZONES
        ],
    )
    _write(
        folder / "aws/instance_quota_mapping.csv",
        "InstanceType,QuotaCode,OnDemandInstanceCode,SpotInstanceCode",
        [],
    )
    _write(
        folder / "common/accelerators.csv",
        "AcceleratorName,Clouds",
        [[name, "['AWS']"] for name in GPU_MEMORY_GB],
    )
    _write(
        folder / "common/metadata.csv",
        "GPU,MemoryGB,Manufacturer",
        [[name, memory, "NVIDIA"] for name, memory in GPU_MEMORY_GB.items()],
    )


def _machines(region: str, zone: str) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, gpu, count, cpus, memory, gpu_mib, price, spot in GPU_MACHINES:
        info = {
            "Gpus": [
                {
                    "Name": gpu,
                    "Manufacturer": "NVIDIA",
                    "Count": count,
                    "MemoryInfo": {"SizeInMiB": gpu_mib},
                }
            ],
            "TotalGpuMemoryInMiB": gpu_mib * count,
        }
        rows.append(
            [name, gpu, float(count), cpus, memory, info, price, spot, region, zone, "x86_64"]
        )
    for name, cpus, memory, price in CPU_MACHINES:
        spot = round(price * 0.4, 4)
        rows.append([name, "", "", cpus, memory, "", price, spot, region, zone, "x86_64"])
    return rows


def _write(path: Path, header: str, rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)
