import os
import signal
import time

import pytest

from casallm.train.preemption import METADATA, SignalWatch, watch_notices
from tests.train.metadata_server import metadata_server


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120.0), ("gcp", 30.0)])
def test_a_notice_becomes_a_request_with_its_deadline(monkeypatch, cloud, seconds):
    requests = []
    with metadata_server() as metadata:
        monkeypatch.setenv(METADATA[cloud][0], metadata.url)
        done = watch_notices(cloud, requests.append, poll_seconds=0.02)
        time.sleep(0.2)
        assert requests == []

        metadata.give_notice()
        deadline = time.monotonic() + 5
        while not requests and time.monotonic() < deadline:
            time.sleep(0.01)
        done.set()

    assert [request.seconds_left for request in requests] == [pytest.approx(seconds, abs=20)]


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
