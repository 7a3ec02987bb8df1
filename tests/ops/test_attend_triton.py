"""The kernels of `attend` and `attend_blocks` against the reference."""

from math import nan

import pytest
import torch
from covering import covering
from kernel_cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    SCALE,
    close,
    dtypes,
    kernels,
    layouts,
    make_cache,
    make_query,
    make_selections,
    paged,
    poison_unselected,
    tame,
)

from lycheedecode import HybridConfig
from lycheedecode.bench.verify import check_same_blocks
from lycheedecode.ops import KV, Selections, reference
from lycheedecode.ops.attend.triton_blocks import attend_blocks
from lycheedecode.ops.attend.triton_dense import attend
from lycheedecode.ops.attend.triton_select import attend_worth
from lycheedecode.ops.kernel_common import Tuning
from lycheedecode.ops.scan import triton as scan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf


@layouts
@dtypes
def test_dense(layout, dtype):
    kv = make_cache(**layout, dtype=dtype)
    query = make_query(kv, 3)
    close(kernels.attend(query, kv, SCALE), reference.attend(query, kv, SCALE), dtype)


@pytest.mark.parametrize(("group", "splits"), [(1, 2), (4, 1), (7, 5), (16, 2), (20, 1), (20, 5)])
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


@pytest.mark.parametrize(("layout", "dtype", "score"), covering(LAYOUTS, DTYPES, ["mass", "max"]), ids=str)
def test_dense_and_worth(layout, dtype, score):
    """The output is that of dense attention, and blocks are worth what a scan says."""
    kv = make_cache(**LAYOUTS[layout], dtype=dtype)
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


@layouts
@dtypes
def test_blocks(layout, dtype):
    kv = make_cache(**layout, dtype=dtype)
    query, rows = make_query(kv, 3), torch.tensor([2, 0], device=DEVICE)
    selections = make_selections(kv, 3, 6, 16)
    kv = poison_unselected(kv, selections, rows, 16)
    result = kernels.attend_blocks(query, kv, selections, rows, 16, SCALE)
    close(result, reference.attend_blocks(query, kv, selections, rows, 16, SCALE), dtype)


@pytest.mark.parametrize(("block_size", "splits"), [(1, 1), (1, 8), (8, 3), (32, 1), (32, 8), (128, 3)])
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
