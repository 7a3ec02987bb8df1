"""The kernels of `scan_blocks` against the reference."""

from math import nan

import pytest
import torch
from covering import covering
from kernel_cases import DEVICE, DTYPES, GPU, LAYOUTS, SCALE, close, kernels, make_cache, make_query, paged, tame

from lycheedecode import HybridConfig
from lycheedecode.bench.verify import check_same_blocks
from lycheedecode.ops import Selections, SmallKeys, reference
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


def make_copy(form, kv, heads, newest):
    """Keys of `heads`, in a longer store; the `newest` tokens, and all that is no token, are NaN."""
    copy = SmallKeys.allocate(form, (kv.batch, len(heads), kv.slots + 5), kv.keys.shape[3], DEVICE)
    copy.views(lambda part: part.view(torch.uint8).fill_(255))  # NaN as a float of 8 bits, or of 16
    for b, count in enumerate(kv.token_counts().tolist()):
        first = 0 if kv.starts is None else int(kv.starts[b])
        end = max(first + count - newest, first)
        own = copy.views(lambda part, b=b: part[b : b + 1])
        reference.write_copy(own, kv.keys[b : b + 1], heads, first, end)
    return copy


def exact(form, kv):
    """Keys that 8-bit floats hold: the interpreter does not round up to the next power of two."""
    if form == "float8" and not GPU:
        kv.keys.copy_(kv.keys.to(torch.float8_e4m3fn))


def clone(copy):
    return copy.views(torch.Tensor.clone)


def check_equal(one, other):
    """Bit by bit."""
    for part, same in zip(one, other, strict=True):
        assert (part is None) == (same is None)
        assert part is None or torch.equal(part.view(torch.uint8), same.view(torch.uint8))


@pytest.mark.parametrize(
    ("layout", "dtype", "newest", "form"), covering(LAYOUTS, DTYPES, [1, 3], ["float8", "int4"]), ids=str
)
def test_scan_of_a_copy(layout, dtype, newest, form):
    kv = make_cache(**LAYOUTS[layout], dtype=dtype)
    exact(form, kv)
    query, heads = make_query(kv, 3), (1, 0)
    copy, full = make_copy(form, kv, heads, newest), make_copy(form, kv, heads, 0)
    for tuning in (None, Tuning(3, 16, 4, 2)):
        mine = clone(copy)
        worth = scan.scan(query, kv, heads, 16, SCALE, "mass", tuning, mine, newest)
        result = scan.normalise(worth, kv, 16)
        expected = reference.scan_blocks(query, kv, heads, 16, SCALE, "mass", full)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-6)
        check_equal(mine, full)


@pytest.mark.parametrize("form", ["float8", "int4"])
def test_scan_select_of_a_copy(form):
    kv = make_cache([400, 77, 0, 2], starts=[0, 90, 0, 7])
    exact(form, kv)
    config = HybridConfig(block_size=8, budget_tokens=96, refresh_every=4)
    query, heads = make_query(kv, 3), (1,)
    mine, right = make_copy(form, kv, heads, 4), make_copy(form, kv, heads, 4)
    out, expected = (Selections.allocate(1, 4, 12, DEVICE) for _ in range(2))
    kernels.scan_select(query, kv, heads, config, SCALE, out, mine)
    reference.write_newest_to_copy(right, kv, heads, 4)
    scores = reference.scan_blocks(query, kv, heads, 8, SCALE, "mass", right)
    reference.select_blocks(scores, kv, config, expected)
    check_same_blocks("scan_select", out, expected, scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_all_sizes_in_4_bits(dtype):
    """Zeros, one large channel, halves of very different size, sums that lie between two numbers: bit by bit."""
    kv = make_cache([64], dtype=dtype)
    kv.keys[:, :, 0] = 0
    kv.keys[:, :, 1, :32] = 0
    kv.keys[:, :, 2, 5] = 3e4
    kv.keys[:, :, 3, :32] *= 1e-4
    kv.keys[:, :, 4] = torch.arange(64, device=DEVICE) / 2
    kv.keys[:, :, 5] = 7 * torch.tensor([1, 0.5], device=DEVICE).repeat(32)
    query, heads = make_query(kv, 1), (0, 1)
    copy, right = (make_copy("int4", kv, heads, newest) for newest in (64, 0))
    scan.scan(query, kv, heads, 16, SCALE, copy=copy, newest=64)
    check_equal(copy, right)
