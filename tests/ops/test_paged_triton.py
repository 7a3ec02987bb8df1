"""What lies beside the pages of a server's cache: means of chunks, of 8 bits, too, and copies of scanned keys.

References against plain definitions, kernels against references; on a CPU `test_interpreter.py` runs the
kernels.
"""

import os
from math import nan

import pytest
import torch
from covering import covering

from lycheedecode import HybridConfig, ops
from lycheedecode.ops import EVERYTHING, KV, Completion, Selections, SmallKeys, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(not RUNS_KERNELS, reason="Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf

HEADS, GROUP, DIM, SCALE, CHUNK = 2, 3, 32, 0.3, 32
LENGTHS, LIMITS = [170, 33, 0, 129, 190], [5, 3, 3, EVERYTHING, 4]
FACTORS = (1.0, 0.3)
CONFIG = HybridConfig(budget_tokens=32, block_size=4, sink_tokens=4, recent_tokens=4, completion_chunk=CHUNK)
SCALES = torch.tensor([0.5, 2.0], device=DEVICE), torch.tensor([3.0, 0.25], device=DEVICE)


def numbers(ints):
    return torch.tensor(ints, dtype=torch.int32, device=DEVICE)


def make(page, dtype, lengths=LENGTHS):
    """Pages out of order; nothing is a token beyond a sequence's length."""
    batch, pages = len(lengths), 192 // page
    query = torch.randn(batch, HEADS * GROUP, DIM, device=DEVICE)
    keys, values = (torch.randn(batch * pages, HEADS, page, DIM, device=DEVICE).to(dtype) for _ in range(2))
    table = torch.randperm(batch * pages, device=DEVICE).view(batch, pages).int()
    return query, KV(keys, values, numbers(lengths), None, table)


def means_of(kv, dtype):
    size = -(-kv.keys.shape[2] // CHUNK)
    return torch.full((2, kv.keys.shape[0], HEADS, size, DIM), nan, dtype=dtype, device=DEVICE)


def selected(kv):
    out = Selections.allocate(HEADS, kv.batch, 8, DEVICE, 6)
    scores = torch.rand(HEADS, kv.batch, 48, device=DEVICE)
    reference.select_blocks(scores, kv, CONFIG, out, numbers(LIMITS))
    return out, torch.tensor([1, 0], device=DEVICE)


def copies_of(form, kv, heads):
    """Of all but the newest token of each sequence."""
    pages, _, page, dim = kv.keys.shape
    copy = SmallKeys.allocate(form, (pages, len(heads), page), dim, DEVICE)
    reference.write_pages_to_copy(copy, kv.keys, heads, torch.arange(pages, device=DEVICE))
    for b, length in enumerate(kv.lengths.tolist()):
        if length:
            page, entry = divmod(length - 1, kv.keys.shape[2])
            copy.numbers.view(torch.uint8)[int(kv.page_table[b, page]), :, entry] = 0
    return copy


@pytest.mark.parametrize("page", [16, 48, 64])
def test_means_of_numbers_in_8_bits_are_before_their_scales(page):
    query, kv = make(page, torch.float8_e4m3fn)
    wide = kv._replace(
        keys=kv.keys.float() * SCALES[0][:, None, None], values=kv.values.float() * SCALES[1][:, None, None]
    )
    means, own, (out, rows) = means_of(kv, torch.float32), means_of(kv, torch.float32), selected(kv)
    ops.write_means(kv, CHUNK, *means)
    ops.write_means(wide, CHUNK, *own)
    torch.testing.assert_close(means * torch.stack(SCALES)[:, None, :, None, None], own, equal_nan=True)
    found = ops.attend_blocks(
        query, kv, out, rows, 4, SCALE, completion=Completion(*means, CHUNK, FACTORS), scales=SCALES
    )
    right = ops.attend_blocks(query, wide, out, rows, 4, SCALE, completion=Completion(*own, CHUNK, FACTORS))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, ops.attend_blocks(query, kv, out, rows, 4, SCALE, scales=SCALES), atol=1e-2)


@runs_kernels
@pytest.mark.parametrize(("bits", "page", "splits"), covering([8, 16], [16, 48, 64], [1, 4]))
def test_attention_with_means(bits, page, splits):
    from lycheedecode.ops.attend.triton_blocks import attend_blocks
    from lycheedecode.ops.complete.triton import write_means
    from lycheedecode.ops.kernel_common import Tuning

    query, kv = make(page, torch.float16 if bits == 16 else torch.float8_e4m3fn)
    query, scales, (out, rows) = query.half(), SCALES if bits == 8 else None, selected(kv)
    found, right = means_of(kv, torch.float16), means_of(kv, torch.float16)
    write_means(kv, CHUNK, *found, None, 6)
    reference.write_means(kv, CHUNK, *right, None, 6)
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3, equal_nan=True)
    more = {"completion": Completion(*right, CHUNK, FACTORS), "scales": scales}
    result = attend_blocks(query, kv, out, rows, 4, SCALE, None, Tuning(splits, 16, 2, 2), **more)
    expected = reference.attend_blocks(query, kv, out, rows, 4, SCALE, **more)
    torch.testing.assert_close(result, expected, rtol=4e-3, atol=4e-3)


@runs_kernels
@pytest.mark.parametrize(("page", "form"), [(16, "float8"), (64, "float8"), (16, "int4"), (64, "int4")])
def test_a_scan_of_copies_in_pages(page, form):
    from lycheedecode.ops.scan import triton as scan

    query, kv = make(page, torch.float16)
    if DEVICE == "cpu" and form == "float8":  # the interpreter does not round up to the next power of two
        kv.keys.copy_(kv.keys.to(torch.float8_e4m3fn))
    copy, same = copies_of(form, kv, (1, 0)), copies_of(form, kv, (1, 0))
    worth = scan.scan(query.half(), kv, (1, 0), 4, SCALE, copy=copy, newest=1)
    found = scan.normalise(worth, kv, 4)
    reference.write_newest_to_copy(same, kv, (1, 0), 1)
    assert torch.equal(copy.numbers.view(torch.uint8), same.numbers.view(torch.uint8))
    assert form == "float8" or torch.equal(copy.scales, same.scales)
    right = reference.scan_blocks(query.half(), kv, (1, 0), 4, SCALE, copy=same)
    torch.testing.assert_close(found, right, rtol=4e-3, atol=1e-4)


@pytest.mark.skipif(RUNS_KERNELS, reason="Where kernels run, they compile.")
@pytest.mark.parametrize(
    ("page", "dim", "batch", "dtype"),
    [
        (16, 128, 1, torch.float8_e4m3fn),
        (128, 64, 8, torch.float8_e4m3fn),
        (16, 256, 4, torch.float8_e4m3fn),
        (128, 128, 1, torch.bfloat16),
        (16, 256, 8, torch.bfloat16),
        (16, 128, 4, torch.bfloat16),
    ],
)
def test_kernels_compile_for_hopper(compiled, monkeypatch, tmp_path, page, dim, batch, dtype):
    from hopper import SHARED_MEMORY, spilled_bytes

    from lycheedecode.ops import kernel_common as common
    from lycheedecode.ops import operators as kernels
    from lycheedecode.ops.complete.triton import write_means

    monkeypatch.setattr(common, "has_pdl", lambda device: 1)
    pages = 1024 // page
    cache = torch.empty(pages, 8, page, dim).to(dtype)
    kv = KV(cache, cache, numbers([1000] * batch), None, torch.zeros(batch, pages, dtype=torch.int32))
    means = torch.empty(2, pages, 8, max(page // 128, 1), dim, dtype=torch.bfloat16)
    query, rows = torch.empty(batch, 32, dim, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    out = Selections.allocate(8, batch, 128, "cpu", 8)
    scales = (torch.ones(8), torch.ones(8)) if dtype == torch.float8_e4m3fn else None
    completion = Completion(*means, 128, (1.0,) * 8)
    kernels.attend_blocks(query, kv, out, rows, 32, 0.1, completion=completion, scales=scales)
    write_means(kv, 128, *means, numbers([0] * batch), 3)
    if scales is None:
        for form in ("float8", "int4"):
            copy = SmallKeys.allocate(form, (pages, 1, page), dim, "cpu")
            kernels.scan_select(query, kv, (1,), HybridConfig(), 0.1, out.rows(1, 1), copy)
    assert len(compiled) == (2 if scales else 8)
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata.name
        assert spilled_bytes(kernel, tmp_path) <= 8, kernel.metadata.name
