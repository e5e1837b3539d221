import http.server
import threading
from dataclasses import dataclass, field

import pytest

from casallm.estimate.prices import load_snapshot
from launch.plan import build_plan
from launch.request import LaunchRequest

FRESH = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "WANDB_API_KEY",
    "NOTIFY",
    "OFFERS",
)


@pytest.fixture(autouse=True)
def _no_server_of_skypilots(monkeypatch):
    """What a test forgets to replace must not start a server, nor meet a person's own."""
    monkeypatch.setenv("SKYPILOT_API_SERVER_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def bare_laptop(monkeypatch, tmp_path):
    """A computer on which nobody has configured a cloud."""
    for name in FRESH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return monkeypatch


@pytest.fixture(scope="session")
def _moto():
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def account(_moto, bare_laptop):
    """A boto3 session's worth of an empty AWS account, and this computer configured for it."""
    import urllib.request

    import boto3

    urllib.request.urlopen(urllib.request.Request(f"{_moto}/moto-api/reset", method="POST"))
    bare_laptop.setenv("AWS_ENDPOINT_URL", _moto)
    bare_laptop.setenv("AWS_ACCESS_KEY_ID", "test")
    bare_laptop.setenv("AWS_SECRET_ACCESS_KEY", "test")
    return boto3.Session()


@dataclass
class Stub:
    """A server that gives one answer to everything, and remembers what it was asked."""

    url: str = ""
    status: int = 200
    body: bytes = b""
    received: list[bytes] = field(default_factory=list)


@pytest.fixture
def stub():
    answers = Stub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            answers.received.append(self.rfile.read(length))
            self.send_response(answers.status)
            self.send_header("Content-Length", str(len(answers.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answers.body)

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answers.url = f"http://127.0.0.1:{server.server_port}"
    yield answers
    server.shutdown()
    server.server_close()


@pytest.fixture
def plan_of():
    """Plans from the prices that ship with the package, whatever catalog this computer has."""
    prices = load_snapshot()
    return lambda **asked: build_plan(LaunchRequest(**asked), prices)
