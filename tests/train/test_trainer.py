import math
import time
from dataclasses import replace

import pytest
import torch

from casallm.config import build
from casallm.data.loader import PretrainLoader
from casallm.errors import StoreError, TrainingError
from casallm.model.gpt import build_gpt
from casallm.train import trainer as trainer_module
from casallm.train.checkpoint import Decision, TrainState
from casallm.train.control import Control, StopRequest
from casallm.train.distributed import World
from casallm.train.optim import Optimizers
from casallm.train.run import RunConfig
from casallm.train.trainer import STOP, Trainer

WORLD = World(0, 1, 0, torch.device("cpu"), None)


class Notes:
    """An observer that remembers, and may propose an early end."""

    def __init__(self, end_at: int | None = None) -> None:
        self.durable, self.store_error = None, None
        self.intervals, self.validations, self.saves, self.last_saves = [], [], [], []
        self._end_at = end_at

    def on_step(self, step):
        pass

    def on_interval(self, interval):
        self.intervals.append(interval)

    def on_validation(self, state, result, by_source):
        self.validations.append((state.step, result))

    def is_save_due(self, state):
        return state.step % 5 == 0

    def save(self, state, model, optimizers):
        self.saves.append(state)

    def save_last(self, state, model, optimizers, seconds):
        self.last_saves.append((state, seconds))
        if self.store_error:
            raise self.store_error
        self.durable = state.step

    def safe_step(self):
        return self.durable or 0

    def is_fenced(self):
        return False

    def early_end(self, step, last, seconds_per_step):
        return self._end_at if self._end_at and step < self._end_at < last else None


@pytest.fixture
def make_trainer(prepared, tmp_path):
    torch.set_num_threads(1)  # two threads that wait for each other take minutes on busy cores

    def make(observer=None, *, state=None, micro_batch_size=6, **train) -> Trainer:
        settings = {
            "model": {"n_layers": 2, "d_model": 32, "n_heads": 2, "vocab_size": 400},
            "optim": {"lr": 1e-2},
            "train": {
                "steps": 12,
                "global_batch_size": 6,
                "context_length": 16,
                "precision": "fp32",
                "compile": "off",
                **train,
            },
            "eval": {"every_steps": 6, "sequences": 4},
            "log": {"every_steps": 2},
        }
        config = build(RunConfig, settings)
        model = build_gpt(config.model, 16, seed=1)
        loader = PretrainLoader(
            prepared,
            context_length=16,
            global_batch_size=6,
            micro_batch_size=micro_batch_size,
            rank=0,
            world_size=1,
            seed=3,
            device=WORLD.device,
        )
        return Trainer(
            config=config,
            world=WORLD,
            model=model,
            loader=loader,
            optimizers=Optimizers(model, config.optim),
            state=state or TrainState(),
            control=Control(tmp_path),
            token_bytes_V=torch.from_numpy(prepared.tokenizer().token_bytes()),
            observer=observer,
        )

    return make


def test_the_loss_falls_and_every_step_is_told_once(make_trainer):
    notes = Notes()

    outcome = make_trainer(notes).run()

    assert outcome.kind == "finished"
    assert [interval.step for interval in notes.intervals] == [2, 4, 6, 8, 10, 12]
    assert notes.intervals[-1].loss < notes.intervals[0].loss
    assert notes.intervals[0].loss == pytest.approx(math.log(400), rel=0.02)
    assert [step for step, _ in notes.validations] == [6, 12]
    assert [state.step for state in notes.saves] == [5, 10]
    assert notes.last_saves[0][0].tokens == 12 * 6 * 16


def test_micro_batches_do_not_change_what_is_learned(make_trainer):
    whole, split = Notes(), Notes()

    make_trainer(whole).run()
    make_trainer(split, micro_batch_size=4).run()

    for ours, theirs in zip(whole.intervals, split.intervals, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)  # fp32 sums in another order
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


def test_an_early_end_anneals_and_is_on_record(make_trainer):
    notes = Notes(end_at=8)

    outcome = make_trainer(notes).run()

    assert outcome.step == 8
    assert outcome.reason == ("budget or deadline: annealed from step 3 and ended at step 8 of 12")
    assert notes.intervals[-1].lr == pytest.approx(1e-3)
    assert notes.last_saves[0][0].decisions == (Decision(3, "finish_early", 8),)


def test_a_decision_on_record_is_replayed(make_trainer):
    decided = TrainState(decisions=(Decision(3, "finish_early", 8),))
    notes, again = Notes(end_at=8), Notes()
    first, second = make_trainer(notes), make_trainer(again, state=decided)

    first.run()
    second.run()

    assert [i.lr for i in again.intervals] == [i.lr for i in notes.intervals]
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_wish_to_stop_is_acted_on_one_step_later_with_its_deadline(make_trainer):
    notes = Notes()
    trainer = make_trainer(notes)
    request = StopRequest("test", time.time() + 30)
    notes.on_step = lambda step: step == 4 and trainer.control.request_stop(request)

    outcome = trainer.run()

    assert (outcome.kind, outcome.step, outcome.reason) == ("stopped", 5, "test")
    state, seconds = notes.last_saves[0]
    assert state.step == 5
    assert 0 < seconds < 30  # the step since then has cost some of them
    assert notes.intervals[-1].step == 5


def test_the_ranks_meet_for_the_last_time_before_the_last_save(make_trainer, monkeypatch):
    notes = Notes()
    trainer = make_trainer(notes)
    saves_before = []
    monkeypatch.setattr(trainer_module, "meet", lambda _: saves_before.append(notes.last_saves[:]))

    trainer.run()

    assert saves_before == [[]]
    assert len(notes.last_saves) == 1


def test_a_stop_whose_save_fails_ends_at_the_older_checkpoint(make_trainer):
    notes = Notes()
    trainer = make_trainer(notes)
    notes.durable, notes.store_error = 3, StoreError("nobody answers")
    notes.on_step = lambda step: step == 4 and trainer.control.request_stop(StopRequest("test"))

    outcome = trainer.run()

    assert (outcome.kind, outcome.step) == ("stopped", 3)
    assert outcome.reason == "test; step 5 could not be saved: nobody answers"


def test_a_stop_whose_save_fails_with_nothing_saved_before_is_a_failure(make_trainer):
    notes = Notes()
    trainer = make_trainer(notes)
    notes.store_error = StoreError("nobody answers")
    notes.on_step = lambda step: step == 4 and trainer.control.request_stop(StopRequest("test"))

    with pytest.raises(StoreError, match="nobody answers"):
        trainer.run()


def test_a_stop_that_comes_from_another_node_has_the_shortest_notice(make_trainer, monkeypatch):
    notes = Notes()
    trainer = make_trainer(notes)
    monkeypatch.setattr(trainer._flags, "swap", lambda flags: [STOP, 0])

    outcome = trainer.run()

    assert (outcome.kind, outcome.step, outcome.reason) == ("stopped", 0, "another node stops")
    assert 0 < notes.last_saves[0][1] <= 30


def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(make_trainer):
    notes = Notes()
    trainer = make_trainer(notes)

    def poison(step):
        if step == 4:
            with torch.no_grad():
                trainer.model.head_weight.fill_(math.nan)

    notes.on_step = poison

    with pytest.raises(TrainingError, match=r"the gradient norm is nan at step 5: start a run"):
        trainer.run()
    assert notes.saves == []


def test_training_from_a_state_goes_on_with_the_very_next_sequences(make_trainer, prepared):
    whole = make_trainer(Notes())
    whole.run()
    first = make_trainer(Notes())
    first.config = first.config.model_copy(
        update={"train": first.config.train.model_copy(update={"steps": 12})}
    )
    stopped = Notes()
    first.observer = stopped
    stopped.on_step = lambda s: s == 6 and first.control.request_stop(StopRequest("test"))
    first.run()
    (first.control.directory / "stop.json").unlink()
    second = make_trainer(Notes(), state=replace(first.state))
    second.model.load_state_dict(first.model.state_dict())
    for name, value in first.optimizers.state().items():
        second.optimizers.state()[name].copy_(value)

    second.run()

    for ours, theirs in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
