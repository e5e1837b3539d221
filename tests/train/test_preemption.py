import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from casallm.train.preemption import METADATA, SignalWatch, watch_notices


@pytest.fixture
def metadata():
    """A metadata server: `notice` becomes true, and IMDSv2 demands its token."""

    class Handler(BaseHTTPRequestHandler):
        notice = False

        def do_PUT(self):
            is_ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds") is not None
            self.answer(200 if is_ttl and self.path == "/latest/api/token" else 400, "secret")

        def do_GET(self):
            if self.path == "/latest/meta-data/spot/instance-action":
                if self.headers.get("X-aws-ec2-metadata-token") != "secret":
                    self.answer(401, "")
                elif Handler.notice:
                    self.answer(200, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')
                else:
                    self.answer(404, "")
            elif self.headers.get("Metadata-Flavor") == "Google":
                self.answer(200, "TRUE" if Handler.notice else "FALSE")

        def answer(self, status, text):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120.0), ("gcp", 30.0)])
def test_a_notice_becomes_a_request_with_its_deadline(metadata, monkeypatch, cloud, seconds):
    handler, host = metadata
    monkeypatch.setenv(METADATA[cloud][0], host)
    requests = []
    done = watch_notices(cloud, requests.append, poll_seconds=0.02)
    time.sleep(0.2)
    assert requests == []

    handler.notice = True
    deadline = time.monotonic() + 5
    while not requests and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()

    assert [request.seconds_left for request in requests] == [seconds]


def test_a_machine_without_a_metadata_server_is_left_in_peace(monkeypatch):
    monkeypatch.setenv(METADATA["aws"][0], "http://127.0.0.1:9")
    requests = []
    done = watch_notices("aws", requests.append, poll_seconds=0.01)
    time.sleep(0.2)
    done.set()

    assert requests == []


def test_a_second_signal_counts_only_after_a_while(monkeypatch):
    requests = []
    watch = SignalWatch(requests.append)
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    watch.install()
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert [request.reason for request in requests] == ["SIGUSR1"]
        assert not watch.is_impatient
        now[0] += 6
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    assert len(requests) == 1
    assert watch.is_impatient
