"""The Triton kernels against the reference; unread memory is NaN.

On a CPU they need Triton's interpreter, which must be chosen before Triton is imported: `test_interpreter.py` does.
"""

import os
from math import ceil, nan

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Without a GPU these tests run in test_interpreter.py.", allow_module_level=True)
pytest.importorskip("triton", reason="The kernels need Triton.")

from lycheedecode import HybridConfig  # noqa: E402
from lycheedecode.bench.verify import check_same_blocks  # noqa: E402
from lycheedecode.ops import KV, Selections, reference  # noqa: E402
from lycheedecode.ops import operators as kernels  # noqa: E402
from lycheedecode.ops.attend.triton_blocks import attend_blocks  # noqa: E402
from lycheedecode.ops.attend.triton_dense import attend  # noqa: E402
from lycheedecode.ops.attend.triton_rows import attend_tokens  # noqa: E402
from lycheedecode.ops.attend.triton_select import attend_worth  # noqa: E402
from lycheedecode.ops.dispatch import kernel_obstacle  # noqa: E402
from lycheedecode.ops.kernel_common import Tuning  # noqa: E402
from lycheedecode.ops.scan import triton as scan  # noqa: E402
from lycheedecode.ops.select import triton as select  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
SCALE = 0.2
# The interpreter reads the bits of a bfloat16 as an integer when it multiplies matrices.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def make_cache(lengths, starts=None, slots=None, heads=2, dim=64, dtype=torch.float32):
    """A cache inside a larger store; whatever is no token of it is NaN."""
    starts = starts or [0] * len(lengths)
    slots = slots or max(start + length for start, length in zip(starts, lengths, strict=True))
    store = torch.full((2, len(lengths), heads, slots + 3, dim), nan, dtype=dtype, device=DEVICE)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens = torch.randn(2, heads, length, dim, dtype=torch.float32, device=DEVICE)
        store[:, b, :, start : start + length] = tokens.to(dtype)
    plain = all(start == 0 for start in starts) and all(length == slots for length in lengths)
    return KV(
        store[0, :, :, :slots],
        store[1, :, :, :slots],
        None if plain else torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE) if any(starts) else None,
    )


def paged(kv, page):
    """The same cache in shuffled pages; pages that nobody owns are NaN, table entries that nobody needs are wild."""
    pages = ceil(kv.slots / page)
    order = torch.randperm(kv.batch * pages, device=DEVICE) + 1
    stores = []
    for cache in (kv.keys, kv.values):
        shape = (kv.batch * pages + 2, page, cache.shape[1], cache.shape[3])
        store = torch.full(shape, nan, dtype=cache.dtype, device=DEVICE).transpose(1, 2)
        for i, where in enumerate(order.tolist()):
            piece = cache[i // pages, :, i % pages * page : (i % pages + 1) * page]
            store[where, :, : piece.shape[1]] = piece
        stores.append(store)
    table = order.view(kv.batch, pages).int()
    counts = kv.token_counts()
    used = counts if kv.starts is None else counts + kv.starts
    first_unused = (used + page - 1) // page
    wild = torch.arange(pages, device=DEVICE) >= first_unused[:, None]
    return KV(*stores, counts, kv.starts, table.masked_fill(wild, 123456789))


def tame(kv):
    """For the reference, which reads pages before it masks them."""
    if kv.page_table is None:
        return kv
    return kv._replace(page_table=kv.page_table.clamp(max=kv.keys.shape[0] - 1))


def make_query(kv, group):
    batch, heads, dim = kv.batch, kv.keys.shape[1], kv.keys.shape[3]
    return torch.randn(batch, heads * group, dim, device=DEVICE).to(kv.keys.dtype)


def make_selections(kv, rows, capacity, block_size):
    """Random blocks of each sequence: at least one, as far as there are any, in no order."""
    out = Selections.allocate(rows, kv.batch, capacity, DEVICE)
    for b, length in enumerate(kv.token_counts().tolist()):
        existing = ceil(length / block_size)
        for r in range(rows):
            count = min(int(torch.randint(1, capacity + 1, ())), existing)
            out.blocks[r, b, :count] = torch.randperm(existing, device=DEVICE)[:count].int()
            out.counts[r, b] = count
    return out


def poison_unselected(kv, selections, rows, block_size):
    """NaN in every block of a head that its row did not select."""
    keys, values = kv.keys.clone(), kv.values.clone()
    first = [0] * kv.batch if kv.starts is None else kv.starts.tolist()
    for h, row in enumerate(rows.tolist()):
        for b in range(kv.batch):
            kept = set(selections.blocks[row, b].tolist())
            for block in range(ceil(int(kv.token_counts()[b]) / block_size)):
                if block not in kept:
                    start = first[b] + block * block_size
                    keys[b, h, start : start + block_size] = nan
                    values[b, h, start : start + block_size] = nan
    return kv._replace(keys=keys, values=values)


def close(result, expected, dtype):
    torch.testing.assert_close(result.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def as_sets(selections):
    counts = selections.counts.flatten().tolist()
    rows = selections.blocks.flatten(0, 1).tolist()
    for row, count in zip(rows, counts, strict=True):
        assert all(block == -1 for block in row[count:])
    return [sorted(row[:count]) for row, count in zip(rows, counts, strict=True)]


LAYOUTS = {
    "plain": {"lengths": [163, 163]},
    "lengths": {"lengths": [163, 40], "slots": 170},
    "left padding": {"lengths": [20, 163], "starts": [143, 0]},
    "odd dim": {"lengths": [63, 17], "starts": [0, 5], "dim": 80},
    "wide": {"lengths": [40, 90], "dim": 256},
    "an empty one": {"lengths": [0, 33], "dim": 96},
    "one token": {"lengths": [1]},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# ---------------------------------------------------------------------- attend


@layouts
@dtypes
def test_dense(layout, dtype):
    kv = make_cache(**layout, dtype=dtype)
    query = make_query(kv, 3)
    close(kernels.attend(query, kv, SCALE), reference.attend(query, kv, SCALE), dtype)


@pytest.mark.parametrize("group", [1, 4, 7, 16, 20])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_dense_groups_and_splits(group, splits):
    kv = make_cache([100, 31, 0])
    query = make_query(kv, group)
    result = attend(query, kv, SCALE, None, Tuning(splits, 16, 4, 2))
    close(result, reference.attend(query, kv, SCALE), torch.float32)


@pytest.mark.parametrize("page", [16, 48, 256])
def test_dense_pages_and_heads(page):
    kv = paged(make_cache([100, 31, 0], starts=[3, 0, 60], slots=104, heads=3), page)
    query = make_query(kv, 2)
    for heads in ((1,), (0, 2), (0, 1, 2)):
        close(kernels.attend(query, kv, SCALE, heads), reference.attend(query, tame(kv), SCALE, heads), torch.float32)


def test_dense_any_strides():
    """Tokens before heads, a view into a fused projection, a sequence shared by the whole batch."""
    kv = make_cache([50, 50])
    query = torch.randn(2, 9, 64, device=DEVICE)[:, 2:6]
    strided = KV(*(cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in kv[:2]))
    close(kernels.attend(query, strided, SCALE), reference.attend(query, kv, SCALE), torch.float32)
    shared = KV(kv.keys[:1].expand(2, -1, -1, -1), kv.values[:1].expand(2, -1, -1, -1))
    close(kernels.attend(query, shared, SCALE), reference.attend(query, shared, SCALE), torch.float32)


def test_dense_counters_return_to_zero():
    """The last program of a launch merges; the next launch finds the counters as this one did."""
    kv = make_cache([100, 31])
    query = make_query(kv, 2)
    first = attend(query, kv, SCALE, None, Tuning(4, 16, 4, 2))
    for _ in range(3):
        assert torch.equal(attend(query, kv, SCALE, None, Tuning(4, 16, 4, 2)), first)


@layouts
@dtypes
@pytest.mark.parametrize("score", ["mass", "max"])
def test_dense_and_worth(layout, dtype, score):
    """The output is that of dense attention, and blocks are worth what a scan says."""
    kv = make_cache(**layout, dtype=dtype)
    query, heads = make_query(kv, 3), (1, 0)
    for size, tuning in ((16, None), (4, Tuning(3, 32, 4, 2)), (32, Tuning(2, 64, 2, 2))):
        output, worth = attend_worth(query, kv, heads, size, SCALE, score, tuning)
        close(output, reference.attend(query, kv, SCALE, heads), dtype)
        found = scan.normalise(worth, kv, size)
        expected = reference.scan_blocks(query, kv, heads, size, SCALE, score)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("block_size", [8, 256])
def test_dense_and_selection(page, block_size):
    """Blocks that a tile holds, and blocks too large for one."""
    kv = make_cache([1100, 77, 0, 2], starts=[0, 90, 0, 7])
    kv = paged(kv, page) if page else kv
    config = HybridConfig(block_size=block_size, budget_tokens=4 * block_size, sink_tokens=8, recent_tokens=8)
    query, (found, right) = make_query(kv, 3), (Selections.allocate(1, 4, 4, DEVICE) for _ in range(2))
    output = kernels.attend_select(query, kv, (1,), config, SCALE, found)
    close(output, reference.attend(query, tame(kv), SCALE, (1,)), torch.float32)
    scores = reference.scan_blocks(query, tame(kv), (1,), block_size, SCALE)
    reference.select_blocks(scores, kv, config, right)
    check_same_blocks("attend_select", found, right, scores)


# ---------------------------------------------------------------------- attend_blocks


@layouts
@dtypes
def test_blocks(layout, dtype):
    kv = make_cache(**layout, dtype=dtype)
    query, rows = make_query(kv, 3), torch.tensor([2, 0], device=DEVICE)
    selections = make_selections(kv, 3, 6, 16)
    kv = poison_unselected(kv, selections, rows, 16)
    result = kernels.attend_blocks(query, kv, selections, rows, 16, SCALE)
    close(result, reference.attend_blocks(query, kv, selections, rows, 16, SCALE), dtype)


@pytest.mark.parametrize("block_size", [1, 8, 32, 128])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_blocks_sizes_and_splits(block_size, splits):
    kv = make_cache([260, 31, 0], slots=262)
    query, rows = make_query(kv, 4), torch.tensor([1, 1], device=DEVICE)
    selections = make_selections(kv, 2, 9, block_size)
    result = attend_blocks(query, kv, selections, rows, block_size, SCALE, None, Tuning(splits, 32, 2, 2))
    close(result, reference.attend_blocks(query, kv, selections, rows, block_size, SCALE), torch.float32)


@pytest.mark.parametrize("page", [16, 64])
def test_blocks_in_pages(page):
    """Blocks that straddle pages, because of left padding; heads in part; blocks that begin beyond the length."""
    kv = paged(make_cache([100, 31], starts=[5, 0], slots=110, heads=3), page)
    query, rows = make_query(kv, 2), torch.tensor([0, 1], device=DEVICE)
    selections = make_selections(kv, 2, 4, 32)
    selections.blocks[:, 1, 1] = 1  # tokens 32 to 63 of a sequence that has 31: selected ahead of time
    selections.counts[:, 1] = 2
    selections.blocks[:, 1, 0] = 0
    result = kernels.attend_blocks(query, kv, selections, rows, 32, SCALE, (0, 2))
    expected = reference.attend_blocks(query, tame(kv), selections, rows, 32, SCALE, (0, 2))
    close(result, expected, torch.float32)


def test_blocks_none_selected_gives_zeros():
    kv = make_cache([40])
    selections = Selections.allocate(1, 1, 3, DEVICE)
    rows = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert not kernels.attend_blocks(make_query(kv, 2), kv, selections, rows, 16, SCALE).any()


def test_blocks_go_where_they_are_told_to():
    kv = paged(make_cache([100, 31], heads=2), 16)
    query, rows = make_query(kv, 3), torch.tensor([1, 0], device=DEVICE)
    selections = make_selections(kv, 2, 3, 16)
    out = torch.full((3, *query.shape[1:]), nan, device=DEVICE)
    kernels.attend_blocks(query, kv, selections, rows, 16, SCALE, out=out[:2])
    assert torch.equal(out[:2], kernels.attend_blocks(query, kv, selections, rows, 16, SCALE))
    assert out[2].isnan().all()
    with pytest.raises(ValueError, match="out must be contiguous"):
        kernels.attend_blocks(query, kv, selections, rows, 16, SCALE, out=out)


# ---------------------------------------------------------------------- scan_blocks


@layouts
@dtypes
@pytest.mark.parametrize("score", ["mass", "max"])
def test_scan(layout, dtype, score):
    kv = make_cache(**layout, dtype=dtype)
    kv = kv._replace(values=torch.full_like(kv.values, nan))
    query = make_query(kv, 3)
    result = kernels.scan_blocks(query, kv, (1, 0), 16, SCALE, score)
    expected = reference.scan_blocks(query, kv, (1, 0), 16, SCALE, score)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-6)  # in any dtype: products are exact in float32


@pytest.mark.parametrize("block_size", [1, 8, 64, 256])
@pytest.mark.parametrize("page", [0, 32])
def test_scan_blocks_and_pages(block_size, page):
    kv = make_cache([270, 31, 0], starts=[2, 7, 0], slots=275)
    kv = paged(kv, page) if page else kv
    query = make_query(kv, 5)
    result = kernels.scan_blocks(query, kv, (1,), block_size, SCALE)
    close(result, reference.scan_blocks(query, tame(kv), (1,), block_size, SCALE), torch.float32)


def test_scan_of_very_different_logits():
    """Weights that underflow give 0, large ones do not overflow."""
    kv = make_cache([90])
    kv.keys[:, :, 40:44] *= 300
    query = make_query(kv, 2)
    result = kernels.scan_blocks(query, kv, (0, 1), 16, SCALE)
    torch.testing.assert_close(result, reference.scan_blocks(query, kv, (0, 1), 16, SCALE), rtol=1e-4, atol=1e-6)


def make_copy(kv, heads, newest):
    """Keys of `heads` in 8 bits, in a longer store; the `newest` tokens, and all that is no token, are NaN."""
    shape = (kv.batch, len(heads), kv.slots + 5, kv.keys.shape[3])
    copy = torch.full(shape, nan, dtype=torch.float32, device=DEVICE).to(torch.float8_e4m3fn)
    for b, count in enumerate(kv.token_counts().tolist()):
        first = 0 if kv.starts is None else int(kv.starts[b])
        end = max(first + count - newest, first)
        reference.write_copy(copy[b : b + 1], kv.keys[b : b + 1], heads, first, end)
    return copy


@layouts
@dtypes
@pytest.mark.parametrize("newest", [1, 3])
def test_scan_of_a_copy(layout, dtype, newest):
    kv = make_cache(**layout, dtype=dtype)
    if not GPU:  # the interpreter does not round up to the next power of two
        kv.keys.copy_(kv.keys.to(torch.float8_e4m3fn))
    query, heads = make_query(kv, 3), (1, 0)
    copy, full = make_copy(kv, heads, newest), make_copy(kv, heads, 0)
    for tuning in (None, Tuning(3, 16, 4, 2)):
        mine = copy.clone()
        worth = scan.scan(query, kv, heads, 16, SCALE, "mass", tuning, mine, newest)
        result = scan.normalise(worth, kv, 16)
        expected = reference.scan_blocks(query, kv, heads, 16, SCALE, "mass", full)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-6)
        assert torch.equal(mine.view(torch.uint8), full.view(torch.uint8))


def test_scan_select_of_a_copy():
    kv = make_cache([400, 77, 0, 2], starts=[0, 90, 0, 7])
    kv.keys.copy_(kv.keys.to(torch.float8_e4m3fn))
    config = HybridConfig(block_size=8, budget_tokens=96, refresh_every=4)
    query, heads = make_query(kv, 3), (1,)
    mine, right = make_copy(kv, heads, 4), make_copy(kv, heads, 4)
    out, expected = (Selections.allocate(1, 4, 12, DEVICE) for _ in range(2))
    kernels.scan_select(query, kv, heads, config, SCALE, out, mine)
    reference.write_newest_to_copy(right, kv, heads, 4)
    scores = reference.scan_blocks(query, kv, heads, 8, SCALE, "mass", right)
    reference.select_blocks(scores, kv, config, expected)
    check_same_blocks("scan_select", out, expected, scores)


# ---------------------------------------------------------------------- select_blocks

CONFIGS = {
    "top_k": {"budget_tokens": 80},
    "no sink": {"budget_tokens": 80, "sink_tokens": 0, "recent_tokens": 1},
    "ratio": {"budget_ratio": 0.3},
    "small ratio": {"budget_ratio": 0.01},
    "capped ratio": {"budget_ratio": 0.9, "budget_tokens": 96, "selection": "ratio"},
    "top_p": {"selection": "top_p", "top_p": 0.7},
    "small top_p": {"selection": "top_p", "top_p": 0.001},
    "all of top_p": {"selection": "top_p", "top_p": 1.0},
    "capped top_p": {"selection": "top_p", "top_p": 0.9, "budget_tokens": 96},
    "threshold": {"selection": "threshold", "threshold": 0.0125},
    "capped threshold": {"selection": "threshold", "threshold": 0.001, "budget_tokens": 96},
    "ahead": {"budget_tokens": 96, "refresh_every": 12},
}
configs = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)


def make_scores(rows, lengths, slots, block_size, levels):
    """Weights that add up to 1, in multiples of 2**-20 so that sums are exact; few `levels` make many ties."""
    scores = torch.zeros(rows, len(lengths), ceil(slots / block_size))
    for b, length in enumerate(lengths):
        count = ceil(length / block_size)
        raw = torch.randint(1, levels + 1, (rows, count)).float()
        scores[:, b, :count] = (raw / raw.sum(-1, keepdim=True) * 2**20).floor() / 2**20
    return scores.to(DEVICE)


@configs
@pytest.mark.parametrize(
    ("each", "levels"),
    [(64, 1), (64, 4), (64, 10**6), (1, 4)],
    ids=["held, all ties", "held, many ties", "held, no ties", "chunks, many ties"],
)
def test_select(settings, levels, each, monkeypatch):
    """By a row that is held, and one that is read again."""
    monkeypatch.setattr(select, "IN_REGISTERS", each)
    monkeypatch.setattr(select, "_READ_AGAIN", 1)
    lengths, slots = [1000, 333, 0, 5, 40], 1003
    config = HybridConfig(**{"block_size": 8, "sink_tokens": 10, "recent_tokens": 9, **settings})
    scores = make_scores(2, lengths, slots, 8, levels)
    kv = KV(*[torch.empty(5, 1, slots, 16, device=DEVICE)] * 2, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    capacity = config.capacity_blocks(ceil((slots + config.refresh_every - 1) / 8))
    expected = Selections.allocate(2, 5, capacity, DEVICE)
    reference.select_blocks(scores, kv, config, expected)
    everything = Selections.allocate(4, 5, capacity, DEVICE)
    everything.blocks.fill_(7)
    out = everything.rows(1, 2)
    select.select_blocks(scores, kv, select.Rule.of(config), out, Tuning(1, 32, 1, 1))
    assert as_sets(out) == as_sets(expected)
    assert (everything.blocks[0] == 7).all()
    assert (everything.blocks[3] == 7).all()


@configs
def test_select_fewer_than_configured(settings):
    """Buffers too small for what is forced: the first forced blocks, as in the reference."""
    config = HybridConfig(**{"block_size": 8, "sink_tokens": 10, "recent_tokens": 9, **settings})
    scores = make_scores(1, [100], 100, 8, 10**6)
    kv = KV(*[torch.empty(1, 1, 100, 16, device=DEVICE)] * 2)
    for capacity in (1, 3, 4, 20):
        expected, out = (Selections.allocate(1, 1, capacity, DEVICE) for _ in range(2))
        reference.select_blocks(scores, kv, config, expected)
        kernels.select_blocks(scores, kv, config, out)
        assert as_sets(out) == as_sets(expected)


@pytest.mark.parametrize("name", ["top_k", "ratio", "top_p", "threshold", "ahead", "max"])
def test_scan_select_is_scan_then_select(name):
    settings = {"block_score": "max", "budget_tokens": 80} if name == "max" else CONFIGS[name]
    config = HybridConfig(**{"block_size": 8, "sink_tokens": 10, "recent_tokens": 9, **settings})
    kv = make_cache([400, 77, 0], starts=[0, 90, 0])
    query = make_query(kv, 3)
    capacity = config.capacity_blocks(ceil((kv.slots + config.refresh_every - 1) / 8))
    expected, out = (Selections.allocate(2, 3, capacity, DEVICE) for _ in range(2))
    scores = kernels.scan_blocks(query, kv, (0, 1), 8, SCALE, config.block_score)
    kernels.select_blocks(scores, kv, config, expected)
    kernels.scan_select(query, kv, (0, 1), config, SCALE, out)
    assert as_sets(out) == as_sets(expected)


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_what_fits_is_selected_as_a_whole_and_not_scanned(refresh_every):
    """Sequences of a batch around the edge of the budget; keys of those below it are poisoned."""
    config = HybridConfig(block_size=8, budget_tokens=80, recent_tokens=8, refresh_every=refresh_every)
    lengths = [80 - (refresh_every - 1) + difference for difference in (1, 0, -1, -60)]
    kv = make_cache([*lengths, 0, 200])
    expected, out = (Selections.allocate(1, 6, 10, DEVICE) for _ in range(2))
    query = make_query(kv, 2)
    scores = reference.scan_blocks(query, kv, (1,), 8, SCALE)
    reference.select_blocks(scores, kv, config, expected)
    kv.keys[1:4] = nan
    kernels.scan_select(query, kv, (1,), config, SCALE, out)
    assert as_sets(out) == as_sets(expected)
    assert out.counts[0, 1:5].tolist() == [ceil((n + refresh_every - 1) / 8) if n else 0 for n in (*lengths[1:], 0)]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("levels", [1, 3, 40, 10**6])
def test_select_from_rows_of_any_length(levels, held, monkeypatch):
    """Rows that fill the last vector by one block, all of it, and all but one."""
    monkeypatch.setattr(select, "_READ_AGAIN", 2)
    config = HybridConfig(block_size=8, budget_tokens=96, sink_tokens=10, recent_tokens=9)
    for num_blocks in (1025, 1024, 1023):
        monkeypatch.setattr(select, "IN_REGISTERS", 64 if held else 4)
        scores = make_scores(2, [8 * num_blocks, 4100, 0], 8 * num_blocks, 8, levels)
        lengths = torch.tensor([8 * num_blocks, 4100, 0], dtype=torch.int32, device=DEVICE)
        kv = KV(*[torch.empty(3, 1, 8 * num_blocks, 16, device=DEVICE)] * 2, lengths)
        expected, out = (Selections.allocate(2, 3, 12, DEVICE) for _ in range(2))
        reference.select_blocks(scores, kv, config, expected)
        select.select_blocks(scores, kv, select.Rule.of(config), out)
        assert as_sets(out) == as_sets(expected)


# ---------------------------------------------------------------------- the door


def step(query, kv, config, selections, rows):
    kernels.scan_select(query, kv, (1,), config, SCALE, selections.rows(1, 1))
    scores = kernels.scan_blocks(query, kv, (0,), 8, SCALE)
    kernels.select_blocks(scores, kv, config, selections.rows(2, 1))
    sparse = kernels.attend_blocks(query + 0, kv, selections, rows, 8, SCALE)
    return sparse + kernels.attend(query, kv, SCALE), scores


def test_compiled_without_graph_breaks():
    kv = make_cache([90, 33], slots=96)
    config = HybridConfig(block_size=8, budget_tokens=64, recent_tokens=8)
    query, rows = make_query(kv, 2), torch.tensor([2, 1], device=DEVICE)
    expected, out = (Selections.allocate(3, 2, 8, DEVICE) for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    for _ in range(2):
        for got, wanted in zip(
            compiled(query, kv, config, out, rows), step(query, kv, config, expected, rows), strict=True
        ):
            torch.testing.assert_close(got, wanted)
        assert as_sets(out) == as_sets(expected)


def test_bad_input_names_the_argument():
    kv, query = make_cache([40]), torch.randn(1, 4, 64, device=DEVICE)
    rows = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    good = Selections.allocate(1, 1, 3, DEVICE)
    with pytest.raises(ValueError, match="query must have a contiguous last dimension"):
        kernels.attend(torch.randn(1, 64, 4, device=DEVICE).mT, kv, SCALE)
    with pytest.raises(ValueError, match=r"heads \(0, 2\) do not all exist"):
        kernels.attend(query, kv, SCALE, (0, 2))
    with pytest.raises(ValueError, match="rows must be int64"):
        kernels.attend_blocks(query, kv, good, rows.int(), 16, SCALE)
    with pytest.raises(ValueError, match="selections are"):
        kernels.attend_blocks(query, kv, Selections.allocate(1, 2, 3, DEVICE), rows, 16, SCALE)
    with pytest.raises(ValueError, match="score must be"):
        kernels.scan_blocks(query, kv, (0,), 16, SCALE, "sum")
    with pytest.raises(ValueError, match="out is"):
        kernels.scan_select(query, kv, (0, 1), HybridConfig(), SCALE, good)
    assert "no kernels for" in kernel_obstacle(query.double())
    assert "head dims" in kernel_obstacle(torch.empty(1, 1, 512))


# ---------------------------------------------------------------------- large shapes


@on_gpu
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_large(block_size):
    kv = make_cache([70_001, 8_192, 0, 123], starts=[0, 60_000, 5, 69_000], heads=8, dim=128, dtype=torch.bfloat16)
    config = HybridConfig(block_size=block_size)
    query, rows = make_query(kv, 4), torch.randint(0, 8, (8,), device=DEVICE)
    scores = kernels.scan_blocks(query, kv, tuple(range(8)), block_size, SCALE)
    exact = reference.scan_blocks(query, kv, tuple(range(8)), block_size, SCALE)
    torch.testing.assert_close(scores, exact, rtol=1e-3, atol=1e-8)
    expected, out = (Selections.allocate(8, 4, 4096 // block_size, DEVICE) for _ in range(2))
    reference.select_blocks(scores, kv, config, expected)
    kernels.scan_select(query, kv, tuple(range(8)), config, SCALE, out)
    check_same_blocks("scan_select", out, expected, scores)
    kernels.select_blocks(scores, kv, config, out)
    assert as_sets(out) == as_sets(expected)
    result = kernels.attend_blocks(query, kv, out, rows, block_size, SCALE)
    close(result, reference.attend_blocks(query, kv, out, rows, block_size, SCALE), torch.bfloat16)
    close(kernels.attend(query, kv, SCALE), reference.attend(query, kv, SCALE), torch.bfloat16)


@on_gpu
def test_offsets_beyond_32_bits():
    """2**20 tokens of 24 heads of 128 channels, tokens first: the last offsets need 33 bits."""
    slots, heads = 1 << 20, 24
    store = torch.empty(1, slots, heads, 128, dtype=torch.bfloat16, device=DEVICE).normal_()
    kv, head = KV(store.transpose(1, 2), store.transpose(1, 2)), heads - 1
    query = make_query(kv, 2)
    alone = KV(*(cache[:, head:] for cache in kv[:2]))
    config, mine = HybridConfig(block_size=16), query[:, 2 * head :]
    close(kernels.attend(query, kv, SCALE, (head,)), reference.attend(mine, alone, SCALE), torch.bfloat16)
    scores = kernels.scan_blocks(query, kv, (head,), 16, SCALE)
    torch.testing.assert_close(scores, reference.scan_blocks(mine, alone, (0,), 16, SCALE), rtol=1e-3, atol=1e-9)
    expected, out = (Selections.allocate(1, 1, 256, DEVICE) for _ in range(2))
    reference.select_blocks(scores, kv, config, expected)
    kernels.scan_select(query, kv, (head,), config, SCALE, out)
    check_same_blocks("scan_select", out, expected, scores)
    rows = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    result = kernels.attend_blocks(query, kv, out, rows, 16, SCALE, (head,))
    close(result, reference.attend_blocks(mine, alone, out, rows, 16, SCALE), torch.bfloat16)


@on_gpu
def test_replayed_as_a_cuda_graph():
    """One graph serves every length: what it reads is in the tensors."""
    kv = make_cache([3000, 3000], heads=8, dim=128, dtype=torch.bfloat16)
    kv = kv._replace(lengths=torch.tensor([100, 100], dtype=torch.int32, device=DEVICE))
    config = HybridConfig(block_size=8, budget_tokens=512)
    query, rows = make_query(kv, 4), torch.tensor([0, 1, 2] * 2 + [1, 2], device=DEVICE)
    selections = Selections.allocate(3, 2, 64, DEVICE)
    step(query, kv, config, selections, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, _ = step(query, kv, config, selections, rows)
    for lengths in ([1, 3000], [0, 17], [2999, 512]):
        kv.lengths.copy_(torch.tensor(lengths))
        query.normal_()
        graph.replay()
        replayed, sets = result.clone(), as_sets(selections)
        expected, _ = step(query, kv, config, selections, rows)
        assert torch.equal(replayed, expected)
        assert sets == as_sets(selections)


# ---------------------------------------------------------------------- attend_tokens


def make_queries(kv, tokens, group):
    shape = (kv.batch, tokens, kv.keys.shape[1] * group, kv.keys.shape[3])
    return torch.randn(shape, device=DEVICE).to(kv.keys.dtype if kv.keys.dtype.itemsize > 1 else torch.float16)


@layouts
@dtypes
def test_tokens(layout, dtype):
    kv = make_cache(**layout, dtype=dtype)
    query = make_queries(kv, 5, 3)
    close(kernels.attend_tokens(query, kv, SCALE), reference.attend_tokens(query, kv, SCALE), dtype)


@pytest.mark.parametrize(("tokens", "group"), [(1, 7), (2, 6), (9, 4), (32, 6)])
@pytest.mark.parametrize("splits", [1, 3])
def test_tokens_rows_and_splits(tokens, group, splits):
    kv = make_cache([100, 31, 3, 0])
    query = make_queries(kv, tokens, group)
    result = attend_tokens(query, kv, SCALE, tuning=Tuning(splits, 16, 4, 2))
    close(result, reference.attend_tokens(query, kv, SCALE), torch.float32)


@pytest.mark.parametrize("page", [16, 48, 256])
def test_tokens_pages(page):
    kv = paged(make_cache([100, 31, 0], starts=[3, 0, 60], slots=104, heads=3), page)
    query = make_queries(kv, 6, 2)
    close(kernels.attend_tokens(query, kv, SCALE), reference.attend_tokens(query, tame(kv), SCALE), torch.float32)


def test_tokens_begin_late():
    """Layers that look back a limited way."""
    kv = make_cache([100, 31, 5])
    query, end = make_queries(kv, 6, 2), kv.token_counts()[:, None] - torch.arange(5, -1, -1, device=DEVICE)
    for span in (1, 7, 40):
        begins = (end - span).clamp(min=0).int()
        for tuning in (None, Tuning(3, 16, 4, 2)):
            result = attend_tokens(query, kv, SCALE, begins, tuning=tuning)
            close(result, reference.attend_tokens(query, kv, SCALE, begins), torch.float32)


@pytest.mark.parametrize("page", [0, 16])
def test_tokens_of_a_cache_in_8_bits(page):
    kv = make_cache([100, 31], dtype=torch.float16)
    scales = torch.tensor([0.5, 2.0], device=DEVICE), torch.tensor([3.0, 0.25], device=DEVICE)
    kv = paged(kv, page) if page else kv
    kv = kv._replace(keys=kv.keys.to(torch.float8_e4m3fn), values=kv.values.to(torch.float8_e4m3fn))
    query = make_queries(kv, 6, 2)
    result = kernels.attend_tokens(query, kv, SCALE, None, scales)
    close(result, reference.attend_tokens(query, tame(kv), SCALE, None, scales), torch.float16)


def test_tokens_do_not_feel_their_place():
    """A query gives the same bits whether it is the last of several tokens or another; numpy's products do not."""
    kv = make_cache([100, 31], slots=110)
    query = make_queries(kv, 5, 3)
    tuning = Tuning(3, 16, 4, 2)
    together = attend_tokens(query, kv, SCALE, tuning=tuning)
    for t in range(5):
        ends = kv._replace(lengths=kv.lengths - (4 - t))
        alone = query.roll(4 - t, 1)
        result = attend_tokens(alone, ends, SCALE, tuning=tuning)[:, 4]
        assert torch.equal(result, together[:, t]) if GPU else torch.allclose(result, together[:, t], atol=1e-6)
