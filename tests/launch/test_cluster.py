"""SkyPilot behind its API server, which may be busy, restart, or be gone."""

import time
from types import SimpleNamespace

import pytest

from casallm.errors import CloudError
from launch import cluster, skypilot
from launch.sky_errors import NoCapacityError, explained

pytest.importorskip("sky")

from sky.exceptions import ClusterDoesNotExist, ClusterNotUpError, ResourcesUnavailableError

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
        monkeypatch.setattr(skypilot, "sdk", lambda: fake)
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
    fake = SimpleNamespace(api_status=lambda: UNDER_WAY)
    monkeypatch.setattr(skypilot, "sdk", lambda: fake)

    assert list(cluster.launches()) == ["casallm-a", "casallm-b"]


def test_only_the_launches_of_the_run_are_called_off(monkeypatch):
    cancelled = []
    fake = SimpleNamespace(
        api_status=lambda ids=None: DONE if ids else UNDER_WAY,
        api_cancel=lambda ids, silent: cancelled.append(ids) or "a request",
        get=lambda _: [],
    )
    monkeypatch.setattr(skypilot, "sdk", lambda: fake)

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
NO_VPC = (
    "An error occurred (VPCIdNotSpecified) when calling the RunInstances operation: No default VPC"
    " for this user."
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
        (["it failed"], NoCapacityError, "no machine of the plan is to be had now (it failed)"),
        (
            [NO_VPC],
            CloudError,
            "no machine can be rented for the plan (VPCIdNotSpecified: No default VPC for this"
            " user): choose another with GPU=, REGION= or SPOT=",
        ),
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
            "no machine can be rented for the plan (Nothing sold): choose another with GPU=,"
            " REGION= or SPOT=",
        ),
    ],
)
def test_why_no_machine_was_got_is_said_in_the_clouds_own_words(history, kind, words):
    errors = [RuntimeError(each) for each in history]

    with pytest.raises(CloudError) as refused, explained():
        raise ResourcesUnavailableError("Nothing sold", failover_history=errors)

    assert (type(refused.value), str(refused.value)) == (kind, words)


@pytest.fixture
def sky(monkeypatch):
    """SkyPilot's SDK with a controller and jobs as a test says, and what it was asked to end."""
    has = SimpleNamespace(
        jobs=[], refusal=None, controller="UP", under_way=[], job_status={1: None}, ended=[]
    )

    def queue_v2(**asked):
        if has.refusal:
            raise has.refusal
        return [job for job in has.jobs if asked["all_users"]], 0, {}, 0

    def job_status(name, ids):
        if isinstance(has.job_status, Exception):
            raise has.job_status
        return has.job_status

    def status(names, **_):
        record = {"name": "sky-jobs-controller-abc", "status": has.controller}
        return [record] if has.controller and names in (None, [record["name"]]) else []

    fake = SimpleNamespace(
        StatusRefreshMode=SimpleNamespace(AUTO=None),
        status=status,
        job_status=job_status,
        jobs=SimpleNamespace(queue_v2=queue_v2),
        api_status=lambda ids=None: has.under_way if ids is None else DONE,
        down=has.ended.append,
        get=lambda answer: answer,
    )
    monkeypatch.setattr(skypilot, "sdk", lambda: fake)
    has.api = fake
    return has


def job(name, status):
    return {"job_id": 7, "job_name": name, "status": status}


NO_ANSWER = "Failed to connect to jobs controller. Please check the network."


def test_a_controller_that_does_not_answer_is_not_taken_for_no_jobs(sky):
    sky.refusal = ClusterNotUpError(NO_ANSWER, cluster_status=None)

    with pytest.raises(CloudError, match="controller of managed jobs does not answer"):
        cluster.standing("casallm-a")
    with pytest.raises(CloudError, match="does not answer"):
        cluster.end_idle_controller()
    with pytest.raises(CloudError, match="does not answer"):
        cluster.end_job("casallm-a")

    with pytest.raises(CloudError, match="`sky down sky-jobs-controller-abc` ends it"):
        cluster.live_names()

    assert sky.ended == []


def test_the_log_of_a_job_that_has_ended_is_no_error(sky):
    sky.jobs = [job("casallm-a", "FAILED")]
    sky.api.jobs.tail_logs = lambda **_: None  # as SkyPilot answers where nobody follows

    assert cluster.tail("casallm-a") == 0
    cluster.last_words("casallm-a")


def test_whatever_the_server_sends_on_is_one_sentence():
    with pytest.raises(CloudError, match=r"SkyPilot: 'zone' \(see ~/"), explained():
        raise KeyError("zone")


@pytest.mark.parametrize(
    ("controller", "words"),
    [
        (None, NO_ANSWER),
        ("STOPPED", "The jobs controller is stopped."),
        ("INIT", "No in-progress managed jobs."),
    ],
)
def test_where_there_is_no_controller_yet_there_are_no_jobs(sky, controller, words):
    sky.controller, sky.refusal = controller, ClusterNotUpError(words, cluster_status=None)

    assert cluster.live_names() == []


@pytest.mark.parametrize(
    ("jobs", "under_way", "status", "is_ended"),
    [
        ([job("casallm-a", "SUCCEEDED")], [], "UP", True),
        ([], [], "UP", True),
        ([job("casallm-a", "RUNNING")], [], "UP", False),
        ([job("theirs", "SUCCEEDED")], [], "UP", False),
        ([], [request("sky.jobs.launch")], "UP", False),
        ([], [], "STOPPED", False),
    ],
)
def test_a_controller_is_ended_once_it_is_ours_and_idle(sky, jobs, under_way, status, is_ended):
    sky.jobs, sky.under_way, sky.controller = jobs, under_way, status

    assert cluster.end_idle_controller() == is_ended
    assert sky.ended == (["sky-jobs-controller-abc"] if is_ended else [])


def test_a_job_whose_state_cannot_be_asked_is_not_taken_for_none(sky):
    sky.job_status = ClusterDoesNotExist("gone")
    assert cluster.cluster_job_status("casallm-a") == ""

    sky.job_status = ClusterNotUpError("no connection", cluster_status=None)
    with pytest.raises(CloudError, match="no connection"):
        cluster.cluster_job_status("casallm-a")


def test_a_managed_job_says_where_it_is_and_why_it_failed(sky):
    failed = {"cloud": "AWS", "region": "us-east-1", "failure_reason": "no quota"}
    sky.jobs = [job("casallm-a", "FAILED") | failed]

    current = cluster.standing("casallm-a")

    assert (current.where, current.details) == ("AWS us-east-1", "no quota")


def test_the_clouds_words_are_sought_in_what_the_server_wrote_on_the_way(sky):
    def stream_and_get(request, *, output_stream, **_):
        output_stream.write(f"W 11-30 RunInstances: {NO_QUOTA}\n")
        raise ResourcesUnavailableError("Failed to acquire resources in all zones")

    def get(_):
        history = [RuntimeError("Failed to acquire resources in all zones in us-east-1")]
        raise ResourcesUnavailableError("Failed to provision", failover_history=history)

    sky.api.stream_and_get, sky.api.get = stream_and_get, get

    with pytest.raises(CloudError, match=r"may run no more such machines \(VcpuLimitExceeded: You"):
        skypilot.finish("a request", what="launching")
