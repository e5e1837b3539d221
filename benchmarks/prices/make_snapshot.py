"""Write casallm/estimate/prices.json from a SkyPilot catalog directory and a day.

python benchmarks/prices/make_snapshot.py ../shared/data/skypilot-catalog 2026-11-22
"""

import argparse
import datetime
import json
from pathlib import Path

from casallm.estimate.hardware import GPUS
from casallm.estimate.prices import SNAPSHOT_COLUMNS, Offer, read_catalog, snapshot_rows

TARGET = Path(__file__).parents[2] / "casallm" / "estimate" / "prices.json"

EXTRA = (
    ("lambda", "us-east-1", "gpu_8x_h100_sxm5", "H100", 8, 31.92, None),
    ("nebius", "eu-north1", "gpu-h100-sxm_1gpu", "H100", 1, 2.95, 1.25),
)
"""Prices read in the same catalog where only single figures were kept."""

SOURCES = [
    "github.com/skypilot-org/skypilot-catalog, catalogs/v8: aws/vms.csv at e385a0d3,"
    " lambda/vms.csv at 0f407038, runpod/vms.csv at 01acdfd4 (GPU rows, read page by page)",
    "Lambda 8 x H100 and Nebius H100: single figures read in the same catalog",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("catalog", type=Path)
    parser.add_argument("day", type=datetime.date.fromisoformat)
    arguments = parser.parse_args()
    prices = read_catalog(arguments.catalog)
    if prices is None:
        raise SystemExit(f"{arguments.catalog} holds no offers")
    extra = [_extra_offer(*row) for row in EXTRA]
    rows = sorted(snapshot_rows([*prices.offers, *extra]), key=lambda row: [str(c) for c in row])
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    head = {"as_of": arguments.day.isoformat(), "sources": SOURCES, "columns": SNAPSHOT_COLUMNS}
    text = json.dumps(head, indent=2)[:-2] + f',\n  "offers": [\n    {lines}\n  ]\n}}\n'
    TARGET.write_text(text, encoding="utf-8")
    print(f"{len(rows)} rows written to {TARGET.name}")


def _extra_offer(
    cloud: str, region: str, instance: str, gpu: str, n_gpus: int, price: float, spot: float | None
) -> Offer:
    return Offer(cloud, region, "", instance, GPUS[gpu], n_gpus, price, spot)


if __name__ == "__main__":
    main()
