import pytest

from casallm.storage.store import open_store
from casallm.train.attempts import claim
from casallm.train.journal import AttemptLog
from launch.progress import read_progress

CONFIG = b"identity:\n  train: {steps: 400}\nexecution: {}\ndataset: {}\n"


@pytest.fixture
def run(tmp_path):
    return open_store(str(tmp_path / "run"))


def train(run, *, until: int, usd: float, outcome: str | None = None) -> None:
    """What one attempt leaves in the run's directory."""
    run.write("config.yaml", CONFIG)
    attempt = claim(run, parent=None)
    journal = AttemptLog(run, attempt)
    for step in range(10, until + 1, 10):
        journal.metric({"step": step, "loss": 5.0, "usd": usd * step / until})
    name = f"step-{until:08d}-a{attempt.number}"
    run.write(f"checkpoints/{name}/manifest.json", b"{}")
    journal.event("save", checkpoint=name, step=until)
    if outcome:
        journal.event("end", outcome=outcome, step=until, reason="AWS spot notice")
    journal.close()


def test_a_run_that_never_began_is_at_nothing(run):
    progress = read_progress(run)

    assert (progress.attempts, progress.step, progress.usd, progress.finished) == (0, 0, 0.0, None)


def test_a_running_run_tells_step_loss_dollars_to_finish_and_the_checkpoints_age(run):
    train(run, until=100, usd=2.0)

    progress = read_progress(run)

    assert (progress.step, progress.steps, progress.loss) == (100, 400, 5.0)
    assert progress.usd == 2.0
    assert progress.usd_to_finish == pytest.approx(6.0)
    assert progress.checkpoint == "step-00000100-a1"
    assert progress.checkpoint_age < 60


def test_preempted_attempts_are_counted(run):
    train(run, until=50, usd=1.0, outcome="stopped")
    train(run, until=100, usd=2.0)

    progress = read_progress(run)

    assert (progress.attempts, progress.preemptions) == (2, 1)


def test_a_finished_run_says_why_and_needs_no_more_dollars(run):
    train(run, until=400, usd=8.0)
    run.write("finished.json", b'{"attempt": 1, "step": 400, "reason": "all 400 steps are done"}')

    progress = read_progress(run)

    assert progress.finished == "all 400 steps are done"
    assert progress.usd_to_finish == 0.0


@pytest.mark.parametrize("record", [b"", b"{}", b'{"attempt": 9, "step": 1, "reason": "x"}'])
def test_an_end_that_is_damaged_or_off_the_history_does_not_count(run, record):
    train(run, until=100, usd=2.0)
    run.write("finished.json", record)

    assert read_progress(run).finished is None


def test_the_table_reads_exactly_so(run):
    train(run, until=100, usd=2.0)

    lines = read_progress(run).lines()

    assert lines[0] == "step         100 of 400, loss 5.000"
    assert lines[1] == "dollars      $2.00 for its machines so far, about $6.00 to finish"
    assert lines[2].startswith("checkpoint   step-00000100-a1, ")
    assert lines[3] == "attempts     1, 0 preempted"
