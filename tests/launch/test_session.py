import json

import pytest

from casallm.errors import CloudError
from casallm.storage.store import open_store
from casallm.train.attempts import claim
from launch import aws, cluster
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
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        bare_laptop.setenv(name, "canary-1234567890")
    said = []

    with pytest.raises(CloudError) as refused:
        run_up(LaunchRequest(), Choices(notify="https://x/canary-1234567890"), say=said.append)

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
    for name, answer in (("live_names", []), ("controller", None)):
        monkeypatch.setattr(cluster, name, lambda answer=answer: answer)
    monkeypatch.setattr(aws, "enabled_regions", lambda: ["us-east-1"])
    monkeypatch.setattr(aws, "leftovers", lambda regions, labels: [lost])

    assert status_text(None).splitlines() == [
        "SkyPilot runs nothing of casallm",
        "controller   none: nothing is billed for it",
        "in AWS       instance i-1 in us-east-1 (running)",
    ]


def test_nobody_is_asked_where_nobody_can_answer():
    with pytest.raises(CloudError, match="nobody can be asked here: add --yes"):
        confirm("Launch it?")


def test_the_default_bucket_is_the_accounts_own(account):
    request = with_account(LaunchRequest(run="x"))

    assert request.run_url == "s3://casallm-123456789012/x"
    assert cluster_name(request.run_url).startswith("casallm-x-")
