import dataclasses
import io
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from casallm.errors import StoreError
from casallm.storage.local import LocalStore
from casallm.train.budget import BudgetConfig, Purse
from casallm.train.checkpoint import list_checkpoints
from casallm.train.leader import Leader
from casallm.train.metrics import LogConfig, Metrics
from casallm.train.progress import Progress
from tests.faults.tiny_run import Session, model_at, optimizer_at, state_at


def make_leader(**parts) -> Leader:
    """A leader that has only these parts."""
    names = [field.name for field in dataclasses.fields(Leader)]
    return Leader(**{name: parts.get(name) for name in names})


@pytest.fixture
def budgeted() -> Leader:
    """A leader with money for 2,000 seconds, in a run of 1,000 steps."""
    now = time.time()
    config = BudgetConfig(usd=2000 / 3600, usd_per_hour=1)
    progress = Progress(1000, console=Console(file=io.StringIO()))
    settings = SimpleNamespace(log=LogConfig(every_steps=10))
    return make_leader(config=settings, purse=Purse(0.0, now, now, config), progress=progress)


def test_one_slow_interval_does_not_end_a_run_that_can_afford_its_steps(budgeted):
    for step in (480, 490, 500):
        assert budgeted.early_end(step, 1000, 1.0) is None

    assert budgeted.early_end(510, 1000, 20.0) is None


def test_a_slow_first_interval_ends_nothing_unless_the_end_is_near_anyway(budgeted):
    assert budgeted.early_end(510, 1000, 20.0) is None

    budgeted._paces.clear()
    assert budgeted.early_end(510, 1000, 100.0) == 510 + 19  # (2000 * 0.995 - 20) / 100 steps


def test_a_run_that_became_slow_ends_early_and_the_bar_counts_to_its_end(budgeted):
    ends = [budgeted.early_end(510 + 10 * n, 1000, 20.0) for n in range(5)]

    assert ends[-1] == pytest.approx(550 + 98, abs=1)  # (2000 * 0.995 - 20) / 20 steps
    assert budgeted.progress.total_steps == ends[-1]


def test_after_a_resume_the_bar_counts_to_the_end_on_record(budgeted):
    budgeted.early_end(510, 700, 1.0)

    assert budgeted.progress.total_steps == 700


class Away(LocalStore):
    """A store that is not on this machine, and may be out of reach."""

    def __init__(self, root) -> None:
        super().__init__(root)
        self.local_path = None
        self.is_down = False
        self.is_answering = threading.Event()
        self.is_answering.set()

    def put(self, name, path, *, sha256=None) -> None:
        self.is_answering.wait(60)
        if self.is_down:
            raise StoreError("nobody answers")
        super().put(name, path, sha256=sha256)


def test_the_last_save_is_made_although_the_one_before_did_not_reach_the_store(tmp_path):
    run = Away(tmp_path / "run")
    session = Session(run, tmp_path / "scratch")
    run.is_down, session.step = True, 10
    session.save()
    session.writer.wait_until_idle()
    run.is_down = False

    save_last(make_leader(writer=session.writer), 30.0)

    assert [name.step for name in list_checkpoints(run)] == [20]


def test_when_the_time_of_the_last_save_is_over_nothing_waits_for_it(tmp_path, caplog):
    run = Away(tmp_path / "run")
    session = Session(run, tmp_path / "scratch")
    leader = make_leader(writer=session.writer, progress=Progress(20))
    run.is_answering.clear()
    begin = time.monotonic()

    save_last(leader, 0.1)
    leader.close()

    assert time.monotonic() - begin < 30
    assert caplog.messages == ["time ran out before step 20 was durable"]
    assert leader.safe_step() == 0
    run.is_answering.set()


def test_a_process_ends_although_one_of_its_threads_still_uploads():
    code = (
        "import time; from concurrent.futures import ThreadPoolExecutor;"
        "from casallm.train import rank; ThreadPoolExecutor().submit(time.sleep, 60);"
        "print('said', end=''); rank._leave(3)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50)

    assert (done.returncode, done.stdout) == (3, b"said")


def test_metrics_that_do_not_reach_the_store_make_a_saved_run_no_failure(tmp_path, caplog):
    run = Away(tmp_path / "run")
    session = Session(run, tmp_path / "scratch")
    leader = make_leader(
        run=run, writer=session.writer, metrics=Metrics(session.journal.metric), journal=Down()
    )
    save_last(leader, 30.0)

    leader.close()

    assert leader.safe_step() == 20
    assert caplog.messages == [
        f"the last lines of metrics are not in {run.url}: nobody answers",
    ]


class Down:
    """A journal that reaches nobody."""

    def close(self):
        raise StoreError("nobody answers")


def save_last(leader: Leader, seconds: float) -> None:
    """Make the checkpoint of step 20 the last."""
    leader.save_last(
        state_at(20),
        SimpleNamespace(named_parameters=lambda: model_at(20).items()),
        SimpleNamespace(state=lambda: optimizer_at(20)),
        seconds,
    )
