"""`python -m casallm.train.generation DIR RANKS [N_NODES NODE ADDRESS PORT]`: one torchrun.

A process of its own, so that it can die with the supervisor (and the ranks with it), and so that
torchrun's report of a failed rank, which only repeats what the rank has said, stays unsaid.
"""

import logging
import os
import sys
import uuid

from casallm.train.control import die_with_parent, environment_for_child


def main(directory: str, ranks: str, *nodes: str) -> int:
    """Run the ranks of this node to their end; 0 if all ended well."""
    die_with_parent()
    os.environ.update(environment_for_child())
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    meeting = _meet_among(*nodes) if nodes else _meet_here()
    arguments = [
        *meeting,
        f"--nproc-per-node={ranks}",
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


def _meet_here() -> list[str]:
    """A rendezvous of this machine alone, with an id and a port that nobody else has."""
    return [
        "--nnodes=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        f"--rdzv-id={uuid.uuid4().hex[:12]}",
    ]


def _meet_among(n_nodes: str, node: str, address: str, port: str) -> list[str]:
    """Fixed places: node 0 must hold rank 0, which a c10d rendezvous does not promise."""
    return [
        f"--nnodes={n_nodes}",
        f"--node-rank={node}",
        "--rdzv-backend=static",
        f"--master-addr={address}",
        f"--master-port={port}",
    ]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
