import itertools
import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.errors import ResumeError
from lycheedecode.identify import Cell, IdentifySettings, identify
from lycheedecode.identify.donors import Reach
from lycheedecode.identify.objective import token_kl
from lycheedecode.identify.replay import full, prepare, replay
from lycheedecode.identify.search import Judge
from lycheedecode.identify.sensitivity import Surrogate, _gradients, in_units, measure_sensitivity
from lycheedecode.prompts.makers import PromptMaker

CONFIG = HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=8)
REACH = Reach(4, 2)
SETTINGS = IdentifySettings(
    num_retrieval_heads=4,
    config=CONFIG,
    calibrate_cells=(Cell("noise", 240), Cell("noise", 200, "passkey", 2)),
    calibrate_prompts=3,
    draws=2,
    batch_size=2,
)


@pytest.fixture(scope="module")
def lesson(model, tokenizer):
    maker, rng = PromptMaker(tokenizer, "noise"), random.Random(0)
    return prepare(model, [maker.passkeys(200, 1, rng) for _ in range(2)])


@pytest.fixture(scope="module")
def table(model, lesson):
    return measure_sensitivity(model, lesson, CONFIG, REACH, draws=256, generator=torch.Generator().manual_seed(0))


def test_shape_and_reach(table):
    assert table.shape == (512, 8, 8)
    assert table[:, ~REACH.matrix()].abs().max() == 0


def test_half_the_mean_square_is_the_kl_of_a_small_change(model, lesson):
    # Shrink what a plan does to one head until second order is all there is, and compare with the true KL.
    layer, head, size = 2, 1, 0.02

    def nudged(index, weights, values):
        output = full(index, weights, values)
        if index == layer:
            output[:, head] *= 1 - size
        return output

    with torch.no_grad():
        student = replay(model, lesson, nudged)
        kl = token_kl(student[lesson.mask], lesson.teacher[lesson.mask], model.get_output_embeddings())
    expected = float(kl.sum() / lesson.mask.sum())

    # The same change through the table's own route: gradients of drawn answers, times the change.
    gradients = _gradients(model, lesson, 512, torch.Generator().manual_seed(1))[layer][:, :, head]
    seen = []
    with torch.no_grad():
        replay(model, lesson, lambda index, w, v: seen.append(full(index, w, v)) or seen[-1])
    moved = (gradients * -size * seen[layer][:, head]).flatten(2).sum(-1)
    found = float((0.5 * moved.square().mean(0)).sum() / lesson.mask.sum())
    assert found == pytest.approx(expected, rel=0.15)


def test_surrogate_ranks_plans_like_the_true_kl(model, lesson, table):
    judge, surrogate = Judge(model, [lesson], CONFIG, REACH), Surrogate(table, REACH, coupling=1.0)
    heads, rng = REACH.heads(), random.Random(0)
    true, predicted = [], []
    for _ in range(24):
        roles = rng.sample(heads[2:], 3)
        donor = surrogate.assign(roles)
        true.append(judge.kl(HeadPlan.from_donors(surrogate.as_heads(donor)))[0])
        predicted.append(surrogate.cost(donor))
    ranks = torch.tensor([true, predicted]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.5


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_search_finds_the_best_of_all_sets_or_nearly(table, coupling):
    surrogate = Surrogate(in_units(table), REACH, coupling)
    found = surrogate.search(4)
    assert found[:2] == [(0, 0), (0, 1)]
    others = REACH.heads()[2:]
    scores = sorted(surrogate.cost(surrogate.assign(pair)) for pair in itertools.combinations(others, 2))
    assert surrogate.cost(surrogate.assign(found)) <= scores[1] + 1e-6
    plan = HeadPlan.from_donors(surrogate.as_heads(surrogate.assign(found)))
    assert list(plan.retrieval) == found


def test_assigned_donors_cannot_be_improved_one_by_one(table):
    surrogate = Surrogate(in_units(table), REACH, 0.5)
    donor = surrogate.assign([(1, 0), (2, 1)], sweeps=10)
    best = surrogate.cost(donor)
    inside = [0, 1, 2, 5]
    for head in set(range(8)) - set(inside):
        for other in inside:
            if REACH.matrix()[head, other]:
                changed = donor.clone()
                changed[head] = other
                assert surrogate.cost(changed) >= best - 1e-5


def test_units(table):
    own = torch.arange(8)
    assert Surrogate(in_units(table), REACH, 1.0).cost(own) == pytest.approx(1.0, rel=1e-4)


def test_identify_end_to_end(model, tokenizer):
    seen = []
    plan = identify(model, tokenizer, SETTINGS, report=seen.append)
    assert len(plan.retrieval) == 4
    assert plan.gate_means is None
    assert [(p.stage, p.step, p.steps) for p in seen] == [("measure", i, 4) for i in (1, 2, 3, 4)]
    assert plan.provenance["settings"]["roles"] == "sensitivity"
    assert identify(model, tokenizer, SETTINGS).donors == plan.donors


def test_shards_and_stages(model, tokenizer):
    plan = identify(model, tokenizer, replace(SETTINGS, shards=2, stages=2, num_retrieval_heads=6))
    assert plan.shard(0, 2).num_kv_heads == 1
    assert plan.stage(2, 4).num_layers == 2


class Stopped(Exception):
    pass


def test_an_interrupted_measurement_resumes(model, tokenizer, tmp_path):
    straight = identify(model, tokenizer, SETTINGS)

    def stop(progress):
        if progress.step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        identify(model, tokenizer, SETTINGS, folder=tmp_path, report=stop)
    seen = []
    resumed = identify(model, tokenizer, SETTINGS, folder=tmp_path, report=seen.append)
    assert [progress.step for progress in seen] == [4]  # no batch is measured again
    assert resumed.donors == straight.donors
    with pytest.raises(ResumeError, match="another draws"):
        identify(model, tokenizer, replace(SETTINGS, draws=3), folder=tmp_path)
    other = deepcopy(model)
    other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ResumeError, match="another model \\(its weights differ\\): give the same"):
        identify(other, tokenizer, SETTINGS, folder=tmp_path)


@pytest.mark.parametrize("stage", ["measure", "exchange"])
def test_interrupted_coverage_and_exchange_resume(model, tokenizer, tmp_path, stage):
    settings = replace(SETTINGS, roles="coverage", exchange_rounds=2)
    plan, resumed = identify(model, tokenizer, settings), []

    def stop(progress):
        if (progress.stage, progress.step) == (stage, 1):
            raise Stopped

    with pytest.raises(Stopped):
        identify(model, tokenizer, settings, folder=tmp_path, report=stop)
    assert identify(model, tokenizer, settings, folder=tmp_path, report=resumed.append).donors == plan.donors
    if stage == "measure":
        assert resumed[0].step == 2
    else:
        assert (stage, 1) not in [(progress.stage, progress.step) for progress in resumed]
