"""The reference (and the CPU path) against loops that anyone can check; unread memory is NaN."""

from math import ceil, nan

import pytest
import torch

from lycheedecode import HybridConfig, ops
from lycheedecode.ops import KV, Selections, reference, reference_common
from lycheedecode.ops.attend import cpu

IMPLEMENTATIONS = [reference, ops]  # on a CPU the contracts take its own way
SCALE = 0.3


def make_cache(lengths, starts=None, slots=None, heads=2, dim=16, dtype=torch.float32):
    """A contiguous cache whose empty slots are NaN, and its tokens as lists `[b] -> [heads, length, dim]`."""
    starts = starts or [0] * len(lengths)
    slots = slots or max(s + n for s, n in zip(starts, lengths, strict=True))
    store = torch.full((2, len(lengths), heads, slots + 16, dim), nan, dtype=dtype)  # room beyond the view, too
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        store[:, b, :, start : start + length] = torch.randn(2, heads, length, dim).to(dtype)
    plain = all(start == 0 for start in starts) and all(length == slots for length in lengths)
    kv = KV(
        store[0, :, :, :slots],
        store[1, :, :, :slots],
        None if plain else torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32) if any(starts) else None,
    )
    tokens = [store[:, b, :, s : s + n] for b, (s, n) in enumerate(zip(starts, lengths, strict=True))]
    return kv, tokens


def paged(kv, page):
    """The same cache in shuffled pages of `page` slots; pages that nobody owns are NaN."""
    pages = ceil(kv.slots / page)
    order = torch.randperm(kv.batch * pages) + 1
    stores = []
    for cache in (kv.keys, kv.values):
        store = torch.full((kv.batch * pages + 2, cache.shape[1], page, cache.shape[3]), nan, dtype=cache.dtype)
        for i, where in enumerate(order.tolist()):
            piece = cache[i // pages, :, i % pages * page : (i % pages + 1) * page]
            store[where, :, : piece.shape[1]] = piece
        stores.append(store)
    return KV(*stores, kv.token_counts(), kv.starts, order.view(kv.batch, pages).int())


def naive_weights(query, tokens, head, group):
    """Softmax weights of each query head of a group, float64 `[G, length]`."""
    queries = query[head * group : (head + 1) * group].double()
    logits = [[SCALE * q @ k for k in tokens[0, head].double()] for q in queries]
    return torch.tensor(logits, dtype=torch.float64).softmax(-1)


def naive_attend(query, tokens, head, group, kept):
    """Attention over the token indices `kept`, float64 `[G, D]`."""
    if not kept:
        return torch.zeros(group, query.shape[-1], dtype=torch.float64)
    return naive_weights(query, tokens[:, :, kept], head, group) @ tokens[1, head, kept].double()


LAYOUTS = {
    "plain": {"lengths": [63, 63]},
    "lengths": {"lengths": [63, 40], "slots": 70},
    "left padding": {"lengths": [20, 63], "starts": [43, 0]},
    "odd dim": {"lengths": [63, 17], "starts": [0, 5], "dim": 80},
    "a short one": {"lengths": [3, 50]},
    "an empty one": {"lengths": [0, 33]},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@layouts
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("score", ["mass", "max"])
def test_scan_scores_blocks_by_their_attention(layout, group, score):
    kv, tokens = make_cache(**layout)
    query = torch.randn(kv.batch, 2 * group, kv.keys.shape[-1])
    heads = (1, 0)
    scores = reference.scan_blocks(query, kv, heads, 8, SCALE, score)
    assert scores.shape == (2, kv.batch, ceil(kv.slots / 8))
    assert scores.dtype == torch.float32
    for r, head in enumerate(heads):
        for b in range(kv.batch):
            weights = naive_weights(query[b], tokens[b], head, group) if tokens[b].shape[2] else torch.zeros(group, 0)
            for n in range(scores.shape[-1]):
                inside = weights[:, n * 8 : (n + 1) * 8]
                empty = inside.shape[1] == 0
                expected = 0.0 if empty else (inside.sum(1) if score == "mass" else inside.amax(1)).mean().item()
                assert scores[r, b, n].item() == pytest.approx(expected, abs=1e-5)


@layouts
@pytest.mark.parametrize("ops", IMPLEMENTATIONS, ids=["reference", "cpu"])
@pytest.mark.parametrize("heads", [None, (1,)], ids=["all heads", "one head"])
@pytest.mark.parametrize("group", [1, 4])
def test_attend_blocks_reads_its_blocks_and_nothing_else(ops, layout, heads, group):
    kv, tokens = make_cache(**layout)
    num_blocks = ceil(kv.slots / 8)
    query = torch.randn(kv.batch, 2 * group, kv.keys.shape[-1])
    selections = Selections.allocate(3, kv.batch, num_blocks, "cpu")
    for r in range(3):
        for b, sequence in enumerate(tokens):
            existing = ceil(sequence.shape[2] / 8)
            chosen = torch.randperm(existing)[: max(1, existing // 2)]
            selections.blocks[r, b, : len(chosen)] = chosen.int()
            selections.counts[r, b] = len(chosen)
    asked = (0, 1) if heads is None else heads
    rows = torch.tensor([2, 0][: len(asked)])
    poisoned = [cache.clone() for cache in (kv.keys, kv.values)]
    for h, row in zip(asked, rows.tolist(), strict=True):  # whatever was not selected is NaN now
        for b, sequence in enumerate(tokens):
            start = 0 if kv.starts is None else int(kv.starts[b])
            unread = set(range(ceil(sequence.shape[2] / 8))) - set(selections.blocks[row, b].tolist())
            # The CPU path may read, and mask, neighbours of the last block; masked values must not leak either way.
            for block in unread if ops is reference else ():
                end = min((block + 1) * 8, sequence.shape[2])
                for cache in poisoned:
                    cache[b, h, start + block * 8 : start + end] = nan
    output = ops.attend_blocks(
        query, kv._replace(keys=poisoned[0], values=poisoned[1]), selections, rows, 8, SCALE, heads
    )
    for i, (head, row) in enumerate(zip(asked, rows.tolist(), strict=True)):
        for b, sequence in enumerate(tokens):
            blocks = [n for n in selections.blocks[row, b].tolist() if n >= 0]
            kept = [t for n in blocks for t in range(n * 8, min(n * 8 + 8, sequence.shape[2]))]
            expected = naive_attend(query[b], sequence, head, group, kept)
            actual = output[b, i * group : (i + 1) * group].double()
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@layouts
@pytest.mark.parametrize("heads", [None, (1,)], ids=["all heads", "one head"])
def test_attend_is_softmax_attention(layout, heads):
    kv, tokens = make_cache(**layout)
    query = torch.randn(kv.batch, 6, kv.keys.shape[-1])
    output = reference.attend(query, kv, SCALE, heads)
    for i, head in enumerate((0, 1) if heads is None else heads):
        for b, sequence in enumerate(tokens):
            expected = naive_attend(query[b], sequence, head, 3, list(range(sequence.shape[2])))
            torch.testing.assert_close(output[b, i * 3 : i * 3 + 3].double(), expected, atol=1e-5, rtol=1e-5)


@layouts
@pytest.mark.parametrize("score", ["mass", "max"])
def test_attend_select_is_attend_and_scan_select(layout, score):
    kv, _ = make_cache(**layout)
    query, heads = torch.randn(kv.batch, 6, kv.keys.shape[-1]), (1, 0)
    config = HybridConfig(budget_tokens=24, block_size=8, sink_tokens=4, recent_tokens=4, block_score=score)
    right, found = (Selections.allocate(2, kv.batch, 3, "cpu") for _ in range(2))
    output = ops.attend_select(query, kv, heads, config, SCALE, found)
    ops.scan_select(query, kv, heads, config, SCALE, right)
    torch.testing.assert_close(output, ops.attend(query, kv, SCALE, heads))
    assert torch.equal(found.blocks, right.blocks)


@pytest.mark.parametrize("page", [8, 24])
@pytest.mark.parametrize("ops", IMPLEMENTATIONS, ids=["reference", "cpu"])
def test_pages_do_not_matter(ops, page):
    kv, _ = make_cache([63, 40], slots=72)
    other = paged(kv, page)
    query = torch.randn(2, 6, 16)
    config = HybridConfig(budget_tokens=32, block_size=8, sink_tokens=4, recent_tokens=4)
    results = []
    for cache in (kv, other):
        scores = ops.scan_blocks(query, cache, (0, 1), 8, SCALE, "mass")
        selections = Selections.allocate(2, 2, 4, "cpu")
        ops.select_blocks(scores, cache, config, selections)
        sparse = ops.attend_blocks(query, cache, selections, torch.tensor([0, 1]), 8, SCALE)
        results.append((scores, selections.blocks.sort(-1).values, sparse, ops.attend(query, cache, SCALE)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("layout", ["plain", "left padding", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_path_equals_reference(layout, dtype):
    kv, _ = make_cache(**LAYOUTS[layout], dtype=dtype)
    query = torch.randn(2, 6, 16).to(dtype)
    config = HybridConfig(budget_tokens=24, block_size=8, sink_tokens=4, recent_tokens=4)
    selections = Selections.allocate(2, 2, 5, "cpu")
    reference.select_blocks(reference.scan_blocks(query, kv, (0, 1), 8, SCALE), kv, config, selections)
    rows = torch.tensor([1, 0])
    expected = reference.attend_blocks(query, kv, selections, rows, 8, SCALE)
    actual = cpu.attend_blocks(query, kv, selections, rows, 8, SCALE)
    # In bfloat16 the CPU path, like every fused attention, rounds weights before it sums values.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.02)


def test_memory_is_reused_inside_and_outside_inference_mode():
    reference_common._scratch.memory = torch.empty(0)
    kv, _ = make_cache([63, 63], dtype=torch.bfloat16)
    query = torch.randn(2, 6, 16).bfloat16()
    with torch.inference_mode():
        inside = reference.attend(query, kv, SCALE)
    assert torch.equal(reference.attend(query, kv, SCALE), inside)


# ---------------------------------------------------------------------- selection


def select(scores, config, lengths=None, capacity=None, starts=None):
    """Selected blocks as a list of sets, for scores `[R, B, N]` over blocks of 4."""
    slots = scores.shape[-1] * config.block_size
    nothing = torch.empty(1).expand(scores.shape[1], 1, slots, 1)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    out = Selections.allocate(
        scores.shape[0], scores.shape[1], capacity or config.capacity_blocks(scores.shape[-1]), "cpu"
    )
    out.blocks.fill_(77)  # stale entries must not survive
    reference.select_blocks(scores, KV(nothing, nothing, lengths, starts), config, out)
    for row, counts in zip(out.blocks, out.counts, strict=True):
        for entries, count in zip(row.tolist(), counts.tolist(), strict=True):
            assert all(entry >= 0 for entry in entries[:count])
            assert all(entry == -1 for entry in entries[count:])
    return [set(entries.tolist()) - {-1} for entries in out.blocks.flatten(0, 1)]


SMALL = {"block_size": 4, "sink_tokens": 0, "recent_tokens": 1}
SCORES = torch.tensor([[[0.05, 0.4, 0.1, 0.3, 0.1, 0.05]]])


def test_top_k_takes_the_best_and_the_newest():
    assert select(SCORES, HybridConfig(budget_tokens=12, **SMALL)) == [{1, 3, 5}]


def test_equal_scores_go_to_the_earlier_block():
    assert select(torch.full((1, 1, 6), 0.1), HybridConfig(budget_tokens=12, **SMALL)) == [{0, 1, 5}]


def test_budget_is_rounded_up_to_blocks():
    assert select(SCORES, HybridConfig(budget_tokens=9, **SMALL)) == [{1, 3, 5}]


def test_budget_above_the_context_selects_everything():
    assert select(SCORES, HybridConfig(budget_tokens=4096, **SMALL), capacity=9) == [set(range(6))]


def test_sinks_and_recents_are_always_there():
    config = HybridConfig(budget_tokens=20, block_size=4, sink_tokens=5, recent_tokens=5)
    assert select(SCORES, config) == [{0, 1, 3, 4, 5}]


def test_ratio_is_a_share_of_each_context():
    config = HybridConfig(budget_ratio=0.5, **SMALL)
    assert select(SCORES.repeat(1, 2, 1), config, lengths=[24, 8]) == [{1, 3, 5}, {1}]


def test_top_p_is_the_smallest_set_with_that_mass():
    config = HybridConfig(selection="top_p", top_p=0.7, **SMALL)
    assert select(SCORES, config) == [{5, 1, 3}]  # 0.05 (newest) + 0.4 + 0.3


def test_threshold_takes_every_block_that_reaches_it():
    config = HybridConfig(selection="threshold", threshold=0.1, **SMALL)
    assert select(SCORES, config) == [{1, 2, 3, 4, 5}]


def test_budget_caps_the_other_strategies():
    config = HybridConfig(selection="threshold", threshold=0.01, budget_tokens=8, **SMALL)
    assert select(SCORES, config) == [{1, 5}]


def test_blocks_beyond_a_length_are_not_selected_and_an_empty_sequence_selects_nothing():
    config = HybridConfig(budget_tokens=24, **SMALL)
    assert select(SCORES.repeat(1, 3, 1), config, lengths=[24, 9, 0]) == [set(range(6)), {0, 1, 2}, set()]


def test_left_padding_shortens_a_sequence():
    starts = torch.tensor([0, 10], dtype=torch.int32)
    config = HybridConfig(budget_tokens=24, **SMALL)
    assert select(SCORES.repeat(1, 2, 1), config, starts=starts) == [set(range(6)), {0, 1, 2, 3}]


def test_a_selection_holds_the_blocks_of_tokens_that_come_before_the_next():
    config = HybridConfig(budget_tokens=12, refresh_every=4, **SMALL)
    assert select(SCORES, config, lengths=[24]) == [{1, 5, 6}]  # tokens 25 to 27 lie in block 6
    assert select(SCORES, config, lengths=[21]) == [{1, 3, 5}]  # tokens 22 to 24 lie in block 5


@pytest.mark.parametrize("capacity", [3, 8, 20])
def test_a_scan_is_left_out_only_where_the_buffers_hold_everything(capacity):
    """Whatever the config's budget is: buffers may be smaller."""
    keys, values = torch.randn(2, 1, 2, 60, 16)
    kv, query = KV(keys, values, None), torch.randn(1, 4, 16)
    config = HybridConfig(block_size=4, budget_tokens=80, sink_tokens=0, recent_tokens=4)
    found, right = (Selections.allocate(1, 1, capacity, "cpu") for _ in range(2))
    ops.scan_select(query, kv, (1,), config, 0.25, found)
    ops.select_blocks(ops.scan_blocks(query, kv, (1,), 4, 0.25), kv, config, right)
    assert set(found.blocks.flatten().tolist()) == set(right.blocks.flatten().tolist())
    assert torch.equal(found.counts, right.counts)


# ---------------------------------------------------------------------- attend_tokens


@pytest.mark.parametrize("operations", IMPLEMENTATIONS, ids=["reference", "ops"])
@pytest.mark.parametrize("page", [0, 5])
@pytest.mark.parametrize("span", [None, 3, 11])
def test_tokens_are_each_the_newest_of_a_shorter_cache(operations, page, span):
    kv, _ = make_cache([20, 9, 3], starts=[2, 13, 0], slots=23)
    kv = paged(kv, page) if page else kv
    query, begins = torch.randn(3, 5, 6, 16), None
    ends = kv.token_counts()[:, None] - torch.arange(4, -1, -1)
    if span is not None:
        begins = (ends - span).clamp(min=0).int()
    result = operations.attend_tokens(query, kv, SCALE, begins)
    for t in range(5):
        lengths, starts = ends[:, t].clamp(min=0).int(), kv.starts
        if begins is not None:
            starts, lengths = starts + begins[:, t], lengths - begins[:, t].clamp(max=lengths)
        one = reference.attend(query[:, t], kv._replace(lengths=lengths, starts=starts), SCALE)
        torch.testing.assert_close(result[:, t], one, rtol=1e-5, atol=1e-6)


def test_tokens_of_a_cache_in_8_bits():
    kv, _ = make_cache([20, 9])
    small = kv._replace(keys=kv.keys.to(torch.float8_e4m3fn), values=kv.values.to(torch.float8_e4m3fn))
    scales, query = (torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.25])), torch.randn(2, 3, 4, 16)
    wide = [one.float() * scale[:, None, None] for one, scale in zip(small[:2], scales, strict=True)]
    expected = ops.attend_tokens(query, kv._replace(keys=wide[0], values=wide[1]), SCALE)
    torch.testing.assert_close(ops.attend_tokens(query, small, SCALE, scales=scales), expected)


def test_tokens_refuse_what_does_not_fit():
    kv, _ = make_cache([20, 9])
    query = torch.randn(2, 3, 4, 16)
    with pytest.raises(ValueError, match="1 <= T <= 32"):
        ops.attend_tokens(torch.randn(2, 33, 4, 16), kv, SCALE)
    with pytest.raises(ValueError, match="begins must be int32"):
        ops.attend_tokens(query, kv, SCALE, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="scales belong to"):
        ops.attend_tokens(query, kv, SCALE, None, (torch.ones(2), torch.ones(2)))
    with pytest.raises(ValueError, match="two scales"):
        ops.attend_tokens(query, kv._replace(keys=kv.keys.to(torch.float8_e4m3fn)), SCALE)
