"""Completion: what is unread counts as its chunk's mean key and mean value; everything else that is unread is NaN."""

from dataclasses import replace
from math import nan

import pytest
import tiny
import torch
from completing import BLOCK, CHUNK, SCALE, make_cache, make_selections, naive, paged, poison, room_for_means

from lycheedecode import Engine, HeadPlan, ops
from lycheedecode.attention import HybridAttention
from lycheedecode.integrations.transformers import hybrid
from lycheedecode.ops import KV, Completion, Selections, reference

IMPLEMENTATIONS = [reference, ops]
LAYOUTS = {
    "plain": {"lengths": [63, 63]},
    "whole chunks": {"lengths": [64, 64]},
    "lengths": {"lengths": [97, 16], "slots": 110},
    "left padding": {"lengths": [20, 63], "starts": [43, 0]},
    "odd dim": {"lengths": [63, 17], "starts": [0, 5], "dim": 80},
    "short ones": {"lengths": [3, 0, 50]},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


# ---------------------------------------------------------------------- means


@layouts
@pytest.mark.parametrize("page", [0, 8, 64])
def test_means_are_those_of_whole_chunks(layout, page):
    plain = make_cache(**layout)
    kv = paged(plain, page) if page else plain
    means = room_for_means(kv)
    ops.write_means(kv, CHUNK, *means)
    written = torch.zeros(means.shape[1:4:2], dtype=torch.bool)
    for b, length in enumerate(plain.token_counts().tolist()):
        start = 0 if plain.starts is None else int(plain.starts[b])
        for c in range(length // CHUNK):
            last = start + (c + 1) * CHUNK - 1
            place = (int(kv.page_table[b, last // page]), last % page // CHUNK) if page else (b, c)
            tokens = torch.stack(plain[:2])[:, b, :, last + 1 - CHUNK : last + 1]
            torch.testing.assert_close(means[:, place[0], :, place[1]], tokens.mean(2))
            written[place] = True
    assert means[:, ~written[:, None].expand(-1, means.shape[2], -1)].isnan().all()


def test_only_new_chunks_are_written():
    kv = make_cache([100, 40, 90])
    means = room_for_means(kv)
    ops.write_means(kv, CHUNK, *means, torch.tensor([2, 0, 5], dtype=torch.int32), 3)
    assert (~means[0, :, 0, :, 0].isnan()).int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]


def test_what_is_still_to_come_stays_out_of_the_means():
    kv = make_cache([5 * CHUNK, 3 * CHUNK], slots=5 * CHUNK)
    written = torch.tensor([3 * CHUNK + 3, 3 * CHUNK], dtype=torch.int32)
    for cache in kv[:2]:
        cache[0, :, written[0] :] = nan
    means = room_for_means(kv)
    ops.write_means(kv, CHUNK, *means, torch.tensor([2, 1], dtype=torch.int32), 4, written)
    for mean, cache in zip(means, kv[:2], strict=True):
        torch.testing.assert_close(mean[0, :, 2], cache[0, :, 2 * CHUNK : 3 * CHUNK].mean(1))
        torch.testing.assert_close(mean[0, :, 3], cache[0, :, 3 * CHUNK : written[0]].mean(1))
        assert (mean[0, :, 4] == 0).all()
        torch.testing.assert_close(mean[1, :, 2], cache[1, :, 2 * CHUNK : 3 * CHUNK].mean(1))


# ---------------------------------------------------------------------- attention


@layouts
@pytest.mark.parametrize("ops", IMPLEMENTATIONS, ids=["reference", "cpu"])
@pytest.mark.parametrize("heads", [None, (1,)], ids=["all heads", "one head"])
@pytest.mark.parametrize("page", [0, 8, 32])
def test_unread_tokens_count_as_their_chunks_mean(ops, layout, heads, page):
    plain = make_cache(**layout)
    query, factors = torch.randn(plain.batch, 6, plain.keys.shape[3]), (1.0, 0.3)
    asked = heads or (0, 1)
    rows = torch.tensor([2, 0][: len(asked)])
    selections = make_selections(plain, 3, 6)
    expected = naive(query, plain, selections, rows, asked, factors)
    kv = paged(plain, page) if page else plain
    means = room_for_means(kv)
    reference.write_means(kv, CHUNK, *means, None, 99)
    if ops is reference:  # the CPU path reads, and masks, neighbours of the last block
        plain = poison(plain, selections, rows, asked)
        kv = paged(plain, page) if page else plain
    completion = Completion(*means, CHUNK, factors)
    result = ops.attend_blocks(query, kv, selections, rows, BLOCK, SCALE, heads, completion=completion)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS, ids=["reference", "cpu"])
def test_a_factor_of_0_is_no_completion(ops):
    kv = make_cache([63, 63])
    query, rows, selections = torch.randn(2, 6, 16), torch.tensor([0, 1]), make_selections(kv, 2, 6)
    completion = Completion(*room_for_means(kv), CHUNK, (0.0, 0.0))
    plain = ops.attend_blocks(query, kv, selections, rows, BLOCK, SCALE)
    torch.testing.assert_close(
        ops.attend_blocks(query, kv, selections, rows, BLOCK, SCALE, completion=completion), plain
    )


def test_selection_counts_what_it_takes():
    kv = make_cache([97, 16], slots=110)
    config = tiny.config(28, completion_chunk=CHUNK)
    out = Selections.allocate(1, 2, 7, "cpu", 6)
    ops.scan_select(torch.randn(2, 6, 16), kv, (1,), config, SCALE, out)
    for b in range(2):
        blocks = [n for n in out.blocks[0, b].tolist() if n >= 0]
        assert out.taken[0, b].tolist() == [sum(n // 4 == c for n in blocks) for c in range(6)]


def test_what_does_not_fit_is_refused():
    kv = make_cache([63])
    query, rows, selections = torch.randn(1, 6, 16), torch.tensor([0, 0]), make_selections(kv, 1, 6)
    good = Completion(*room_for_means(kv), CHUNK, (1.0, 1.0))
    for bad, said in (
        (good._replace(values=good.values.double()), "cache's dtype|strides"),
        (good._replace(factors=(1.0,)), "1 factors do not fit"),
        (good._replace(chunk=2), "whole blocks of 4"),
        (good._replace(chunk=24), "power of two"),
        (Completion(*(x[:, :, :1] for x in good[:2]), CHUNK, (1.0, 1.0)), "means of 1 chunks for a cache of 63"),
    ):
        with pytest.raises(ValueError, match=said):
            ops.attend_blocks(query, kv, selections, rows, BLOCK, SCALE, completion=bad)
    plain = Selections(selections.blocks, selections.counts)
    with pytest.raises(ValueError, match="count what was taken"):
        ops.attend_blocks(query, kv, plain, rows, BLOCK, SCALE, completion=good)


# ---------------------------------------------------------------------- a layer, and whole generations

TIGHT = tiny.config(completion_chunk=CHUNK)
FACTORS = [[1.0, 0.5], [0.0, 1.0], [0.0, 0.0], [0.25, 2.0]]


def completed_plan(**details):
    return HeadPlan.from_donors(tiny.plan().donors, completion=FACTORS, **details)


def test_which_heads_are_completed():
    kv = make_cache([63])
    query = torch.randn(1, 6, 16)
    for completion, plan, factors in (
        ("plan", completed_plan(), FACTORS),
        ("plan", tiny.plan(), [[0.0, 0.0]] * 4),
        ("centroid", tiny.plan(), [[1.0, 1.0]] * 4),
        ("none", completed_plan(), [[0.0, 0.0]] * 4),
    ):
        attention = HybridAttention(plan, replace(TIGHT, completion=completion))
        state = attention.allocate(1, 63, "cpu")
        state.before_step(lambda layer: kv[:2], 63, True)
        for layer in range(tiny.LAYERS):
            found = attention(layer, query, kv, state, SCALE)
            rows = torch.tensor(plan.donor_rows(layer))
            right = naive(query, kv, state.selections, rows, (0, 1), factors[layer])
            torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["selected", "full"])
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_a_budget_that_covers_the_context_is_full_attention(llama, form, way):
    rows, answers = tiny.prompts(60, 37), tiny.prompts(8, 8)
    config = replace(TIGHT, budget_tokens=512, retrieval_attention=form, completion="centroid")
    actual = Engine(llama, plan=tiny.plan(), config=config, execution=way).score(rows, answers)
    torch.testing.assert_close(actual, Engine(llama).score(rows, answers), atol=2e-3, rtol=1e-3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("lengths", [(70,), (70, 37, 9)], ids=["one", "padded batch"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refresh_every": 3},
        {"correction_every": 5},
        {"retrieval_attention": "full"},
        {"scan_keys": "float8"},
        {"scan_keys": "int4"},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_the_means_follow_the_cache(llama, lengths, changes, way):
    """Through chunks that end, rewinding, correction and growth, they are what a fresh look at the cache gives."""
    config = replace(TIGHT, **{"budget_tokens": 32, **changes})
    engine = Engine(llama, plan=completed_plan(), config=config, execution=way)
    context = engine.prefill(tiny.prompts(*lengths), room=2)
    for first in (10, 90):
        for token in range(21):
            engine.decode_one_token(context, torch.full((len(lengths),), first + token))
            cache = context.cache
            state, _ = cache.state_for(engine.attention)  # what the next step would find
            for layer in state.means.layers:
                kv = KV(*(x[:, :, : cache.length] for x in cache.layers[layer].store), None, cache.starts)
                right = room_for_means(kv)
                reference.write_means(kv, CHUNK, *right, None, 99)
                found = torch.stack(state.means.of_layer(layer))[:, :, :, : right.shape[3]]
                torch.testing.assert_close(found.where(~right.isnan(), nan), right, equal_nan=True)
        context.rewind()


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_padding_and_rewinding_change_nothing(llama, way):
    rows, answers = tiny.prompts(61, 44), tiny.prompts(24, 24)
    engine = Engine(llama, plan=completed_plan(), config=TIGHT, execution=way)
    context = engine.prefill(rows, room=32)
    together = engine.score(context, answers)
    engine.score(context, [answer[::-1] for answer in answers])
    assert torch.equal(engine.score(context, answers), together)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        close(together[i], engine.score([row], [answer])[0])
    without = Engine(llama, plan=tiny.plan(), config=TIGHT).score(rows, answers)
    assert (together - without).abs().max() > 0.1


def test_fixed_steps_are_eager_steps(llama):
    rows, answers = tiny.prompts(60, 31), tiny.prompts(24, 24)
    fixed, eager = (Engine(llama, plan=completed_plan(), config=TIGHT, execution=way) for way in ("graph", "eager"))
    close(fixed.score(rows, answers), eager.score(rows, answers))


def test_generate_completes_as_the_engine_does(llama):
    """The means of a cache that somebody else keeps are made anew at every step."""
    rows = tiny.prompts(61, 44)
    config = TIGHT
    expected = [list(g.token_ids) for g in Engine(llama, plan=completed_plan(), config=config).generate(rows, 20)]
    with hybrid(llama, completed_plan(), config):
        found = llama.generate(**tiny.padded(rows), max_new_tokens=20, do_sample=False)[:, 61:].tolist()
    assert found == expected


def test_bytes_of_means_are_counted():
    kv = make_cache([97, 16], slots=110)
    lengths, query = kv.token_counts(), torch.randn(2, 6, 16)
    read = {}
    for completion in ("plan", "none"):
        attention = HybridAttention(completed_plan(), replace(TIGHT, completion=completion))
        state = attention.allocate(2, 110, "cpu")
        if state.means is not None:
            state.means.write(0, kv)
        for layer in range(tiny.LAYERS):
            attention(layer, query, kv, state, SCALE)
        read[completion] = tiny.bytes_read(attention, lengths, state, True, 10)
    # Five heads of eight are completed; the second sequence is selected as a whole.
    assert [a - b for a, b in zip(read["plan"], read["none"], strict=True)] == [5 * 6 * 2 * 10, 0]


def test_a_plan_made_for_another_completion_is_used_and_said(llama):
    made = completed_plan(provenance={"completion": {"chunk": 128, "budget_tokens": 1024}})
    with pytest.warns(UserWarning, match=r"128, not 16 .* 1024, not 24"):
        engine = Engine(llama, plan=made, config=TIGHT)
    assert engine.score(tiny.prompts(60), tiny.prompts(2)).isfinite().all()
