"""The kernels of `scan_blocks` against the reference."""

from math import nan

import pytest
import torch
from covering import covering
from kernel_cases import DEVICE, DTYPES, GPU, LAYOUTS, SCALE, close, kernels, make_cache, make_query, paged, tame

from lycheedecode import HybridConfig
from lycheedecode.bench.verify import check_same_blocks
from lycheedecode.ops import Selections, reference
from lycheedecode.ops.kernel_common import Tuning
from lycheedecode.ops.scan import triton as scan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf


@pytest.mark.parametrize(("layout", "dtype", "score"), covering(LAYOUTS, DTYPES, ["mass", "max"]), ids=str)
def test_scan(layout, dtype, score):
    kv = make_cache(**LAYOUTS[layout], dtype=dtype)
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


@pytest.mark.parametrize(("layout", "dtype", "newest"), covering(LAYOUTS, DTYPES, [1, 3]), ids=str)
def test_scan_of_a_copy(layout, dtype, newest):
    kv = make_cache(**LAYOUTS[layout], dtype=dtype)
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
