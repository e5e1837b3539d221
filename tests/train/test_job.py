from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from casallm.config import build, merge, parse_overrides
from casallm.errors import ConfigError, StoreError
from casallm.estimate.estimator import EstimateRequest, estimate
from casallm.estimate.hardware import GPUS as ESTIMATED_GPUS
from casallm.storage.local import LocalStore
from casallm.train import job
from casallm.train.attempts import claim
from casallm.train.budget import BudgetConfig
from casallm.train.control import Outcome
from casallm.train.machine import Machine
from casallm.train.run import RunConfig, load_preset
from tests.train.generated_run import make_run

FROM_BOOT = BudgetConfig(usd_per_hour=1, billed_from="boot")
GPUS = Machine("cuda", "NVIDIA L4", 2, 24 << 30, 0.0, 8, 64 << 30, "3.12", "2.13", "0")


def test_a_machine_is_billed_once_although_its_clock_is_corrected(tmp_path, monkeypatch):
    run = LocalStore(tmp_path / "run")
    monkeypatch.setattr(psutil, "boot_time", lambda: 1000.0)
    first = job._billing(run, FROM_BOOT)
    claim(run, parent=None, **first)
    monkeypatch.setattr(psutil, "boot_time", lambda: 1001.0)

    second = job._billing(run, FROM_BOOT)

    assert (second["usd_before"], second["billed_since"]) == (0.0, 1000.0)


def test_a_machine_that_was_booted_again_is_billed_anew(tmp_path, monkeypatch):
    run = LocalStore(tmp_path / "run")
    monkeypatch.setattr(psutil, "boot_time", lambda: 1000.0)
    claim(run, parent=None, **job._billing(run, FROM_BOOT))
    monkeypatch.setattr(psutil, "boot_time", lambda: 9000.0)

    assert job._billing(run, FROM_BOOT)["billed_since"] == 9000.0


def config_at(usd_per_hour: float, *settings: str) -> RunConfig:
    asked = parse_overrides([f"budget.usd_per_hour={usd_per_hour}", *settings])
    return build(RunConfig, merge(load_preset("350m"), asked))


def test_what_is_predicted_is_what_the_estimator_says_of_the_same_machine():
    config = config_at(4.0)
    request = EstimateRequest(
        config=config.model,
        tokens=config.total_tokens,
        context_length=config.train.context_length,
        hardware=ESTIMATED_GPUS["L4"],
        n_gpus=2,
        usd_per_gpu_hour=2.0,
    )

    predicted = job.predicted_usd(config, GPUS, 2, 1)

    assert predicted["p50"] == pytest.approx(estimate(request).offers[0].bill.usd.p50, rel=0.1)
    assert predicted["p10"] < predicted["p50"] < predicted["p90"]
    twice = job.predicted_usd(config_at(8.0), GPUS, 2, 1)
    assert twice["p50"] == pytest.approx(2 * predicted["p50"], rel=1e-4)


def test_a_run_that_the_estimator_thinks_too_large_starts_all_the_same():
    large = config_at(4.0, "model.d_model=8192", "model.n_heads=64")

    assert job.predicted_usd(large, GPUS, 2, 1) is None


@pytest.mark.parametrize(("asked", "ranks"), [(None, 2), (1, 1), (2, 2)])
def test_each_gpu_has_one_rank_or_none(asked, ranks):
    assert job._n_ranks(SimpleNamespace(start=SimpleNamespace(ranks=asked)), GPUS) == ranks


def test_more_ranks_than_gpus_are_refused():
    request = SimpleNamespace(start=SimpleNamespace(ranks=4))

    with pytest.raises(ConfigError, match=r"^--ranks is 4, and each needs a GPU .* are 2 here"):
        job._n_ranks(request, GPUS)
    on_a_cpu = replace(GPUS, device_kind="cpu", n_gpus=0)
    assert job._n_ranks(request, on_a_cpu) == 4


def test_a_finished_run_that_was_killed_before_its_report_gets_it_at_the_next_start(
    tmp_path, monkeypatch
):
    run = make_run(tmp_path / "run")
    run.write("report.html", b"made while it was training")
    monkeypatch.setattr(job, "this_machine", lambda: GPUS)

    code, answer = job.start(SimpleNamespace(run_url=lambda machine: run.url))

    assert (code, answer.splitlines()[0]) == (0, f"{run.url} is finished: all 400 steps are done")
    assert len(run.read("metrics.jsonl").splitlines()) == 40 + 8
    assert len(run.read("samples.jsonl").splitlines()) == 3 * 8
    assert b"all 400 steps are done" in run.read("report.html")


def test_a_stopped_run_goes_on_by_itself_although_its_store_is_down(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise StoreError("nobody answers")

    monkeypatch.setattr(job, "_note", refuse)
    settled = SimpleNamespace(
        run=LocalStore(tmp_path), config=SimpleNamespace(train=SimpleNamespace(steps=24))
    )
    outcome = Outcome("stopped", 12, "SIGTERM; step 15 could not be saved: nobody answers")

    code, sentence = job._conclude(settled, None, outcome)

    assert code == 75
    assert sentence == (
        f"{tmp_path} is saved at step 12 of 24 (SIGTERM; step 15 could not be saved: nobody"
        " answers): the same command goes on from there"
    )
    assert caplog.messages == [f"{tmp_path} does not hear how this start ended: nobody answers"]
