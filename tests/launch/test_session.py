import json

import pytest

from casallm.errors import CloudError, StoreError
from casallm.storage.store import open_store
from casallm.train.attempts import claim
from launch import aws, cluster, launching, node, session
from launch.down import TearDown
from launch.follow import Ending
from launch.preflight import Findings
from launch.request import LaunchRequest, cluster_name
from launch.session import Choices, confirm, is_over, run_up, status_text, with_account


def test_problems_stop_before_the_question_and_show_the_plan_first(bare_laptop):
    said = []

    with pytest.raises(CloudError) as refused:
        run_up(LaunchRequest(), Choices(is_sure=True, is_dirty_allowed=True), say=said.append)

    assert said[0].startswith("casallm pretrain: 350m on aws\n")
    assert "run `aws configure`" in str(refused.value)


def test_a_key_in_the_environment_is_neither_shown_nor_logged(bare_laptop, capfd, caplog):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "NOTIFY"):
        bare_laptop.setenv(name, "https://x/canary-1234567890")
    said = []

    with pytest.raises(CloudError) as refused:
        run_up(LaunchRequest(), Choices(), say=said.append)

    output = capfd.readouterr()
    everything = [*said, str(refused.value), output.out, output.err, caplog.text, repr(Findings())]
    assert not [text for text in everything if "canary" in text]


def test_a_run_that_is_over_is_known_before_anything_is_rented(tmp_path):
    run = open_store(str(tmp_path / "run"))
    attempt = claim(run, parent=None)
    before = is_over(run.url)

    record = {"step": 0, "attempt": attempt.number, "reason": "the budget is spent"}
    run.write("finished.json", json.dumps(record).encode())

    assert (before, is_over(run.url)) == (False, True)


def test_the_status_shows_what_skypilot_has_lost_track_of(monkeypatch):
    lost = aws.Leftover("instance", "i-1", "us-east-1", "running")
    for name, answer in (("live_names", []), ("launches", {}), ("controller", None)):
        monkeypatch.setattr(cluster, name, lambda answer=answer: answer)
    monkeypatch.setattr(aws, "enabled_regions", lambda: ["us-east-1"])
    seen = aws.Survey((lost,), closed=("eu-south-1",))
    monkeypatch.setattr(aws, "survey", lambda regions, labels: seen)

    assert status_text(None).splitlines() == [
        "SkyPilot runs nothing of casallm",
        "controller   none: nothing is billed for it",
        "in AWS       instance i-1 in us-east-1 (running)",
        "             eu-south-1 is closed to you",
    ]


def test_down_shows_what_it_ends_before_it_asks_and_ends_nothing_without_a_yes(monkeypatch):
    asked = []
    monkeypatch.setattr(session, "status_text", lambda url: "casallm-x   RUNNING on aws us-east-1")
    monkeypatch.setattr(session, "confirm", lambda question: asked.append(question))
    monkeypatch.setattr(session, "tear_down", lambda url, cloud: pytest.fail("nobody said yes"))

    code = session.run_down("s3://ours/x", "aws", is_sure=False, say=asked.append)

    assert (code, asked) == (1, ["casallm-x   RUNNING on aws us-east-1", "End all of this?"])


def test_what_cannot_be_looked_at_can_still_be_ended(monkeypatch):
    said = []
    monkeypatch.setattr(session, "status_text", lambda url: _raised_or(StoreError("no bucket")))
    monkeypatch.setattr(session, "confirm", lambda question: True)
    monkeypatch.setattr(session, "tear_down", lambda url, cloud: TearDown(is_proven=True))
    monkeypatch.setattr(session, "_paid", lambda url: None)

    assert session.run_down("s3://ours/x", "aws", is_sure=False, say=said.append) == 0

    assert said == ["s3://ours/x, of which little is known (no bucket)", "nothing left"]


def test_down_for_a_run_that_never_was_does_not_say_that_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(session, "tear_down", lambda url, cloud: TearDown(is_proven=True))
    url = str(tmp_path / "typo")

    with pytest.raises(CloudError, match=f"there is no run at {url}, and nothing was rented"):
        session.run_down(url, "aws", is_sure=True, say=pytest.fail)


def test_down_for_a_launch_that_was_killed_before_it_rented_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(session, "tear_down", lambda url, cloud: TearDown(is_proven=True))
    url, said = str(tmp_path / "killed"), []
    with launching.announced(cluster_name(url)):
        pass

    assert session.run_down(url, "aws", is_sure=True, say=said.append) == 0
    assert said == ["nothing left"]


@pytest.fixture
def accompanied(plan_of, monkeypatch, tmp_path):
    """`up` from the moment of launch on: how the run ends, what comes home, what was ended."""
    done = []
    plan = plan_of(run="s3://ours/x")
    monkeypatch.setattr(session, "RUNS", tmp_path)
    monkeypatch.setattr(session, "_paid", lambda url: 12.5)
    monkeypatch.setattr(cluster, "last_words", lambda name: done.append("its last words"))
    monkeypatch.setattr(session, "bring_home", lambda url, runs: (runs / "x", 3))
    monkeypatch.setattr(node, "notify", lambda url, text: done.append(f"told {url}"))
    monkeypatch.setattr(
        session, "tear_down", lambda url, cloud: done.append("down") or TearDown(is_proven=True)
    )

    def accompany(ending):
        monkeypatch.setattr(session, "follow", lambda plan: _raised_or(ending))
        code = session._accompany(plan, {"NOTIFY": "https://hook"}, done.append)
        return code, done

    return accompany


def _raised_or(answer):
    if isinstance(answer, BaseException):
        raise answer
    return answer


def test_a_finished_run_comes_home_before_its_machines_end(accompanied, tmp_path):
    code, done = accompanied(Ending(True, "all steps are done"))

    assert code == 0
    assert done == [
        "s3://ours/x: all steps are done",
        f"3 files of it are in {tmp_path / 'x'}",
        "down",
        "the machines of this run cost $12.50\nnothing left",
    ]


def test_an_error_on_the_way_home_keeps_no_machine_alive(accompanied, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(session, "bring_home", lambda url, runs: _raised_or(full))

    code, done = accompanied(Ending(True, "all steps are done"))

    assert code == 1
    assert done[1:3] == [
        "not everything could be brought home ([Errno 28] No space left on device): it is all in"
        " s3://ours/x",
        "down",
    ]


def test_a_job_that_waited_in_vain_is_ended_and_told(accompanied):
    code, done = accompanied(CloudError("no machine began within 2 hours"))

    assert code == 1
    assert done[:4] == [
        "its last words",
        "s3://ours/x: no machine began within 2 hours",
        "told https://hook",
        "down",
    ]


def test_an_end_that_is_interrupted_says_how_to_make_sure(accompanied, monkeypatch):
    monkeypatch.setattr(session, "tear_down", lambda url, cloud: _raised_or(KeyboardInterrupt()))

    with pytest.raises(CloudError) as interrupted:
        accompanied(Ending(True, "all steps are done"))

    assert str(interrupted.value) == (
        "interrupted before it was known that nothing is left: run `make down RUN=s3://ours/x`"
    )


def test_nobody_is_asked_where_nobody_can_answer():
    with pytest.raises(CloudError, match="nobody can be asked here: add --yes"):
        confirm("Launch it?")


def test_the_default_bucket_is_the_accounts_own(account):
    request = with_account(LaunchRequest(run="x"))

    assert request.run_url == "s3://casallm-123456789012/x"
    assert cluster_name(request.run_url).startswith("casallm-x-")
