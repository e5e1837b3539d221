"""`make chaos`: the fault campaigns at full length, a verdict, and a JSON of what was found.

Ends with 1 if any promise was broken. Each campaign is an entry of `CAMPAIGNS`.
"""

# ruff: noqa: T201 - this is a command and prints its answer

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.faults import campaigns
from tests.faults.fixtures import memory_directory, stop_servers
from tests.faults.kills import sigkills

CAMPAIGNS = {**campaigns.CAMPAIGNS, "sigkills": (sigkills, 100)}
"""Those of storage and checkpoints, and the one over real runs of three ranks."""


def main() -> int:
    options = _parse()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    results = {
        name: run_campaign(name, options.seed, options.count)
        for name in ([options.only] if options.only else CAMPAIGNS)
    }
    stop_servers()
    report = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "seed": options.seed, "campaigns": results}
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if any(result["broken"] for result in results.values()) else 0


def run_campaign(name: str, seed: int, count: int | None) -> dict[str, Any]:
    """Run one campaign and say how it went."""
    campaign, usual_count = CAMPAIGNS[name]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=memory_directory()) as directory:
        result = campaign(count or usual_count, seed, Path(directory))
    seconds = round(time.monotonic() - begin, 1)
    print(f"{name}: {result.faults:,} faults, {len(result.broken)} promises broken, {seconds} s")
    for line in result.broken[:20]:
        print(f"    {line}")
    return {**asdict(result), "seconds": seconds}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The fault campaigns at full length.")
    parser.add_argument("--seed", type=int, default=0, help="chooses the faults (default: 0)")
    parser.add_argument("--count", type=int, help="faults of each (default: each its own number)")
    parser.add_argument("--only", choices=CAMPAIGNS, help="one campaign (default: all)")
    parser.add_argument("--out", type=Path, help="a file for the result, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
