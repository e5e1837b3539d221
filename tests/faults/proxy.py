"""An HTTP proxy that makes a network misbehave on request.

It forwards to a real S3 server with the Host header kept (signatures cover it), and asks `decide`
what to do with each request. Conditional writes are forwarded one at a time: S3 decides them at
once, moto looks first and writes then, and a busy machine lets two pass in between. Faults:

    503, 403      the server is not asked; the answer is SlowDown, or ExpiredToken
    reset         the connection is reset; the server is not asked
    lost_ack      the server is asked, then the connection is reset
    truncate      half of the answer's body, then the connection is closed
    flip          one bit of the answer's body is wrong
    flip_request  one bit of the request's body is wrong
    stall         the server is asked, nothing is answered for a long time
    slow          the answer comes after a second
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Decide = Callable[[str, str], str | None]
"""From method and path to a fault or None."""

_REFUSALS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "403": (403, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
}


class FaultProxy:
    """A running proxy; `decide` and `on_request` may be changed at any time."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.decide: Decide = lambda method, path: None
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and fault of every request so far."""
        self.stopped = threading.Event()
        self.random = random.Random(seed)
        self.conditional = threading.Lock()
        self.upstream = urlsplit(upstream).netloc
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def at_random(self, fault: str, probability: float) -> None:
        """Inject `fault` into every request with this probability."""
        self.decide = lambda method, path: fault if self.random.random() < probability else None

    def once(self, fault: str, method: str, count: int = 1) -> None:
        """Inject `fault` into the next `count` requests of `method`."""
        remaining = [count]

        def decide(used_method: str, path: str) -> str | None:
            if used_method != method or remaining[0] == 0:
                return None
            remaining[0] -= 1
            return fault

        self.decide = decide

    def behave(self) -> None:
        """Forward everything from now on, and forget what was."""
        self.decide = lambda method, path: None
        self.requests.clear()

    def close(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.decide(self.command, self.path)
        proxy.requests.append((self.command, self.path, fault))
        if fault in _REFUSALS:
            self._refuse(*_REFUSALS[fault])
        elif fault == "reset":
            self._reset()
        else:
            if fault == "flip_request" and body:
                body = _flipped(body, proxy.random)
            self._forward(body, fault)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _forward(self, body: bytes, fault: str | None) -> None:
        proxy = self.server.proxy
        is_conditional = self.headers.get("If-None-Match") is not None
        with proxy.conditional if is_conditional else contextlib.nullcontext():
            answer, content = self._ask(body)
        if fault == "lost_ack":
            self._reset()
            return
        if fault in ("stall", "slow"):
            proxy.stopped.wait(1 if fault == "slow" else 600)
        if fault == "flip" and content:
            content = _flipped(content, proxy.random)
        self._answer(answer, content, len(content) // 2 if fault == "truncate" else None)

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    def _answer(self, answer: http.client.HTTPResponse, content: bytes, cut: int | None) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        )
        self.send_response_only(status)
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()


def _flipped(data: bytes, source: random.Random) -> bytes:
    """`data` with one bit wrong."""
    flipped = bytearray(data)
    flipped[source.randrange(len(data))] ^= 1 << source.randrange(8)
    return bytes(flipped)
