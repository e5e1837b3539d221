"""Several nodes as one run: node 0 leads, the others do what it says, over one TCP connection each.

The same command runs on every node. Node 0 claims the attempt; the others connect to it, say which
run and which node they are, and get one JSON line for each order:

    {"kind": "start", "spec": ..., "port": ...}   begin a generation; ranks meet at this port
    {"kind": "end"}                               it is over: end your ranks
    {"kind": "done", "code": 75}                  the run is over here; exit with this code

and answer `{"kind": "failed", "words": ...}` when their ranks die, so that nobody waits for a
collective that cannot come. The connections carry no secret and nothing that is executed.
"""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from casallm.errors import TrainingError
from casallm.train.control import Spec

log = logging.getLogger(__name__)

LEADER_PORT = 29_400
"""Where node 0 listens for the other nodes."""

JOIN_SECONDS = 1800.0
"""How long the nodes of one run may take to become ready: one may still prepare its data."""

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Place:
    """Which node of how many this is, and where node 0 is."""

    node: int = 0
    n_nodes: int = 1
    master_addr: str = "127.0.0.1"
    port: int = LEADER_PORT


class Leader:
    """Node 0's end of the connections."""

    def __init__(self, place: Place, run_url: str) -> None:
        self._place = place
        self._run_url = run_url
        self._lock = threading.Lock()
        self._followers: dict[int, socket.socket] = {}
        self._failure: str | None = None
        self._server = socket.create_server(("", place.port))
        threading.Thread(target=self._accept, name="nodes", daemon=True).start()

    def start(self, spec: Spec, is_stopping: Callable[[], bool]) -> int | None:
        """Order all nodes to begin a generation; the port at which its ranks meet.

        None if the run is to stop before they are all there; TrainingError if they are not in time.
        """
        deadline = time.monotonic() + JOIN_SECONDS
        while not self._are_all_here():
            if is_stopping():
                return None
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"{len(self._followers) + 1} of {self._place.n_nodes} nodes are there after"
                    f" {JOIN_SECONDS / 60:.0f} minutes: see the logs of the missing ones"
                )
            time.sleep(0.1)
        port = _free_port()
        self._tell({"kind": "start", "spec": asdict(spec), "port": port})
        return port

    def failure(self) -> str | None:
        """What the first node whose ranks died said, since the generation began."""
        return self._failure

    def end(self) -> None:
        """Order all nodes to end the generation."""
        self._tell({"kind": "end"})

    def dismiss(self, code: int) -> None:
        """Let all nodes exit with `code`."""
        self._tell({"kind": "done", "code": code})
        self._server.close()

    def _are_all_here(self) -> bool:
        """Whether no node is missing; failures count from then on, a node that leaves included."""
        with self._lock:
            are_here = len(self._followers) == self._place.n_nodes - 1
            if are_here:
                self._failure = None
            return are_here

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._listen, args=(connection, address), daemon=True).start()

    def _listen(self, connection: socket.socket, address: Any) -> None:
        lines = _read_lines(connection)
        hello = next(lines, {})
        node = int(hello.get("node", 0))
        if hello.get("run") != self._run_url or not 0 < node < self._place.n_nodes:
            log.warning("%s is no node of this run and is turned away", address[0])
            connection.close()
            return
        with self._lock:
            self._followers[node] = connection
        for line in lines:
            if line.get("kind") == "failed":
                self._failure = f"node {node}: {line.get('words')}"
        with self._lock:
            if self._followers.get(node) is connection:
                del self._followers[node]
                self._failure = self._failure or f"node {node} is gone"

    def _tell(self, order: dict[str, Any]) -> None:
        with self._lock:
            connections = list(self._followers.values())
        for connection in connections:
            _send(connection, order)


class Follower:
    """Another node's end of its connection."""

    def __init__(self, place: Place, run_url: str) -> None:
        self._connection = _connect(place)
        _send(self._connection, {"run": run_url, "node": place.node})

    def orders(self) -> Iterator[dict[str, Any]]:
        """What node 0 says, until it says no more."""
        return _read_lines(self._connection)

    def report_failure(self, words: str) -> None:
        """Tell node 0 that ranks here have died."""
        _send(self._connection, {"kind": "failed", "words": words})


def _connect(place: Place) -> socket.socket:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            connection = socket.create_connection((place.master_addr, place.port), timeout=10)
        except OSError as error:
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"node 0 does not answer at {place.master_addr}:{place.port} ({error}): check"
                    " --master-addr, and that the nodes reach each other"
                ) from None
            time.sleep(0.5)
        else:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return connection


def _read_lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    try:
        with connection.makefile("rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value
    except (OSError, ValueError):
        return


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    try:
        connection.sendall((json.dumps(value) + "\n").encode())
    except OSError as error:
        log.warning("a node cannot be reached: %s", error)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
