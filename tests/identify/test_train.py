from dataclasses import replace

import pytest
import torch

from lycheedecode import HybridConfig
from lycheedecode.identify import Cell, IdentifySettings, identify, paper_settings
from lycheedecode.identify.checkpoint import Checkpoint
from lycheedecode.identify.donors import Reach
from lycheedecode.identify.objective import Lagrangian
from lycheedecode.identify.train import Trainer, top_heads
from lycheedecode.prompts.makers import makers_for

CELL = Cell("noise", 240, "passkey", 1)
SETTINGS = IdentifySettings(
    num_retrieval_heads=4,
    config=HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=8),
    train_cells=(CELL, Cell("noise", 300, "multi_hop", 2)),
    calibrate_cells=(CELL,),
    calibrate_prompts=2,
    roles="gates",
    steps=6,
    batch_size=2,
    exchange_rounds=1,
)


@pytest.mark.parametrize("gates", ["hardkuma", "hardconcrete", "direct"])
def test_training_end_to_end(model, tokenizer, gates):
    seen = []
    plan = identify(model, tokenizer, replace(SETTINGS, gates=gates), report=seen.append)
    trained = [progress for progress in seen if progress.stage == "train"]
    assert len(plan.retrieval) == 4
    assert plan.retrieval[:2] == ((0, 0), (0, 1))
    assert [progress.step for progress in trained] == [1, 2, 3, 4, 5, 6]
    assert all(torch.isfinite(torch.tensor([p.figures["loss"], p.figures["density"]])).all() for p in trained)
    assert trained[-1].gate_means.shape == (4, 2)
    assert {progress.stage for progress in seen} >= {"measure", "train"}
    assert plan.provenance["settings"]["gates"] == gates
    assert plan.gate_means[0] == (1.0, 1.0)


def test_same_seed_same_plan_other_seed_other_gates(model, tokenizer):
    plans = [identify(model, tokenizer, replace(SETTINGS, seed=seed, exchange_rounds=0)) for seed in (1, 1, 2)]
    assert plans[0].donors == plans[1].donors
    assert plans[0].gate_means == plans[1].gate_means
    assert plans[0].gate_means != plans[2].gate_means


def test_the_papers_form(model, tokenizer):
    settings = replace(
        paper_settings(steps=3, batch_size=1, num_retrieval_heads=4), train_cells=(CELL,), calibrate_cells=(CELL,)
    )
    plan = identify(model, tokenizer, settings)
    for layer, row in enumerate(plan.donors):
        assert all(donor[1] == head and donor[0] <= layer for head, donor in enumerate(row))


def test_without_training_coverage_decides(model, tokenizer):
    plan = identify(model, tokenizer, replace(SETTINGS, roles="coverage"))
    assert plan.gate_means is None
    assert len(plan.retrieval) == 4


class Stopped(Exception):
    pass


@pytest.mark.parametrize("donors", ["remapped", "same_index"])
def test_interrupted_training_resumes_to_the_same_gates(model, tokenizer, tmp_path, donors):
    settings = replace(SETTINGS, donors=donors, steps=60, exchange_rounds=0, batch_size=1)
    straight = identify(model, tokenizer, settings)

    def stop(progress):
        if progress.stage == "train" and progress.step == 53:
            raise Stopped

    with pytest.raises(Stopped):
        identify(model, tokenizer, settings, folder=tmp_path / "state", report=stop)
    seen = []
    resumed = identify(model, tokenizer, settings, folder=tmp_path / "state", report=seen.append)
    assert (seen[0].stage, seen[0].step) == ("train", 54)  # state is kept at every step
    assert resumed.gate_means == straight.gate_means
    assert resumed.donors == straight.donors
    with pytest.raises(ValueError, match="another seed \\(0 there, 9 here\\)"):
        identify(model, tokenizer, replace(settings, seed=9), folder=tmp_path / "state")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_retrieval_heads": 2}, "between 3"),
        ({"num_retrieval_heads": 9}, "between 3"),
        ({"calibrate_cells": (Cell("noise", 5000),)}, "positions"),
        ({"shards": 3}, "cannot be divided"),
    ],
)
def test_settings_that_do_not_fit_the_model(model, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        identify(model, tokenizer, replace(SETTINGS, **changes))


@pytest.mark.parametrize(
    "changes", [{"gates": "x"}, {"steps": 0}, {"penalty": "both"}, {"calibrate_cells": ()}, {"coupling": 2.0}]
)
def test_impossible_settings(changes):
    with pytest.raises(ValueError, match=r"must be|must lie|needs"):
        replace(SETTINGS, **changes)


def test_two_sided_penalty_pulls_from_both_sides():
    for density, sign in ((0.5, 1), (0.01, -1)):
        value = torch.tensor(density, requires_grad=True)
        lagrangian = Lagrangian(0.1, "two_sided")
        for _ in range(5):
            cost = lagrangian.penalty(value, progress=1.0)
        cost.backward()
        assert sign * float(value.grad) > 0


def test_one_sided_penalty_is_silent_below_the_target():
    value = torch.tensor(0.05, requires_grad=True)
    Lagrangian(0.1, "one_sided").penalty(value, progress=1.0).backward()
    assert float(value.grad) == 0


def test_gates_close_when_nothing_speaks_for_them(model, tokenizer):
    # Without a loss the constraint alone must bring the density to its target and hold it there.
    settings = replace(SETTINGS, loss_weight=0.0, steps=120, learning_rate=0.1, batch_size=1)
    makers = makers_for(tokenizer, settings.train_cells, "identify")
    trainer = Trainer(
        model,
        makers,
        replace(settings, donors="same_index", exchange_rounds=0),
        Reach(4, 2),
        None,
        Checkpoint(None, settings),
    )
    history = []
    trainer.run(history.append)
    assert history[-1].figures["density"] == pytest.approx(2 / 6, abs=0.1)


def test_top_heads_keeps_those_that_must_retrieve():
    means = torch.tensor([[0.0, 0.0], [0.9, 0.1], [0.8, 0.7]])
    assert top_heads(means, 4, Reach(3, 2)) == [(0, 0), (0, 1), (1, 0), (2, 0)]
