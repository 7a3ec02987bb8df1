"""Scanning a copy of keys in 8 or 4 bits: the copy holds what the cache does, whatever happens to the cache."""

from dataclasses import replace

import pytest
import tiny
import torch

from lycheedecode import Engine
from lycheedecode.attention import HybridAttention
from lycheedecode.errors import ConfigError
from lycheedecode.ops import KV, Selections, SmallKeys, key_bytes, reference, scan_blocks, scan_select

TIGHT = tiny.config(scan_keys="float8")
forms = pytest.mark.parametrize("form", ["float8", "int4"])


def held(context):
    """The copy of every retrieval head, and what it should be: the same slots of the cache, in 8 or 4 bits."""
    copies, length = context.cache.state.copy, context.cache.length
    for layer, heads in copies.heads.items():
        if not heads:
            continue
        copy = copies.of_layer(layer)
        right = copy.views(torch.zeros_like)
        reference.write_copy(right, context.cache.layers[layer].store[0], heads, 0, length)
        yield copy.floats()[:, :, :length].clone(), right.floats()[:, :, :length]


@pytest.mark.parametrize("lengths", [(60,), (60, 37)], ids=["one", "padded batch"])
@pytest.mark.parametrize("changes", [{}, {"refresh_every": 3}, {"correction_every": 4}], ids=str)
@pytest.mark.parametrize(("execution", "form"), [("eager", "float8"), ("eager", "int4"), ("graph", "int4")])
def test_the_copy_follows_the_cache(llama, lengths, changes, execution, form):
    config = replace(TIGHT, **{"budget_tokens": 32, "scan_keys": form, **changes})
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


@pytest.mark.parametrize(("execution", "form"), [("eager", "int4"), ("graph", "float8")])
def test_one_prefill_serves_several_generations(llama, execution, form):
    engine = Engine(llama, plan=tiny.plan(), config=replace(TIGHT, scan_keys=form), execution=execution)
    context = engine.prefill(tiny.prompts(60, 37), room=12)
    engine.decode_one_token(context, torch.tensor([7, 7]))
    answers = [[result.token_ids for result in engine.generate(context, 12)] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


@forms
def test_it_selects_by_the_rounded_keys(form):
    """Keys that a copy holds exactly are selected as those of the cache."""
    exact = SmallKeys.allocate(form, (2, 2, 90), 16, "cpu")
    exact.write(..., torch.randn(2, 2, 90, 16))
    keys = exact.floats().clone()
    kv, query = KV(keys, keys), torch.randn(2, 6, 16)
    config = TIGHT
    copy = SmallKeys.allocate(form, (2, 1, 95), 16, "cpu")
    reference.write_copy(copy, keys, (1,), 0, 89)  # the newest token is still to come
    found, right = (Selections.allocate(1, 2, 6, "cpu") for _ in range(2))
    scan_select(query, kv, (1,), config, 0.25, found, copy)
    scan_select(query, kv, (1,), config, 0.25, right)
    assert torch.equal(found.blocks, right.blocks)
    assert torch.equal(copy.floats()[:, 0, :90], keys[:, 1])


def test_keys_too_large_for_8_bits_become_the_largest():
    keys = torch.full((1, 1, 3, 16), 1e4)
    copy = SmallKeys.allocate("float8", (1, 1, 3), 16, "cpu")
    reference.write_copy(copy, keys, (0,), 0, 3)
    assert (copy.floats() == 448).all()


def test_keys_in_4_bits_are_whole_numbers_of_their_half():
    """Halves have scales of their own, the largest channel is 7 of them, and none is off by more than half of one."""
    copy, keys = SmallKeys.allocate("int4", (2,), 8, "cpu"), torch.tensor([[7, -1, 0.4, 3.6, 0.1, 0, 0.7, -0.35]] * 2)
    keys[1] = 0
    copy.write(..., keys)
    numbers = torch.stack((copy.numbers & 15, copy.numbers >> 4), 1).int() - 8
    assert numbers.tolist() == [[[7, -1, 0, 4], [1, 0, 7, -3]], [[0] * 4] * 2]
    assert copy.scales.tolist() == [[1, pytest.approx(0.1, rel=2**-8)], [0, 0]]
    many = torch.randn(100, 80) * torch.logspace(-30, 30, 100)[:, None]
    copy = SmallKeys.allocate("int4", (100,), 80, "cpu")
    copy.write(slice(None), many)
    off = (copy.floats() - many).abs().unflatten(-1, (2, 40)).amax(-1)
    assert (off <= 0.52 * copy.scales.float()).all()
    assert (off >= 0.4 * copy.scales.float()).all()


@forms
def test_a_budget_that_covers_the_context_stays_exact(llama, form):
    rows, answers = tiny.prompts(60, 37), tiny.prompts(8, 8)
    config = replace(tiny.ROOMY, scan_keys=form)
    actual = Engine(llama, plan=tiny.plan(), config=config).score(rows, answers)
    torch.testing.assert_close(actual, Engine(llama).score(rows, answers), atol=2e-3, rtol=1e-3)


def test_bytes_beside_a_16_bit_cache():
    """Keys of 16 channels take 32 bytes, 16 as 8-bit floats, and 8 with two scales of two bytes in 4 bits."""
    lengths = torch.tensor([1000], dtype=torch.int32)
    keys_and_values = torch.empty(1, tiny.KV_HEADS, 1000, 16, dtype=torch.bfloat16)
    sizes = {}
    for keys in ("cache", "float8", "int4"):
        attention = HybridAttention(tiny.plan(), replace(TIGHT, scan_keys=keys))
        state = attention.allocate(1, 1000, "cpu")
        state.before_step(lambda layer: (keys_and_values, keys_and_values), 1000, True)
        sizes[keys] = tiny.bytes_read(attention, lengths, state, True, 32)[0]
        if keys != "cache":
            assert key_bytes(keys, 16, 2) * state.copy.copy.numbers[..., 0].numel() == state.copy.copy.nbytes
    assert sizes["cache"] - sizes["float8"] == 1000 * len(tiny.plan().retrieval) * 16
    assert sizes["cache"] - sizes["int4"] == 1000 * len(tiny.plan().retrieval) * 20


@pytest.mark.parametrize(
    ("copy", "said"),
    [
        (SmallKeys(torch.zeros(2, 1, 90, 16)), "copy must be float8_e4m3fn, or uint8 with scales in bfloat16"),
        (SmallKeys(torch.zeros(2, 1, 90, 8).to(torch.uint8), torch.zeros(2, 1, 90, 2)), "scales in bfloat16"),
        (SmallKeys.allocate("float8", (2, 1, 80), 16, "cpu"), ">= 90"),
        (SmallKeys.allocate("int4", (2, 1, 80), 16, "cpu"), ">= 90"),
        (SmallKeys.allocate("float8", (2, 2, 90), 16, "cpu"), "does not fit 1 heads of keys"),
        (SmallKeys.allocate("int4", (2, 1, 90), 32, "cpu"), "does not fit 1 heads of keys"),
        (
            SmallKeys.allocate("int4", (2, 1, 90), 16, "cpu")._replace(scales=torch.zeros(2, 90, 2).bfloat16()),
            "scales of",
        ),
    ],
)
def test_a_copy_that_does_not_fit_is_refused(copy, said):
    kv = KV(torch.zeros(2, 2, 90, 16), torch.zeros(2, 2, 90, 16))
    with pytest.raises(ValueError, match=said):
        scan_blocks(torch.zeros(2, 6, 16), kv, (1,), 4, 0.25, copy=copy)


def test_heads_without_halves_are_refused():
    with pytest.raises(ConfigError, match="scan_keys='int4' needs an even head dim, not 15"):
        SmallKeys.allocate("int4", (2, 1, 90), 15, "cpu")


@forms
def test_a_copy_in_pages_is_one_of_the_sequence(form):
    """Whole pages are written at once, the newest token by the scan that needs it; an empty sequence has no page."""
    plain = torch.randn(3, 2, 96, 16)
    table = torch.randperm(18).view(3, 6)
    pages = torch.empty(18, 2, 16, 16)
    pages[table.flatten()] = plain.unflatten(2, (6, 16)).transpose(1, 2).flatten(0, 1)
    lengths = torch.tensor([90, 0, 33], dtype=torch.int32)
    kv = KV(pages, pages, lengths, None, table.int().masked_fill(torch.tensor([[False], [True], [False]]), 999))
    copy, own = (SmallKeys.allocate(form, (size, 1, slots), 16, "cpu") for size, slots in ((18, 16), (3, 96)))
    reference.write_pages_to_copy(copy, pages, (1,), torch.cat((table[0, :5], table[2, :2])))
    newest = table[0, 5], table[2, 2]
    config, query = TIGHT, torch.randn(3, 6, 16)
    found, right = (Selections.allocate(1, 3, 6, "cpu") for _ in range(2))
    scan_select(query[[0, 2]], at(kv, [0, 2]), (1,), config, 0.25, found.sequences(2), copy)
    reference.write_copy(own, plain, (1,), 0, 96)
    alone = KV(plain, plain, lengths)
    scan_select(
        query[[0, 2]], at(alone, [0, 2]), (1,), config, 0.25, right.sequences(2), own.views(lambda part: part[[0, 2]])
    )
    assert torch.equal(found.blocks.sort().values, right.blocks.sort().values)
    for page, entry, token in ((newest[0], 9, plain[0, 1, 89]), (newest[1], 0, plain[2, 1, 32])):
        written = copy.views(lambda part, page=page: part[page, 0]).floats()
        alone = SmallKeys.allocate(form, (), 16, "cpu")
        alone.write((), token)
        assert torch.equal(written[entry], alone.floats())
        assert (written[entry + 1 :] == 0).all()


def at(kv, rows):
    if kv.page_table is not None:
        return kv._replace(lengths=kv.lengths[rows], page_table=kv.page_table[rows])
    return KV(kv.keys[rows], kv.values[rows], kv.lengths[rows])
