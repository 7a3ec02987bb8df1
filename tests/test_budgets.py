"""Budgets of heads: each head reads its own share of its donor's best blocks, in every way to decode."""

from dataclasses import replace
from math import ceil

import pytest
import tiny
import torch
from test_attention import layers, step

from lycheedecode import Engine, HybridConfig, hybrid, ops
from lycheedecode.attention import FullAttention, HybridAttention
from lycheedecode.checks import LARGEST
from lycheedecode.engine.offload.choice import check_place
from lycheedecode.errors import ConfigError
from lycheedecode.evaluate.variants import variants
from lycheedecode.models.shape import ModelShape
from lycheedecode.policies import make
from lycheedecode.policies.bytes import bytes_at, match_bytes
from lycheedecode.roles import LayerRoles

FACTORS = ((0.5, 2.0), (1.0, 2.0), (0.25, 0.5), (1.0, 1.0))
PLAN = replace(tiny.plan(), budgets=FACTORS)
CONFIG = tiny.config(32)
BLOCKS = {0.25: 3, 0.5: 4, 1.0: 8, 2.0: 16}
"""Of 32 tokens in blocks of 4, of which sinks and recent tokens may take 3."""


def test_rows_are_donors_with_the_factors_that_are_read():
    heads = {(0, 0): (0.5, 2.0), (0, 1): (0.25, 2.0), (1, 0): (0.5, 1.0), (3, 1): (1.0,)}
    assert PLAN.selections == tuple((head, factor) for head, factors in heads.items() for factor in factors)
    assert [PLAN.first_row(layer) for layer in range(4)] == [0, 4, 6, 6]
    assert PLAN.rows(0) == ((0, 0.5), (0, 2.0), (1, 0.25), (1, 2.0))
    assert [PLAN.donor_rows(layer) for layer in range(4)] == [(0, 3), (5, 1), (2, 4), (5, 6)]
    assert tiny.plan().selections == tuple((head, 1.0) for head in tiny.plan().retrieval)


def naive(query, kv, head, weights, most):
    """Attention `[G, D]` of one KV head over the `most` blocks that weigh most to its donor, in loops."""
    length, size = kv.slots, CONFIG.block_size
    blocks = range(ceil(length / size))
    forced = [b for b in blocks if b * size < CONFIG.sink_tokens or (b + 1) * size > length - CONFIG.recent_tokens]
    mass = [float(weights[:, b * size : (b + 1) * size].sum()) for b in blocks]
    others = sorted((b for b in blocks if b not in forced), key=lambda b: -mass[b])
    kept = blocks if length <= CONFIG.budget_tokens else sorted([*forced, *others[: most - len(forced)]])
    tokens = [t for b in kept for t in range(b * size, min((b + 1) * size, length))]
    weights = (0.25 * query[0, head * 3 : head * 3 + 3] @ kv.keys[0, head, tokens].T).softmax(-1)
    return weights @ kv.values[0, head, tokens]


@pytest.mark.parametrize("slots", [90, 33, 32, 5])
def test_every_head_reads_its_share_of_its_donors_best_blocks(slots):
    """Where the sequence fits into the budget: everything, whatever the share."""
    caches, queries = layers(slots=slots, batch=1)
    outputs, _ = step(HybridAttention(PLAN, CONFIG), caches, queries)
    for layer, row in enumerate(PLAN.donors):
        for head, donor in enumerate(row):
            asks = 0.25 * queries[donor[0]][0, donor[1] * 3 : donor[1] * 3 + 3]
            weights = (asks @ caches[donor[0]].keys[0, donor[1]].T).softmax(-1)
            expected = naive(queries[layer], caches[layer], head, weights, BLOCKS[FACTORS[layer][head]])
            torch.testing.assert_close(outputs[layer][0, head * 3 : head * 3 + 3], expected)


@pytest.mark.parametrize("form", ["selected", "full"])
def test_ones_are_the_same_plan_bit_for_bit(form):
    plan = replace(tiny.plan(), budgets=((1.0,) * 2,) * 4)
    assert plan == tiny.plan()
    caches, queries = layers(slots=90, starts=[0, 11])
    config = replace(CONFIG, retrieval_attention=form)
    found, expected = (step(HybridAttention(each, config), caches, queries) for each in (plan, tiny.plan()))
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True))
    assert torch.equal(found[1].selections.blocks, expected[1].selections.blocks)


def test_limits_of_sequences_scale_the_shares():
    """Half the budget: half of every share, but no less than the 3 blocks that are forced; -1: everything."""
    attention = HybridAttention(PLAN, CONFIG)
    caches, queries = layers(slots=90, batch=4)
    state = attention.allocate(4, 90, "cpu")
    state.limits = torch.tensor([8, 4, -1, 3], dtype=torch.int32)
    step(attention, caches, queries, state)
    assert state.selections.counts.T.tolist() == [
        [4, 16, 3, 16, 4, 8, 8], [3, 8, 3, 8, 3, 4, 4], [-1] * 7, [3, 6, 3, 6, 3, 3, 3],
    ]  # fmt: skip


def test_shares_are_of_whole_blocks():
    """As of requests in vLLM, which say their budget in tokens and have it in blocks."""
    assert [tiny.config(30).share_blocks(factor) for factor in (0.3, 0.5, 1.0, 2.0, 4.0)] == [3, 4, 8, 16, 32]


@pytest.mark.parametrize("factors", [(0.3, 0.7), (0.01, 4.0), (1.7, 0.25)], ids=str)
def test_a_request_has_the_shares_of_a_config_with_its_budget(factors):
    """Whatever budget the server has that the request does not take."""
    plan = replace(tiny.plan(), budgets=(factors,) * 4)
    for served, asked in ((30, 52), (64, 20), (20, 36)):
        attention = HybridAttention(plan, tiny.config(served))
        caches, queries = layers(slots=90, batch=1)
        state = HybridAttention(plan, tiny.config(64)).allocate(1, 90, "cpu")
        state.limits = torch.tensor([tiny.config(asked).budget_blocks], dtype=torch.int32)
        step(attention, caches, queries, state)
        assert tuple(state.selections.counts[:, 0].tolist()) == HybridAttention(plan, tiny.config(asked)).row_blocks(23)


def test_bytes_are_what_each_head_reads():
    """A tail of 2 tokens, which every row holds; what fits into the budget is not scanned."""
    attention = HybridAttention(PLAN, CONFIG)
    caches, queries = layers(slots=90, starts=[0, 58])
    _, state = step(attention, caches, queries)
    tokens = sum(4 * BLOCKS[factor] - 2 for row in FACTORS for factor in row)
    lengths = caches[0].token_counts()
    assert tiny.bytes_read(attention, lengths, state, True, 10) == [10 * (2 * tokens + 4 * 90), 10 * 2 * 8 * 32]


def test_bytes_in_advance_are_those_of_steps(llama):
    shape = ModelShape.of(llama)
    engine = Engine(llama, plan=PLAN, config=CONFIG)
    [result] = engine.generate(tiny.prompts(90), 17, ignore_eos=True)
    itemsize = 4 * shape.head_dim
    expected = bytes_at(make("hybrid", shape=shape, config=CONFIG, plan=PLAN), shape, 91, 16) * itemsize
    assert result.kv_bytes_per_token == pytest.approx(expected)
    alike = match_bytes("hybrid", shape=shape, config=CONFIG, plan=tiny.plan(), context=90, like=PLAN)
    assert alike.budget_tokens == 4 * (sum(BLOCKS[factor] for row in FACTORS for factor in row) // 8)


# ---------------------------------------------------------------------- engines

FORMS = {
    "hybrid": {},
    "paper": {"retrieval_attention": "full"},
    "float8": {"scan_keys": "float8"},
    "completed": {"completion": "centroid", "completion_chunk": 8},
    "refresh": {"refresh_every": 3},
}
forms = pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)


@forms
def test_padding_and_truncation_change_nothing(llama, settings):
    rows, answers = tiny.prompts(80, 47, 9), tiny.prompts(8, 8, 8)
    engine = Engine(llama, plan=PLAN, config=replace(CONFIG, **settings))
    context = engine.prefill(rows, room=8)
    together = engine.score(context, answers)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        torch.testing.assert_close(together[i], engine.score([row], [answer])[0], atol=2e-3, rtol=1e-3)
    context.rewind()
    torch.testing.assert_close(engine.score(context, answers), together, atol=1e-5, rtol=1e-5)
    assert (
        together[0] - Engine(llama, plan=tiny.plan(), config=engine.config).score(rows, answers)[0]
    ).abs().max() > 0.01


def test_steps_that_could_be_captured_do_the_same(llama):
    rows = tiny.prompts(80, 47)
    plain, fixed = (
        Engine(llama, plan=PLAN, config=CONFIG, execution=way).generate(rows, 12) for way in ("eager", "graph")
    )
    assert [one.token_ids for one in plain] == [one.token_ids for one in fixed]
    assert [one.kv_bytes_per_token for one in plain] == [one.kv_bytes_per_token for one in fixed]


def test_generate_of_transformers_decodes_as_the_engine_does(llama):
    rows = tiny.prompts(80, 47)
    expected = [list(result.token_ids) for result in Engine(llama, plan=PLAN, config=CONFIG).generate(rows, 12)]
    batch = tiny.padded(rows)
    with hybrid(llama, PLAN, CONFIG):
        found = llama.generate(**batch, max_new_tokens=12, do_sample=False)
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected


@forms
def test_lossless_text_is_full_attentions(llama, settings):
    rows = tiny.prompts(60, 37, 90)
    expected = [result.token_ids for result in Engine(llama).generate(rows, 30)]
    results = Engine(llama, plan=PLAN, config=replace(CONFIG, verify_every=5, **settings)).generate(rows, 30)
    assert [result.token_ids for result in results] == expected
    assert all(result.accepted for result in results)


@pytest.mark.parametrize("budget", [1 << 30, LARGEST])
def test_shares_that_no_sequence_can_fill(budget):
    """Numbers of blocks stay numbers of 32 bits."""
    plan, config = replace(tiny.plan(), budgets=((1000.0, 1e-9),) * 4), replace(CONFIG, budget_tokens=budget)
    caches, queries = layers(slots=90)
    _, state = step(HybridAttention(plan, config), caches, queries)
    assert (state.selections.counts == 23).all()
    assert max(LayerRoles.of(plan, config, 0).shares.numbers) < 1 << 31
    _, state = step(HybridAttention(plan, CONFIG), caches, queries)
    assert set(state.selections.counts.unique().tolist()) == {3, 23}


def test_a_layer_looks_at_no_more_entries_than_its_heads_read(monkeypatch):
    """Where all have one budget, or less: as without budgets of heads."""
    seen, attend_blocks = [], ops.attend_blocks

    def look(query, kv, selections, *more, **options):
        seen.append(selections.blocks.shape[-1])
        return attend_blocks(query, kv, selections, *more, **options)

    monkeypatch.setattr(ops, "attend_blocks", look)
    step(HybridAttention(PLAN, CONFIG), *layers(slots=90))
    assert seen == [16, 16, 8, 8]


def test_a_budget_that_covers_the_context_is_full_attention():
    caches, queries = layers(slots=90, starts=[0, 21])
    for output, kv, query in zip(step(HybridAttention(PLAN, tiny.config(92)), caches, queries)[0], caches, queries,
                                 strict=True):  # fmt: skip
        expected = FullAttention(4, 2)(0, query, kv, None, 0.25)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- what is refused


def test_without_a_budget_there_are_no_shares_of_it(llama):
    config = tiny.config(None, budget_ratio=0.3)
    for make_one in (
        lambda: HybridAttention(PLAN, config),
        lambda: Engine(llama, plan=PLAN, config=config),
        lambda: hybrid(llama, PLAN, config).__enter__(),
        lambda: variants(["hybrid"], {"plan": PLAN}, config),
    ):
        with pytest.raises(ConfigError, match="multiply budget_tokens: selection must be 'top_k', not 'ratio'"):
            make_one()
    assert len(variants(["paper"], {"plan": PLAN}, config)) == 2  # which has donors of its own


def test_caches_in_host_memory_have_one_budget():
    with pytest.raises(ConfigError, match="take a head plan without budgets of heads, or decode with cache='resident'"):
        check_place("host", PLAN, HybridConfig(), 2.0, True)
    assert check_place("auto", PLAN, HybridConfig(), 2.0, True) == "resident"
