import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from casallm.errors import TrainingError
from casallm.train import nodes, supervisor
from casallm.train.control import Control, Outcome, StopRequest
from casallm.train.nodes import Leader, Place
from casallm.train.preemption import METADATA, watch_notices
from casallm.train.supervisor import Generation, Supervisor, follow, last_words
from tests.train.metadata_server import metadata_server
from tests.train.test_control import SPEC

HUNG = Generation(spec=None, place=Place(), ranks=1, threads_per_rank=1, stall_seconds=0.2)


@pytest.fixture
def ranks():
    """A process that takes no step, for a second and a half."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
    yield process
    process.kill()
    process.wait()


def watch(process, control) -> float:
    """How long the supervisor watches these ranks."""
    begin = time.monotonic()
    Supervisor(lambda: HUNG, lambda: 0)._watch(process, HUNG, control)
    return time.monotonic() - begin


def test_ranks_that_take_no_step_are_left(tmp_path, ranks, caplog):
    control = Control(tmp_path)
    control.beat(0, 5)

    watch(ranks, control)

    assert "no step for 0 s; where the ranks were:" in caplog.messages


def test_a_last_save_takes_as_long_as_the_store_needs(tmp_path, ranks, caplog):
    control = Control(tmp_path)
    control.beat(0, 5)
    control.begin_last_save()

    watch(ranks, control)

    assert ranks.poll() is not None
    assert caplog.messages == []


def test_processes_that_do_not_end_after_the_outcome_are_left(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(supervisor, "EXIT_SECONDS", 0.2)
    control = Control(tmp_path)
    control.write_outcome(Outcome("finished", 7, "all steps are done"))

    watch(ranks, control)

    assert ranks.poll() is None


def test_the_last_words_are_the_error_and_not_what_a_library_adds(tmp_path):
    control = Control(tmp_path)
    advice = "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    control.write_error(2, RuntimeError(f"CUDA error: unspecified launch failure\n{advice}"))

    words = last_words(control)

    assert words == "rank 2 failed: RuntimeError: CUDA error: unspecified launch failure"


def test_a_sentence_for_the_person_is_the_last_word_of_another_node_too(tmp_path):
    control = Control(tmp_path)
    control.write_outcome(Outcome("failed", 0, "the GPU ran out of memory: set it lower"))

    assert last_words(control) == "the GPU ran out of memory: set it lower"


def test_a_node_that_follows_heeds_the_notice_of_its_own_machine(ranks, monkeypatch):
    controls = []
    monkeypatch.setattr(
        supervisor, "start_torchrun", lambda _, c, port: controls.append(c) or ranks
    )
    monkeypatch.setattr(supervisor.SignalWatch, "install", lambda _: None)
    monkeypatch.setitem(watch_notices.__kwdefaults__, "poll_seconds", 0.02)
    requests = []

    class Node0:
        def orders(self):
            yield {"kind": "start", "spec": asdict(SPEC), "port": 1}
            metadata.give_notice()
            deadline = time.monotonic() + 20
            while not requests and time.monotonic() < deadline:
                requests.extend(filter(None, [controls[0].stop_request()]))
            yield {"kind": "done", "code": 75}

        def report_failure(self, words):
            pass

    with metadata_server() as metadata:
        monkeypatch.setenv(METADATA["aws"][0], metadata.url)
        code = follow(Node0(), lambda spec: HUNG, "aws")

    assert (code, [request.reason for request in requests]) == (75, ["AWS spot notice"])
    assert 100 < requests[0].seconds_left <= 120


def gather(leader, *, steps=(0, 0), request=None) -> Outcome:
    """How a run ends whose nodes do not all come: stored steps at its start and by now."""
    stored = iter(steps)
    ours = Supervisor(lambda: HUNG, lambda: next(stored), leader)
    if request:
        ours.request_stop(request)
    ours._signals.install = lambda: None
    return ours.run()


@pytest.fixture
def lonely(monkeypatch):
    """Node 0 of two, of which the other never comes."""
    monkeypatch.setattr(nodes, "JOIN_SECONDS", 0.2)
    leader = Leader(Place(n_nodes=2, port=0), "runs/x")
    yield leader
    leader.dismiss(1)


def test_a_stop_is_heard_while_a_node_is_missing(lonely, monkeypatch):
    monkeypatch.setattr(nodes, "JOIN_SECONDS", 60)

    outcome = gather(lonely, steps=(8, 8), request=StopRequest("SIGTERM"))

    assert outcome == Outcome("stopped", 8, "stopped before all nodes were there")


def test_a_node_that_is_lost_for_good_lets_the_run_be_started_again(lonely):
    outcome = gather(lonely, steps=(8, 12))

    assert (outcome.kind, outcome.step) == ("stopped", 12)
    assert outcome.reason.startswith("1 of 2 nodes are there after 0 minutes")


def test_a_node_that_never_came_is_the_matter_of_a_person(lonely):
    with pytest.raises(TrainingError, match=r"^1 of 2 nodes are there after"):
        gather(lonely, steps=(8, 8))
