"""Goodput as predicted from the mean time between preemptions, against a replay of each trace.

python benchmarks/calibration/replay_traces.py ../shared/data/spot-traces
"""

import argparse
from pathlib import Path

from casallm.estimate.spot import Recovery, best_interval, goodput, mean_life, read_trace, replay

RECOVERIES = {
    "2 s stall, 30 s upload, 6 min restart": Recovery(2, 30, 360),
    "2 s stall, 60 s upload, 10 min restart": Recovery(2, 60, 600),
    "72 s synchronous save, 10 min restart": Recovery(72, 0, 600),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    paths = sorted(parser.parse_args().traces.glob("*.json.gz"))
    print(f"{'trace':58} {'mtbf':>6} {'up':>5} " + "  ".join(f"({i + 1})" for i in range(3)))
    worst = dict.fromkeys(RECOVERIES, 0.0)
    for path in paths:
        trace = read_trace(path)
        mtbf = mean_life(trace)
        shown = []
        for name, recovery in RECOVERIES.items():
            result = replay(trace, recovery, float(best_interval(mtbf, recovery)))
            error = float(goodput(mtbf, recovery)) - result.goodput
            worst[name] = max(worst[name], abs(error))
            shown.append(f"{result.goodput:.1%} {100 * error:+.1f}")
        share = f"{result.paid / result.total:.0%}"
        print(f"{trace.name:58} {mtbf / 3600:5.2f}h {share:>5} " + "  ".join(shown))
    for i, (name, error) in enumerate(worst.items()):
        print(f"({i + 1}) {name}: at most {100 * error:.1f} points off")


if __name__ == "__main__":
    main()
