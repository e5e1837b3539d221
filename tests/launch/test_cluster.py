"""SkyPilot behind its API server, which may be busy, restart, or be gone."""

import time
from types import SimpleNamespace

import pytest

from casallm.errors import CloudError
from launch import cluster

pytest.importorskip("sky")

UP = {"name": "sky-jobs-controller-abc", "status": "UP"}
DONE = [SimpleNamespace(status="SUCCEEDED")]


@pytest.fixture
def server(monkeypatch):
    """An API server that gives these answers, or raises them, one after the other."""

    def answering(*answers):
        remaining = iter(answers)

        def api_status(_):
            answer = next(remaining)
            if isinstance(answer, Exception):
                raise answer
            return answer

        fake = SimpleNamespace(
            StatusRefreshMode=SimpleNamespace(AUTO=None),
            status=lambda *_, **__: "a request",
            api_status=api_status,
            api_cancel=api_status,
            get=lambda _: [UP],
        )
        monkeypatch.setattr(cluster, "_sky", lambda: fake)
        monkeypatch.setattr(time, "sleep", lambda _: None)

    return answering


def test_a_connection_that_the_server_drops_is_made_again(server):
    lost = ConnectionResetError(104, "Connection reset by peer")
    server(lost, [SimpleNamespace(status="RUNNING")], lost, DONE)

    assert cluster.controller() == "UP"


def test_a_server_that_stays_away_is_one_sentence(server, monkeypatch):
    server(*([ConnectionRefusedError(111, "Connection refused")] * 50))
    ticks = iter(range(0, 10**6, 30))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))

    with pytest.raises(CloudError, match="took longer than 5 minutes and was given up"):
        cluster.controller()
