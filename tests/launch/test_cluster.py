"""SkyPilot behind its API server, which may be busy, restart, or be gone."""

import time
from types import SimpleNamespace

import pytest

from casallm.errors import CloudError
from launch import cluster
from launch.sky_errors import NoCapacityError, explained

pytest.importorskip("sky")

from sky.exceptions import ResourcesUnavailableError

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


def request(name, *, cluster_name=None, body="null"):
    return SimpleNamespace(
        name=name, cluster_name=cluster_name, request_body=body, request_id=f"{name} {body}"
    )


UNDER_WAY = [
    request("sky.launch", cluster_name="casallm-a"),
    request("sky.jobs.launch", cluster_name="sky-jobs-controller-x", body='{"name": "casallm-b"}'),
    request("sky.launch", cluster_name="theirs"),
    request("sky.jobs.launch", cluster_name="sky-jobs-controller-x", body='{"name": "theirs"}'),
    request("sky.jobs.launch", cluster_name="sky-jobs-controller-x"),
    request("sky.status", cluster_name="casallm-a"),
]


def test_launches_under_way_are_known_by_what_they_launch_and_others_are_left_alone(monkeypatch):
    monkeypatch.setattr(cluster, "_sky", lambda: SimpleNamespace(api_status=lambda: UNDER_WAY))

    assert list(cluster.launches()) == ["casallm-a", "casallm-b"]


def test_only_the_launches_of_the_run_are_called_off(monkeypatch):
    cancelled = []
    fake = SimpleNamespace(
        api_status=lambda ids=None: DONE if ids else UNDER_WAY,
        api_cancel=lambda ids, silent: cancelled.append(ids) or "a request",
        get=lambda _: [],
    )
    monkeypatch.setattr(cluster, "_sky", lambda: fake)

    assert cluster.cancel_launches("casallm-b")
    assert not cluster.cancel_launches("casallm-c")

    assert cancelled == [['sky.jobs.launch {"name": "casallm-b"}']]


SOLD_OUT = (
    "An error occurred (InsufficientInstanceCapacity) when calling the RunInstances operation"
    " (reached max retries: 0): We currently do not have sufficient p4d.24xlarge capacity in the"
    " Availability Zone you requested (us-east-1a). Our system will be working on it."
)
NO_QUOTA = (
    "An error occurred (VcpuLimitExceeded) when calling the RunInstances operation: You have"
    " requested more vCPU capacity than your current vCPU limit of 0 allows. Please visit."
)
FORBIDDEN = (
    "An error occurred (UnauthorizedOperation) when calling the RunInstances operation: You are"
    " not authorized to perform this operation."
)


@pytest.mark.parametrize(
    ("history", "kind", "words"),
    [
        (
            [SOLD_OUT],
            NoCapacityError,
            "no machine of the plan is to be had now (InsufficientInstanceCapacity: We currently do"
            " not have sufficient p4d.24xlarge capacity in the Availability Zone you requested"
            " (us-east-1a))",
        ),
        (["it failed"], NoCapacityError, "no machine of the plan is to be had now"),
        (
            [NO_QUOTA, NO_QUOTA],
            CloudError,
            "the account may run no more such machines (VcpuLimitExceeded: You have requested more"
            " vCPU capacity than your current vCPU limit of 0 allows): ask for a larger quota, as"
            " docs/guides/pretrain-on-aws.md says",
        ),
        (
            [FORBIDDEN],
            CloudError,
            "AWS lets nobody rent with these credentials (UnauthorizedOperation: You are not"
            " authorized to perform this operation): attach the policy of"
            " docs/guides/pretrain-on-aws.md to your user",
        ),
        (
            [],
            CloudError,
            "SkyPilot finds no machine for the plan (Nothing sold): choose another with GPU=,"
            " REGION= or SPOT=",
        ),
    ],
)
def test_why_no_machine_was_got_is_said_in_the_clouds_own_words(history, kind, words):
    errors = [RuntimeError(each) for each in history]

    with pytest.raises(CloudError) as refused, explained():
        raise ResourcesUnavailableError("Nothing sold", failover_history=errors)

    assert (type(refused.value), str(refused.value)) == (kind, words)
