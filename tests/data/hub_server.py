"""As much of the Hugging Face hub as data sets are read through: lists of files, and their parts.

Repositories are directories, `root/owner/name`; the card is their README.md. A file is answered
with a redirect, as by the hub, whose content lies elsewhere. Failures have the status, headers and
bodies that the hub's have.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
"""The commit that every repository is at."""


@dataclass(frozen=True)
class Failure:
    """An answer instead of the right one."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: str = ""


GATED = Failure(
    401,
    (
        ("X-Error-Code", "GatedRepo"),
        ("X-Error-Message", "Access to dataset a/gated is restricted. You must have access to it"),
    ),
    '{"error":"Access to dataset a/gated is restricted. You must have access to it and be'
    ' authenticated to access it. Please log in."}',
)
MISSING = Failure(
    401, (("X-Error-Message", "Invalid username or password."),), '{"error":"Invalid username"}'
)
NOT_FOUND = Failure(404, (("X-Error-Code", "RepoNotFound"),), '{"error":"Repository not found"}')
NO_REVISION = Failure(404, (("X-Error-Code", "RevisionNotFound"),), '{"error":"Invalid rev id"}')
TOO_MANY = Failure(429, (("Retry-After", "0"),), "We had to rate limit your IP")
BAD_GATEWAY = Failure(502, (), "<html>502 Bad Gateway</html>")


class HubServer:
    """A running server; `decide` may turn any request into a failure."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.decide: Callable[[str], Failure | str | None] = lambda path: None
        """From the path to a failure, "stall", "cut" or nothing."""
        self.requests: list[tuple[str, str | None]] = []
        """Path and Authorization of every request so far."""
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """A server of the repositories beneath `root`."""
    with contextlib.closing(HubServer(root)) as server:
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub = self.server.hub
        hub.requests.append((self.path, self.headers.get("Authorization")))
        failure = hub.decide(self.path)
        path = unquote(urlsplit(self.path).path)
        if isinstance(failure, Failure):
            self._answer(failure.status, failure.body.encode(), *failure.headers)
        elif failure == "stall":
            hub.released.wait(60)
            self.close_connection = True
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(found[1], found[2])
        elif found := re.fullmatch(rf"/datasets/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            self._answer(302, b"", ("Location", f"/cdn/{found[1]}/{found[2]}?signature=secret"))
        elif path.startswith("/cdn/"):
            self._send_part(hub.root / path.removeprefix("/cdn/"), is_cut=failure == "cut")
        else:
            self._answer(404, b"not found")

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _describe(self, repository: str, revision: str | None) -> None:
        folder = self.server.hub.root / repository
        if not folder.is_dir():
            self._answer(MISSING.status, MISSING.body.encode(), *MISSING.headers)
        elif revision not in (None, "main", COMMIT):
            self._answer(NO_REVISION.status, NO_REVISION.body.encode(), *NO_REVISION.headers)
        else:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            info = {
                "id": repository,
                "sha": COMMIT,
                "siblings": [_sibling(path, folder) for path in files],
                "cardData": _card(folder),
                "tags": [],
            }
            self._answer(200, json.dumps(info).encode(), ("Content-Type", "application/json"))

    def _send_part(self, path: Path, *, is_cut: bool) -> None:
        content = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            self._answer(200, content)
            return
        part = content[int(span[1]) : int(span[2]) + 1]
        last = int(span[1]) + len(part) - 1
        place = ("Content-Range", f"bytes {span[1]}-{last}/{len(content)}")
        self._answer(206, part, place, cut=len(part) // 2 if is_cut else None)

    def _answer(
        self, status: int, body: bytes, *headers: tuple[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    do_HEAD = do_GET


def _sibling(path: Path, folder: Path) -> dict:
    content = path.read_bytes()
    name = path.relative_to(folder).as_posix()
    sibling = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if path.suffix in (".parquet", ".gz", ".zst"):
        sha256 = hashlib.sha256(content).hexdigest()
        sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 135}
    return sibling


def _card(folder: Path) -> dict:
    readme = folder / "README.md"
    if not readme.exists():
        return {}
    return yaml.safe_load(readme.read_text().split("---")[1]) or {}
