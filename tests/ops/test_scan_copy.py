"""Scanning a copy of keys in 8-bit floats: the copy holds what the cache does, whatever happens to the cache."""

from dataclasses import replace

import pytest
import tiny
import torch

from lycheedecode import Engine
from lycheedecode.attention import HybridAttention
from lycheedecode.ops import KV, Selections, reference, scan_blocks, scan_select

TIGHT = tiny.config(scan_keys="float8")


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
    config = replace(TIGHT, **{"budget_tokens": 32, **changes})
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
    engine = Engine(llama, plan=tiny.plan(), config=TIGHT, execution=execution)
    context = engine.prefill(tiny.prompts(60, 37), room=12)
    engine.decode_one_token(context, torch.tensor([7, 7]))
    answers = [[result.token_ids for result in engine.generate(context, 12)] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_it_selects_by_the_rounded_keys(llama):
    """Keys that 8 bits hold exactly are selected as those of the cache."""
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 90, 16).to(torch.float8_e4m3fn).float()
    kv, query = KV(keys, keys), torch.randn(2, 6, 16)
    config = TIGHT
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
    config = replace(tiny.ROOMY, scan_keys="float8")
    actual = Engine(llama, plan=tiny.plan(), config=config).score(rows, answers)
    torch.testing.assert_close(actual, Engine(llama).score(rows, answers), atol=2e-3, rtol=1e-3)


def test_half_the_bytes_of_a_16_bit_cache():
    lengths = torch.tensor([1000], dtype=torch.int32)
    keys_and_values = torch.empty(1, tiny.KV_HEADS, 1000, 16, dtype=torch.bfloat16)
    sizes = {}
    for keys in ("cache", "float8"):
        attention = HybridAttention(tiny.plan(), replace(TIGHT, scan_keys=keys))
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
        (torch.zeros(2, 2, 90, 16).to(torch.float8_e4m3fn), "does not fit 1 heads of keys"),
    ],
)
def test_a_copy_that_does_not_fit_is_refused(copy, said):
    kv = KV(torch.zeros(2, 2, 90, 16), torch.zeros(2, 2, 90, 16))
    with pytest.raises(ValueError, match=said):
        scan_blocks(torch.zeros(2, 6, 16), kv, (1,), 4, 0.25, copy=copy)


def test_a_copy_in_pages_is_one_of_the_sequence():
    """Whole pages are written at once, the newest token by the scan that needs it; an empty sequence has no page."""
    torch.manual_seed(0)
    plain = torch.randn(3, 2, 96, 16)
    table = torch.randperm(18).view(3, 6)
    pages = torch.empty(18, 2, 16, 16)
    pages[table.flatten()] = plain.unflatten(2, (6, 16)).transpose(1, 2).flatten(0, 1)
    lengths = torch.tensor([90, 0, 33], dtype=torch.int32)
    kv = KV(pages, pages, lengths, None, table.int().masked_fill(torch.tensor([[False], [True], [False]]), 999))
    copy, own = (torch.zeros(size, 1, slots, 16).to(torch.float8_e4m3fn) for size, slots in ((18, 16), (3, 96)))
    reference.write_pages_to_copy(copy, pages, (1,), torch.cat((table[0, :5], table[2, :2])))
    newest = table[0, 5], table[2, 2]
    config, query = TIGHT, torch.randn(3, 6, 16)
    found, right = (Selections.allocate(1, 3, 6, "cpu") for _ in range(2))
    scan_select(query[[0, 2]], at(kv, [0, 2]), (1,), config, 0.25, found.sequences(2), copy)
    reference.write_copy(own, plain, (1,), 0, 96)
    alone = KV(plain, plain, lengths)
    scan_select(query[[0, 2]], at(alone, [0, 2]), (1,), config, 0.25, right.sequences(2), own[[0, 2]])
    assert torch.equal(found.blocks.sort().values, right.blocks.sort().values)
    for page, entry, token in ((newest[0], 9, plain[0, 1, 89]), (newest[1], 0, plain[2, 1, 32])):
        written = copy[page, 0].float()
        assert torch.equal(written[entry], token.to(torch.float8_e4m3fn).float())
        assert (written[entry + 1 :] == 0).all()


def at(kv, rows):
    if kv.page_table is not None:
        return kv._replace(lengths=kv.lengths[rows], page_table=kv.page_table[rows])
    return KV(kv.keys[rows], kv.values[rows], kv.lengths[rows])
