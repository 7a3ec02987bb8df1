"""Scanning a copy of keys in 8-bit floats: the copy holds what the cache does, whatever happens to the cache."""

import pytest
import tiny
import torch

from lycheedecode import Engine, HybridConfig
from lycheedecode.attention import HybridAttention
from lycheedecode.ops import KV, Selections, reference, scan_blocks, scan_select

TIGHT = {"budget_tokens": 24, "block_size": 4, "sink_tokens": 4, "recent_tokens": 4, "scan_keys": "float8"}


def held(context):
    """The copy of every retrieval head, and what it should be: the same slots of the cache, in 8 bits."""
    copies, length = context.cache.state.copy, context.cache.length
    for layer, heads in copies.heads.items():
        if not heads:
            continue
        copy = copies.of_layer(layer)
        right = torch.empty_like(copy)
        reference.write_copy(right, context.cache.layers[layer].store[0], heads, 0, length)
        yield copy[:, :, :length].float(), right[:, :, :length].float()


@pytest.mark.parametrize("lengths", [(60,), (60, 37)], ids=["one", "padded batch"])
@pytest.mark.parametrize("changes", [{}, {"refresh_every": 3}, {"correction_every": 4}], ids=str)
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_the_copy_follows_the_cache(llama, lengths, changes, execution):
    config = HybridConfig(**{**TIGHT, "budget_tokens": 32, **changes})
    engine = Engine(llama, plan=tiny.plan(), config=config, execution=execution)
    context = engine.prefill(tiny.prompts(*lengths), room=2)  # it grows on the way
    for _ in range(2):
        for token in range(7):
            engine.decode_one_token(context, torch.full((len(lengths),), 10 + token))
            length, newest = context.cache.length, config.refresh_every
            for copy, right in held(context):
                old = slice(None) if newest == 1 and not changes else slice(0, length - config.refresh_every)
                if not config.correction_every or token % 4 != 3:  # a dense pass needs no scan
                    assert torch.equal(copy[:, :, old].nan_to_num(), right[:, :, old].nan_to_num())
        context.rewind()


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_one_prefill_serves_several_generations(llama, execution):
    engine = Engine(llama, plan=tiny.plan(), config=HybridConfig(**TIGHT), execution=execution)
    context = engine.prefill(tiny.prompts(60, 37), room=12)
    engine.decode_one_token(context, torch.tensor([7, 7]))
    answers = [[result.token_ids for result in engine.generate(context, 12)] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_it_selects_by_the_rounded_keys(llama):
    """Keys that 8 bits hold exactly are selected as those of the cache."""
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 90, 16).to(torch.float8_e4m3fn).float()
    kv, query = KV(keys, keys), torch.randn(2, 6, 16)
    config = HybridConfig(**TIGHT)
    copy = torch.zeros(2, 1, 95, 16).to(torch.float8_e4m3fn)
    reference.write_copy(copy, keys, (1,), 0, 89)  # the newest token is still to come
    found, right = (Selections.allocate(1, 2, 6, "cpu") for _ in range(2))
    scan_select(query, kv, (1,), config, 0.25, found, copy)
    scan_select(query, kv, (1,), config, 0.25, right)
    assert torch.equal(found.blocks, right.blocks)
    assert torch.equal(copy[:, 0, :90].float(), keys[:, 1])


def test_keys_too_large_for_8_bits_become_the_largest():
    keys = torch.full((1, 1, 3, 16), 1e4)
    copy = torch.zeros(1, 1, 3, 16).to(torch.float8_e4m3fn)
    reference.write_copy(copy, keys, (0,), 0, 3)
    assert (copy.float() == 448).all()


def test_a_budget_that_covers_the_context_stays_exact(llama):
    rows, answers = tiny.prompts(60, 37), tiny.prompts(8, 8)
    config = HybridConfig(block_size=4, sink_tokens=4, recent_tokens=4, scan_keys="float8")
    actual = Engine(llama, plan=tiny.plan(), config=config).score(rows, answers)
    torch.testing.assert_close(actual, Engine(llama).score(rows, answers), atol=2e-3, rtol=1e-3)


def test_half_the_bytes_of_a_16_bit_cache():
    lengths = torch.tensor([1000], dtype=torch.int32)
    keys_and_values = torch.empty(1, tiny.KV_HEADS, 1000, 16, dtype=torch.bfloat16)
    sizes = {}
    for keys in ("cache", "float8"):
        attention = HybridAttention(tiny.plan(), HybridConfig(**{**TIGHT, "scan_keys": keys}))
        state = attention.allocate(1, 1000, "cpu")
        if keys == "float8":
            state.before_step(lambda layer: (keys_and_values, keys_and_values), 1000, True)
        sizes[keys] = tiny.bytes_read(attention, lengths, state, True, 32)[0]
    assert sizes["cache"] - sizes["float8"] == 1000 * len(tiny.plan().retrieval) * 16


@pytest.mark.parametrize(
    ("copy", "said"),
    [
        (torch.zeros(2, 1, 90, 16), "copy must be float8_e4m3fn"),
        (torch.zeros(2, 1, 80, 16).to(torch.float8_e4m3fn), ">= 90"),
        (torch.zeros(2, 2, 90, 16).to(torch.float8_e4m3fn), "does not fit 2 sequences, 1 heads of 16"),
    ],
)
def test_a_copy_that_does_not_fit_is_refused(copy, said):
    kv = KV(torch.zeros(2, 2, 90, 16), torch.zeros(2, 2, 90, 16))
    with pytest.raises(ValueError, match=said):
        scan_blocks(torch.zeros(2, 6, 16), kv, (1,), 4, 0.25, copy=copy)


def test_pages_have_no_copy():
    pages = torch.zeros(6, 2, 16, 16)
    kv = KV(pages, pages, torch.tensor([90], dtype=torch.int32), None, torch.arange(6, dtype=torch.int32)[None])
    copy = torch.zeros(1, 1, 96, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="contiguous cache, not with pages"):
        scan_blocks(torch.zeros(1, 6, 16), kv, (1,), 4, 0.25, copy=copy)
