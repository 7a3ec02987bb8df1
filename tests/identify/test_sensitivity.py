import itertools
import platform
import random
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch

from lycheedecode import HybridConfig
from lycheedecode.errors import ResumeError
from lycheedecode.identify import Cell, IdentifySettings, _provenance, identify
from lycheedecode.identify.donors import Reach
from lycheedecode.identify.objective import token_kl
from lycheedecode.identify.replay import full, prepare, replay
from lycheedecode.identify.search import Judge
from lycheedecode.identify.sensitivity import Surrogate, gradients, in_units, join, measure_sensitivity
from lycheedecode.models.routing import check_plan
from lycheedecode.models.shape import ModelShape
from lycheedecode.prompts.makers import PromptMaker

CONFIG = HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=8)
REACH = Reach(4, 2)
FACTORS = (0.0, 0.5, 1.0)
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
    return measure_sensitivity(model, lesson, [CONFIG], REACH, 256, torch.Generator().manual_seed(0), FACTORS)[0]


def test_shape_and_reach(table):
    assert table.shape == (512, 8, 8, 3)
    assert table[:, ~REACH.matrix()].abs().max() == 0


def test_half_the_mean_square_is_the_kl_of_a_small_change(model, lesson):
    # Shrink what a plan does to one head until second order is all there is, and compare with the true KL.
    layer, head, size = 2, 1, 0.02

    def nudged(index, seen):
        output = full(index, seen)
        if index == layer:
            output[:, head] *= 1 - size
        return output

    with torch.no_grad():
        student = replay(model, lesson, nudged)
        kl = token_kl(student[lesson.mask], lesson.teacher[lesson.mask], model.get_output_embeddings())
    expected = float(kl.sum() / lesson.mask.sum())

    # The same change through the table's own route: gradients of drawn answers, times the change.
    gradient = gradients(model, lesson, 512, torch.Generator().manual_seed(1))[layer][:, :, head]
    seen = []
    with torch.no_grad():
        replay(model, lesson, lambda *given: seen.append(full(*given)) or seen[-1])
    moved = (gradient * -size * seen[layer][:, head]).flatten(2).sum(-1)
    found = float((0.5 * moved.square().mean(0)).sum() / lesson.mask.sum())
    assert found == pytest.approx(expected, rel=0.15)


def test_surrogate_ranks_plans_like_the_true_kl(model, lesson, table):
    judge, surrogate = Judge(model, [lesson], CONFIG, REACH), Surrogate(table, REACH, 1.0, FACTORS)
    heads, rng = REACH.heads(), random.Random(0)
    true, predicted = [], []
    for _ in range(24):
        roles = rng.sample(heads[2:], 3)
        donor = surrogate.assign(roles)
        true.append(judge.kl(surrogate.plan(donor))[0])
        predicted.append(surrogate.cost(donor))
    ranks = torch.tensor([true, predicted]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.5


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_search_finds_the_best_of_all_sets_or_nearly(table, coupling):
    surrogate = Surrogate(in_units(table), REACH, coupling, FACTORS)
    found = surrogate.search(4)
    sets = [heads for heads in itertools.combinations(REACH.heads(), 4) if REACH.serves_all(heads)]
    scores = sorted(surrogate.cost(surrogate.assign(heads)) for heads in sets)
    assert surrogate.cost(surrogate.assign(found)) <= scores[1] + 1e-6
    plan = surrogate.plan(surrogate.assign(found))
    assert list(plan.retrieval) == found


def test_assigned_options_cannot_be_improved_one_by_one(table):
    surrogate = Surrogate(in_units(table), REACH, 0.5, FACTORS)
    choice = surrogate.assign([(1, 0), (2, 1)], sweeps=10)
    best = surrogate.cost(choice)
    inside = [0, 1, 2, 5]
    for head in range(8):
        for donor in [head] if head in inside else inside:
            for factor in range(3) if REACH.matrix()[head, donor] else ():
                changed = choice.clone()
                changed[head] = donor * 3 + factor
                assert surrogate.cost(changed) >= best - 1e-5


def test_units(table):
    surrogate = Surrogate(in_units(table), REACH, 1.0, FACTORS)
    assert surrogate.cost(surrogate.own()) == pytest.approx(1.0, rel=1e-4)


def test_tables_of_several_budgets_are_those_of_each(model, lesson, table):
    wide = replace(CONFIG, budget_tokens=128)
    noise = torch.Generator().manual_seed(0)
    both = measure_sensitivity(model, lesson, [CONFIG, wide], REACH, 256, noise, FACTORS)
    torch.testing.assert_close(both[0], table)
    assert both[1].square().mean() < both[0].square().mean()
    whole = torch.zeros_like(table)  # a budget that holds everything has nothing to say
    assert torch.equal(join([table, whole]), join([table]))
    assert torch.equal(join([whole]), whole)


def test_forms_are_the_config_at_every_budget():
    settings = IdentifySettings(config=CONFIG, budget_scales=(1, 2))
    assert [form.budget_tokens for form in settings.forms] == [64, 128]
    ratio = replace(settings, config=HybridConfig(budget_ratio=0.3), budget_scales=(1, 4, 8))
    assert [form.budget_ratio for form in ratio.forms] == [0.3, 1.0]
    mass = HybridConfig(selection="top_p", top_p=0.9)
    assert replace(settings, config=mass).forms == (mass,)


def test_identify_end_to_end(model, tokenizer):
    seen = []
    plan = identify(model, tokenizer, SETTINGS, report=seen.append)
    assert len(plan.retrieval) == 4
    assert plan.gate_means is None
    assert [(p.stage, p.step, p.steps) for p in seen] == [("measure", i, 4) for i in (1, 2, 3, 4)]
    assert plan.provenance["settings"]["roles"] == "sensitivity"
    assert identify(model, tokenizer, SETTINGS).donors == plan.donors


def test_provenance_names_the_device_that_was_used(monkeypatch):
    """Not the first GPU there is: a model may lie on another one, or on none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU of {device}")
    monkeypatch.setattr(platform, "processor", lambda: "a CPU")
    for device, name in (("cuda:1", "GPU of cuda:1"), ("cpu", "a CPU")):
        assert _provenance(SETTINGS, tiny.plan(), torch.device(device), 1.0)["device"] == name


def test_completion_is_part_of_the_plan_unless_switched_off(model, tokenizer):
    plan = identify(model, tokenizer, SETTINGS)
    assert plan.completion is not None
    assert {factor for row in plan.completion for factor in row} <= set(SETTINGS.completion_factors)
    assert plan.provenance["completion"] == {"chunk": 128}
    plain = identify(model, tokenizer, replace(SETTINGS, config=replace(CONFIG, completion="none")))
    assert plain.completion is None


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
@pytest.mark.parametrize("changes", [{}, {"roles": "coverage"}, {"roles": "gates", "steps": 2, "donors": "same_index"}])
def test_plans_are_for_global_layers(byte_tokenizer, family, changes):
    network = tiny.model(family)
    settings = replace(
        SETTINGS, num_retrieval_heads=3, calibrate_prompts=2,
        calibrate_cells=(Cell("noise", 240), Cell("prose", 200, "continuation", 8)),
        train_cells=(Cell("noise", 240),), **changes,
    )  # fmt: skip
    plan = identify(network, byte_tokenizer, settings)
    shape = ModelShape.of(network)
    check_plan(plan, shape)  # refuses donors in other layers
    assert len(shape.global_layers) == 2
    inside = [head for head in plan.retrieval if head[0] in shape.global_layers]
    assert len(inside) == 3
    for layer in set(range(4)) - set(shape.global_layers):
        assert plan.donors[layer] == ((layer, 0), (layer, 1))
        assert plan.completion is None or plan.completion[layer] == (0, 0)


def test_a_model_without_a_global_layer_is_refused(byte_tokenizer):
    network = tiny.model("gemma3", layer_types=["sliding_attention"] * 4)
    with pytest.raises(ValueError, match="no layer with full attention"):
        identify(network, byte_tokenizer, SETTINGS)


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
