"""A metadata server as AWS (IMDSv2, with its token) and GCP have one, on loopback."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetadataServer(ThreadingHTTPServer):
    """Tells of a preemption once `give_notice` was called."""

    has_notice = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def give_notice(self) -> None:
        """From now on this machine is about to be reclaimed."""
        self.has_notice = True


class _Handler(BaseHTTPRequestHandler):
    def do_PUT(self):
        has_ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds") is not None
        self._answer(200 if has_ttl and self.path == "/latest/api/token" else 400, "secret")

    def do_GET(self):
        has_notice = self.server.has_notice
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "secret":
                self._answer(401, "")
            elif has_notice:
                self._answer(200, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')
            else:
                self._answer(404, "")
        elif self.headers.get("Metadata-Flavor") == "Google":
            self._answer(200, "TRUE" if has_notice else "FALSE")

    def _answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """A running metadata server."""
    with MetadataServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
