"""`python -m casallm.train.generation DIR RANKS ID`: torchrun for one generation of ranks.

A process of its own, so that it can die with the supervisor (and the ranks with it), and so that
torchrun's report of a failed rank, which only repeats what the rank has said, stays unsaid.
"""

import logging
import os
import sys

from casallm.train.control import die_with_parent, environment_for_child


def main(directory: str, ranks: str, rendezvous_id: str) -> int:
    """Run the ranks to their end; 0 if all ended well."""
    die_with_parent()
    os.environ.update(environment_for_child())
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    arguments = [
        "--nnodes=1",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        f"--rdzv-id={rendezvous_id}",
        "--max-restarts=0",
        "--monitor-interval=0.2",
        "-m",
        "casallm.train.rank",
        directory,
    ]
    try:
        run.main(arguments)
    except ChildFailedError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
