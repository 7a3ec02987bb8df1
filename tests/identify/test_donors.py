import random
from functools import partial

import pytest
import torch

from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.identify.donors import Reach, assign_donors, measure_coverage, remap
from lycheedecode.identify.replay import prepare
from lycheedecode.identify.search import Judge, exchange
from lycheedecode.prompts.makers import PromptMaker

CONFIG = HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=8)
REACH = Reach(4, 2)


@pytest.fixture(scope="module")
def lessons(model, tokenizer):
    maker, rng = PromptMaker(tokenizer, "noise"), random.Random(0)
    return [prepare(model, [maker.passkeys(length, 1, rng) for _ in range(2)]) for length in (200, 260)]


@pytest.fixture(scope="module")
def coverage(model, lessons):
    return measure_coverage(model, lessons, CONFIG, REACH)


def test_coverage_is_a_share_and_nobody_covers_a_head_better_than_itself(coverage):
    assert coverage.shape == (8, 8)
    assert coverage.min() >= 0
    assert coverage.max() <= 1 + 1e-5
    # A head's own selection is the best of its size but for the forced blocks, which every selection has.
    assert (coverage.diagonal()[:, None] >= coverage - 1e-5).all()


def test_coverage_of_later_layers_is_zero(coverage):
    assert coverage[0:2, 2:].abs().max() == 0
    assert coverage[6:8, :6].min() > 0


def test_donors_cover_best(coverage):
    table = assign_donors([(1, 0)], coverage, REACH)
    plan = HeadPlan.from_donors(table)
    assert plan.retrieval == ((0, 0), (0, 1), (1, 0))
    for layer, row in enumerate(table):
        for head, donor in enumerate(row):
            if (layer, head) != donor:
                values = {
                    d: float(coverage[layer * 2 + head, d[0] * 2 + d[1]]) for d in plan.retrieval if d[0] <= layer
                }
                assert values[donor] == max(values.values())


def test_without_same_layer_donors_lie_strictly_earlier(coverage):
    reach = Reach(4, 2, same_layer=False)
    table = assign_donors([(1, 0), (2, 1)], coverage, reach)
    assert all(
        donor == (layer, head) or donor[0] < layer for layer, row in enumerate(table) for head, donor in enumerate(row)
    )


def test_donors_stay_inside_shards_and_stages(coverage):
    reach = Reach(4, 2, shards=2, stages=2)
    assert reach.always_retrieval == ((0, 0), (0, 1), (2, 0), (2, 1))
    plan = HeadPlan.from_donors(assign_donors([(3, 0)], coverage, reach))
    assert [plan.shard(rank, 2).num_kv_heads for rank in range(2)] == [1, 1]
    assert plan.stage(0, 2).num_layers == plan.stage(2, 4).num_layers == 2


@pytest.mark.parametrize(("shards", "stages"), [(3, 1), (1, 5), (0, 1)])
def test_impossible_divisions_are_refused(shards, stages):
    with pytest.raises(ValueError, match="cannot be divided"):
        Reach(4, 2, shards=shards, stages=stages)


def test_search_lowers_the_score_and_keeps_the_number(model, lessons, coverage):
    judge = Judge(model, lessons, CONFIG, REACH)
    assert judge(HeadPlan.all_retrieval(4, 2)) == pytest.approx(1.0, rel=1e-3)
    start = [(1, 0), (2, 0)]
    plan_of = partial(remap, coverage=coverage, reach=REACH)
    found = exchange(start, REACH, judge, plan_of, rounds=3)
    assert len(found) == 4
    assert judge(plan_of(found)) <= judge(plan_of(start))


def test_kl_is_zero_when_everything_is_selected(model, lessons):
    judge = Judge(model, lessons, HybridConfig(budget_tokens=512, block_size=8), REACH)
    assert max(judge.kl(HeadPlan.same_index([], 4, 2))) < 1e-5


def test_reach_matrix_agrees_with_allows():
    reach = Reach(3, 2, same_layer=False, shards=2)
    heads = reach.heads()
    expected = torch.tensor([[reach.allows(donor, head) for donor in heads] for head in heads])
    assert torch.equal(reach.matrix(), expected)
    assert expected.diagonal().all()
