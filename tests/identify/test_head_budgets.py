"""Budgets of heads: what identification gives out, and that the total stays."""

import random
from dataclasses import replace

import pytest
import tiny
import torch
from test_replay import _decode
from test_sensitivity import CONFIG, FACTORS, REACH, SETTINGS, Stopped

from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.attention import HybridAttention
from lycheedecode.errors import ConfigError
from lycheedecode.identify import Cell, identify
from lycheedecode.identify.budgets import LEVELS, Menu, Options
from lycheedecode.identify.replay import Planned, prepare, replay
from lycheedecode.identify.search import Judge
from lycheedecode.identify.sensitivity import gradients, measure_changes
from lycheedecode.prompts.makers import PromptMaker

PLAN = replace(tiny.plan(), completion=((0.5, 0.0),) * 4)
BUDGETED = replace(SETTINGS, head_budgets=True)


@pytest.fixture(scope="module")
def lesson(model, tokenizer):
    maker, rng = PromptMaker(tokenizer, "noise"), random.Random(0)
    return prepare(model, [maker.passkeys(300, 1, rng) for _ in range(2)])


@pytest.fixture(scope="module")
def gradient(model, lesson):
    return gradients(model, lesson, 64, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def options():
    return Options(PLAN, CONFIG, REACH, FACTORS, 300, 0.2)


@pytest.fixture(scope="module")
def measured(model, lesson, gradient, options):
    return options.measure(model, lesson, gradient)


def test_options_are_those_that_prompts_are_long_enough_for(options):
    assert options.levels == LEVELS
    assert replace(options, context=130).levels == (0.25, 0.5, 1.0, 2.0)
    assert replace(options, context=20).levels == (0.25, 1.0)
    assert len(options.pairs) == 4 * 5


def test_one_budget_costs_what_donors_do(model, lesson, gradient, options, measured):
    expected = measure_changes(model, lesson, CONFIG, REACH, gradient, FACTORS)
    for donor in PLAN.retrieval:
        found = measured[0][:, :, options.pairs.index((donor, 1.0))]
        torch.testing.assert_close(found, expected[:, :, REACH.heads().index(donor)])


def test_tokens_are_those_that_selections_hold(lesson, options, measured):
    each = measured[1] / lesson.answer_ids.numel()
    for (_, level), tokens in zip(options.pairs, each.tolist(), strict=True):
        assert tokens == CONFIG.block_size * CONFIG.share_blocks(level)


def test_the_total_stays_and_the_answers_come_closer(model, lesson, options, measured):
    table, tokens = measured
    plan = options.best([table], tokens / lesson.answer_ids.numel())
    assert plan.budgets is not None
    assert plan.retrieval == PLAN.retrieval
    assert {factor for row in plan.budgets for factor in row} <= set(LEVELS)
    assert {factor for row in plan.completion for factor in row} <= set(FACTORS)
    read = [sum(CONFIG.share_blocks(factor) for row in range(4) for factor in each.budget_factors(row))
            for each in (plan, PLAN)]  # fmt: skip
    completed = [sum(factor > 0 for row in each.completion for factor in row) for each in (plan, PLAN)]
    means = [number * (300 // CONFIG.chunk_tokens) / CONFIG.block_size for number in completed]
    assert read[0] + means[0] <= 1.001 * (read[1] + means[1])
    judge = Judge(model, [lesson], CONFIG, REACH)
    assert judge(plan) < judge(PLAN)


def test_tokens_go_to_the_head_that_needs_them():
    """One head's cost falls with its budget, the others' do not: it gets what those give up, and no more."""
    sizes = torch.tensor([1.0, 2.0, 4.0, 8.0])
    table = torch.full((6, 4, 4), 0.01)
    table[:, 2] = 1 / sizes
    table *= torch.randn(6, 4, 1, generator=torch.Generator().manual_seed(0)).sign()
    menu = Menu(table, torch.ones(4, 4, dtype=torch.bool), sizes, torch.ones(4, dtype=torch.int64), 0.0)
    choice = menu.best(torch.ones(4, dtype=torch.bool))
    assert choice.tolist() == [0, 0, 2, 0]  # 7 of 8; the next size would make it 11
    assert menu.tokens(choice) == pytest.approx(7 / 8)


def test_a_student_with_budgets_is_the_decoder(model, lesson):
    plan = replace(PLAN, budgets=((0.5, 2.0), (1.0, 0.25), (4.0, 0.5), (1.0, 1.0)))
    config = replace(CONFIG, completion_chunk=16)
    student, decoded = (
        replay(model, lesson, Planned(plan, config)),
        _decode(model, lesson, HybridAttention(plan, config)),
    )
    torch.testing.assert_close(student[lesson.mask], decoded[lesson.mask], atol=2e-4, rtol=1e-3)


def test_identify_gives_budgets_when_asked(model, tokenizer, tmp_path):
    seen = []

    def stop(progress):
        seen.append((progress.step, progress.steps))
        if progress.step == 7:
            raise Stopped

    with pytest.raises(Stopped):
        identify(model, tokenizer, BUDGETED, folder=tmp_path, report=stop)
    assert seen == [(i, 8) for i in range(1, 8)]
    plan = identify(model, tokenizer, BUDGETED, folder=tmp_path, report=lambda progress: seen.append(progress.step))
    assert seen[7:] == [8]
    assert plan == replace(identify(model, tokenizer, BUDGETED), provenance=plan.provenance)
    assert plan.budgets is not None
    assert plan.provenance["budgets"] == {"budget_tokens": 64}
    assert plan.retrieval == identify(model, tokenizer, SETTINGS).retrieval
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == plan


def test_layers_that_are_not_global_have_one_budget(byte_tokenizer):
    settings = replace(BUDGETED, num_retrieval_heads=3, calibrate_prompts=2, calibrate_cells=(Cell("noise", 240),))
    plan = identify(tiny.model("gemma3"), byte_tokenizer, settings)
    assert plan.budget_factors(1) == plan.budget_factors(3) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"roles": "coverage"}, "head_budgets needs roles='sensitivity', not 'coverage'"),
        ({"donors": "same_index"}, "head_budgets needs donors='remapped'"),
        ({"config": HybridConfig(budget_ratio=0.3)}, "head_budgets needs selection='top_k', not 'ratio'"),
        ({"config": replace(CONFIG, retrieval_attention="full")}, "needs retrieval_attention='selected', not 'full'"),
        ({"config": replace(CONFIG, budget_tokens=200)}, "longer than the budget of 200 tokens, not on 200"),
    ],
)
def test_what_budgets_need(model, tokenizer, changes, said):
    with pytest.raises(ConfigError, match=said):
        identify(model, tokenizer, replace(BUDGETED, **changes))
