import pytest

from casallm.errors import CloudError, StoreError
from casallm.storage.store import open_store
from launch import cluster, follow
from launch.follow import ORIGIN, bring_home
from launch.progress import RunProgress

RUNNING = cluster.Standing(kind="job", status="RUNNING")
FAILED = cluster.Standing(kind="job", status="FAILED")
STARTING = cluster.Standing(kind="job", status="STARTING")


@pytest.fixture
def watched(monkeypatch):
    """A run and its job that answer, one after the other, what they are told to (or raise it)."""

    def watch(*, stands, progress=()):
        stands, progress = iter(stands), iter(progress)
        monkeypatch.setattr(cluster, "standing", lambda name: _next(stands))
        monkeypatch.setattr(
            follow, "read_progress", lambda run: _next(progress, RunProgress(run.url))
        )
        monkeypatch.setattr(follow, "FOLLOW_SECONDS", 0)
        monkeypatch.setattr(follow, "ASK_SECONDS", -1)

    return watch


def _next(answers, otherwise=None):
    answer = next(answers, otherwise)
    if isinstance(answer, Exception):
        raise answer
    assert answer is not None, "asked more often than the test foresaw"
    return answer


@pytest.fixture
def plan(plan_of):
    return plan_of(run="s3://ours/x")


def test_a_server_that_does_not_answer_is_no_reason_to_stop_following(plan, watched):
    watched(stands=[CloudError("slow"), FAILED])

    assert follow.follow(plan).reason == "the job ended (FAILED): it never began"


def test_a_bucket_that_cannot_be_read_for_a_moment_ends_no_run(plan, watched, monkeypatch):
    monkeypatch.setattr(follow, "CAPACITY_HOURS", 0)
    training = RunProgress("s3://ours/x", attempts=1, step=7)
    over = RunProgress("s3://ours/x", attempts=1, step=9, finished="all steps are done")
    done = cluster.Standing(kind="job", status="SUCCEEDED")
    watched(
        stands=[RUNNING, RUNNING, RUNNING, done],
        progress=[training, StoreError("slow down"), StoreError("slow down"), over],
    )

    assert follow.follow(plan) == follow.Ending(True, "all steps are done")


def test_a_job_that_gets_no_machine_in_time_is_given_up(plan, watched, monkeypatch):
    monkeypatch.setattr(follow, "CAPACITY_HOURS", 0)
    watched(stands=[STARTING] * 5)

    with pytest.raises(CloudError) as ended:
        follow.follow(plan)

    assert str(ended.value) == (
        f"no machine began within 0 hours, so {plan.name} was ended: run the same command again,"
        " or add REGION=, GPU= or SPOT=0"
    )


@pytest.mark.parametrize("recoveries", [0, 2])
def test_a_preempted_run_may_wait_for_its_next_machine_as_long_as_it_takes(
    plan, watched, monkeypatch, recoveries
):
    monkeypatch.setattr(follow, "CAPACITY_HOURS", 0)
    pending = cluster.Standing(kind="job", status="PENDING", recoveries=recoveries)
    seen_before = [RUNNING] if not recoveries else []
    watched(stands=[*seen_before, *[pending] * 5, RUNNING, FAILED])

    assert follow.follow(plan).reason == "the job ended (FAILED): it never began"


def test_a_run_that_skypilot_misses_for_a_moment_is_not_over(plan, watched):
    watched(stands=[RUNNING, cluster.Standing(), cluster.Standing(), RUNNING, FAILED])

    assert follow.follow(plan).reason == "the job ended (FAILED): it never began"


def test_a_run_that_is_missing_for_minutes_is_over(plan, watched, monkeypatch):
    monkeypatch.setattr(follow, "MISSING_SECONDS", 0)
    watched(stands=[RUNNING, *[cluster.Standing()] * 5])

    reason = follow.follow(plan).reason

    assert reason == "the job ended (its machines are gone): it never began"


def test_a_finished_run_may_write_its_report_before_its_machine_ends(plan, watched):
    over = RunProgress("s3://ours/x", attempts=1, step=9, finished="all steps are done")
    asked = []
    stands = [RUNNING, CloudError("slow"), RUNNING, cluster.Standing()]
    watched(stands=(asked.append(each) or each for each in stands), progress=[over])

    follow.follow(plan)

    assert asked == stands


def made_in(tmp_path, *names):
    run = open_store(str(tmp_path / "bucket" / "run"))
    for name in names:
        run.write(name, name.encode())
    return run.url


def test_what_comes_home_is_the_report_and_the_model_and_no_checkpoint(tmp_path):
    kept = [
        "config.yaml",
        "finished.json",
        "metrics.jsonl",
        "model/model.safetensors",
        "report.html",
    ]
    others = ["checkpoints/step-00000001-a1/manifest.json", "attempts/000001/x.json"]
    url = made_in(tmp_path, *kept, *others)

    home, n_files = bring_home(url, tmp_path / "runs")

    files = sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file())
    assert (home, n_files) == (tmp_path / "runs/run", 5)
    assert files == sorted([*kept, ORIGIN])


def test_a_run_of_this_computer_is_not_overwritten_by_one_of_its_name(tmp_path):
    url, mine = made_in(tmp_path, "report.html"), tmp_path / "runs/run/report.html"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")

    first, _ = bring_home(url, tmp_path / "runs")
    again, _ = bring_home(url, tmp_path / "runs")

    assert mine.read_text() == "mine"
    assert first == again != mine.parent
    assert (first / "report.html").read_text() == "report.html"


def test_a_run_that_comes_home_twice_has_one_folder(tmp_path):
    url = made_in(tmp_path, "report.html")

    assert bring_home(url, tmp_path / "runs") == bring_home(url, tmp_path / "runs")
