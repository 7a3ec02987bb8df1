"""One layer of the fold: who looks, who reuses, what is read."""

from dataclasses import replace

import pytest
import tiny
import torch

from lycheedecode import HeadPlan, ops
from lycheedecode.attention import FullAttention, HybridAttention
from lycheedecode.ops import KV


def layers(slots=50, batch=2, starts=None):
    """One random cache and query for each layer."""
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    caches = [
        KV(torch.randn(batch, 2, slots, 16), torch.randn(batch, 2, slots, 16), None, starts) for _ in range(tiny.LAYERS)
    ]
    return caches, [torch.randn(batch, 6, 16) for _ in caches]


def step(attention, caches, queries, state=None, refresh=True):
    state = state or attention.allocate(queries[0].shape[0], caches[0].slots, "cpu")
    outputs = [
        attention(layer, query, kv, state, 0.25, refresh)
        for layer, (kv, query) in enumerate(zip(caches, queries, strict=True))
    ]
    return outputs, state


@pytest.mark.parametrize("form", ["selected", "full"])
@pytest.mark.parametrize("starts", [None, [0, 21]])
def test_a_budget_that_covers_the_context_is_full_attention(form, starts):
    caches, queries = layers(starts=starts)
    attention = HybridAttention(tiny.plan(), replace(tiny.ROOMY, retrieval_attention=form))
    for output, kv, query in zip(step(attention, caches, queries)[0], caches, queries, strict=True):
        torch.testing.assert_close(output, ops.attend(query, kv, 0.25), atol=1e-5, rtol=1e-5)


def test_heads_that_all_retrieve_densely_are_full_attention():
    caches, queries = layers()
    config = tiny.config(12, retrieval_attention="full")
    attention = HybridAttention(HeadPlan.all_retrieval(tiny.LAYERS, tiny.KV_HEADS), config)
    for output, kv, query in zip(step(attention, caches, queries)[0], caches, queries, strict=True):
        torch.testing.assert_close(output, ops.attend(query, kv, 0.25), atol=1e-5, rtol=1e-5)


def test_a_sparse_head_attends_over_its_donors_selection():
    caches, queries = layers()
    config = tiny.config(16)
    plan = tiny.plan()
    outputs, state = step(HybridAttention(plan, config), caches, queries)
    for layer in range(tiny.LAYERS):
        for head in range(tiny.KV_HEADS):
            row = plan.retrieval.index(plan.donors[layer][head])
            expected = ops.attend_blocks(
                queries[layer], caches[layer], state.selections, torch.tensor([row]), 4, 0.25, (head,)
            )
            torch.testing.assert_close(outputs[layer][:, head * 3 : head * 3 + 3], expected)


def test_the_papers_form_is_dense_where_it_retrieves():
    caches, queries = layers()
    config = tiny.config(16, retrieval_attention="full")
    outputs, _ = step(HybridAttention(tiny.plan(), config), caches, queries)
    dense = ops.attend(queries[1], caches[1], 0.25)
    torch.testing.assert_close(outputs[1][:, :3], dense[:, :3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[1][:, 3:], dense[:, 3:], atol=1e-3)


@pytest.mark.parametrize("form", ["selected", "full"])
def test_the_output_goes_where_it_is_told_to(form):
    caches, queries = layers()
    attention = HybridAttention(tiny.plan(), tiny.config(16, retrieval_attention=form))
    state = attention.allocate(2, 50, "cpu")
    for layer, (kv, query) in enumerate(zip(caches, queries, strict=True)):
        out = torch.full_like(query, torch.nan)
        assert attention(layer, query, kv, state, 0.25, out=out) is out
        torch.testing.assert_close(out, attention(layer, query, kv, state, 0.25))


def test_without_refresh_the_selections_stay():
    caches, queries = layers()
    attention = HybridAttention(tiny.plan(), tiny.config(16, refresh_every=2))
    _, state = step(attention, caches, queries)
    before = state.selections.blocks.clone()
    step(attention, caches, [torch.randn_like(query) for query in queries], state, refresh=False)
    assert torch.equal(state.selections.blocks, before)


def test_bytes_are_counted_from_what_was_selected():
    caches, queries = layers(slots=50, starts=[0, 21])
    lengths = caches[0].token_counts()  # 50 and 29
    config = tiny.config(16)
    attention = HybridAttention(tiny.plan(), config)
    _, state = step(attention, caches, queries)
    # Blocks of 4: the last one holds 2 tokens of 50, and 1 of 29. Eight heads attend, four scan.
    expected = [8 * 2 * 14 + 4 * 50, 8 * 2 * 13 + 4 * 29]
    assert tiny.bytes_read(attention, lengths, state, True, 10) == [10 * tokens for tokens in expected]
    unrefreshed = tiny.bytes_read(attention, lengths, state, False, 1)
    assert unrefreshed == [8 * 2 * 14, 8 * 2 * 13]


def test_dense_retrieval_heads_read_each_key_once():
    caches, queries = layers(slots=50)
    attention = HybridAttention(tiny.plan(), tiny.config(16, retrieval_attention="full"))
    _, state = step(attention, caches, queries)
    expected = 4 * 2 * 14 + 4 * 2 * 50  # four sparse heads, four dense ones
    assert tiny.bytes_read(attention, caches[0].token_counts(), state, True, 1) == [expected] * 2
    full = FullAttention(tiny.LAYERS, tiny.KV_HEADS)
    assert tiny.bytes_read(full, caches[0].token_counts(), None, True, 1) == [8 * 2 * 50] * 2


def test_layers_outside_the_count_read_nothing():
    caches, queries = layers(slots=50)
    attention = HybridAttention(tiny.plan(), tiny.config(16), layers=[0, 1])
    _, state = step(attention, caches, queries)
    assert tiny.bytes_read(attention, caches[0].token_counts(), state, True, 1)[0] == 4 * 2 * 14 + 3 * 50
