import os
import signal
import subprocess
import sys
import time

import psutil

from casallm.train.control import PARENT_VARIABLE, Control, Outcome, Spec, StopRequest

SPEC = Spec(
    run_url="runs/x",
    config={"train": {"steps": 3}},
    machine={"device_kind": "cpu"},
    data_directory="data/y",
    scratch="z",
    attempt=3,
    start_from="step-00000001-a2",
    identity_sha256="ab",
    usd_before=0.5,
    billed_since=1.0,
    run_started=2.0,
    elapsed_before=3.0,
)


def test_the_first_request_to_stop_stands(tmp_path):
    ours, theirs = Control(tmp_path), Control(tmp_path)

    assert theirs.stop_request() is None
    ours.request_stop(StopRequest("SIGTERM", 1030.0))
    ours.request_stop(StopRequest("SIGINT"))

    assert theirs.stop_request() == StopRequest("SIGTERM", 1030.0)


def test_what_is_left_of_a_notice_shrinks_as_time_goes_by(monkeypatch):
    request = StopRequest("AWS spot notice", ends_at=1120.0)

    for now, left in [(1000.0, 120.0), (1045.0, 75.0), (1200.0, 0.0)]:
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert request.seconds_left == left
    assert StopRequest("SIGTERM").seconds_left is None


def test_outcome_spec_and_errors_come_back_as_left(tmp_path):
    control = Control(tmp_path)
    control.write_spec(SPEC)
    control.write_outcome(Outcome("stopped", 7, "SIGTERM"))
    control.write_error(1, ValueError("first"))
    time.sleep(0.01)
    control.write_error(0, ValueError("second"))

    assert Control(tmp_path).spec() == SPEC
    assert Control(tmp_path).outcome() == Outcome("stopped", 7, "SIGTERM")
    rank, words = Control(tmp_path).first_error()
    assert rank == 1
    assert words.strip().endswith("ValueError: first")


def test_the_slowest_rank_is_the_one_that_counts(tmp_path):
    control = Control(tmp_path)
    assert control.seconds_since_beat() is None
    control.beat(0, 5)
    control.beat(1, 5)
    assert control.seconds_since_beat() < 0.2
    time.sleep(0.3)

    control.beat(0, 6)

    assert 0.3 <= control.seconds_since_beat() < 20


def test_a_clock_that_is_set_forward_makes_no_rank_look_hung(tmp_path, monkeypatch):
    control = Control(tmp_path)
    control.beat(0, 5)
    tomorrow = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: tomorrow)

    assert control.seconds_since_beat() < 20


def test_a_child_dies_with_its_parent(tmp_path):
    child = (
        "from casallm.train.control import die_with_parent as d; d(); import time;"
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "ready\n"

    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid)


def test_a_child_whose_parent_is_gone_before_it_looks_ends_itself():
    child = "from casallm.train.control import die_with_parent as d; d(); print('alive')"
    environment = {**os.environ, PARENT_VARIABLE: "1"}

    done = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True)

    assert done.returncode == 1
    assert done.stdout == b""


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
