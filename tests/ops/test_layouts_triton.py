"""Operations give the same bits wherever a cache keeps its pages, heads and tokens.

vLLM has a layer's cache as `[P, Hkv, page, 2 D]`, each key before its value, in any order of strides. Its names for
them have the layers `L` among the dimensions: pages `B`, heads `H`, tokens `N`, and `C`, the 2 D numbers of a token.
"""

from functools import cache
from math import nan

import pytest
import torch
from covering import covering
from kernel_cases import DEVICE, SCALE, kernels

from lycheedecode import HybridConfig
from lycheedecode.ops import KV, Completion, Selections, SmallKeys, reference
from lycheedecode.ops.complete import triton as complete
from lycheedecode.ops.scan import triton as scan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf

ORDERS = ["LBHNC", "LBNHC", "LHBNC", "BHLNC"]
"""The first two are what vLLM also calls HND and NHD."""

SLOTS, HEADS, GROUP, DIM, CHUNK = 128, 3, 2, 32, 32
CONFIG = HybridConfig(budget_tokens=32, block_size=8, sink_tokens=8, recent_tokens=8, completion_chunk=CHUNK)
SCALES = torch.tensor([0.5, 2.0, 1.5], device=DEVICE), torch.tensor([3.0, 0.25, 0.75], device=DEVICE)
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 2.0, -20.0], device=DEVICE)


@cache
def plain(page, bits):
    """Two sequences, their pages out of order; and what operations make of them."""
    shape = (2 * SLOTS // page, HEADS, page, DIM)
    # In 16 bits, too, keys are such that copies in 8 bits round nothing: the interpreter does not do it as a GPU does.
    keys, values = (torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    if bits == 16:
        keys, values = keys.half(), torch.randn(shape, device=DEVICE).half()
    table = torch.randperm(2 * SLOTS // page, device=DEVICE).view(2, -1).int()
    kv = KV(keys, values, torch.tensor([90, 33], dtype=torch.int32, device=DEVICE), None, table)
    return kv, everything(kv, kernels, complete.write_means), everything(kv, reference, reference.write_means)


def laid_out(kv, order):
    """The same cache, the second of two layers; the other one is NaN."""
    sizes = {"L": 2, "B": len(kv.keys), "H": HEADS, "N": kv.keys.shape[2], "C": 2 * DIM}
    store = torch.full([sizes[name] for name in order], nan, device=DEVICE).to(kv.keys.dtype)
    own = store.permute([order.index(name) for name in "LBHNC"])[1]
    keys, values = own.split(DIM, dim=-1)  # as integrations.vllm.cuda has it
    keys.copy_(kv.keys)
    values.copy_(kv.values)
    return kv._replace(keys=keys, values=values)


def everything(kv, ops, write_means):
    """What all operations over a server's cache return and write."""
    torch.manual_seed(1)
    is_small = kv.keys.itemsize == 1
    query, tokens = (
        torch.randn(2, *shape, device=DEVICE).half() for shape in ((HEADS * GROUP, DIM), (4, HEADS * GROUP, DIM))
    )
    more = {"scales": SCALES if is_small else None}
    rows, heads, found = torch.tensor([1, 0, 0], device=DEVICE), (2, 0), {}
    found["scan"] = ops.scan_blocks(query, kv, heads, 8, SCALE, sinks=SINKS, **more)
    for form in () if is_small else ("float8", "int4"):
        copy = SmallKeys.allocate(form, (len(kv.keys), len(heads), kv.keys.shape[2]), DIM, DEVICE)
        reference.write_pages_to_copy(copy, kv.keys, heads, kv.page_table.flatten().long())
        found[form] = ops.scan_blocks(query, kv, heads, 8, SCALE, copy=copy)
        copy.numbers.view(torch.uint8).zero_()
        scan.scan(query, kv, heads, 8, SCALE, copy=copy, newest=1)
        found[f"newest in {form}"] = copy.numbers.view(torch.uint8)
    chosen = Selections.allocate(2, 2, 4, DEVICE, SLOTS // CHUNK)
    reference.select_blocks(found["scan"], kv, CONFIG, chosen)
    page = kv.keys.shape[2]
    found["means"] = means = torch.full((2, len(kv.keys), HEADS, -(-page // CHUNK), DIM), nan, device=DEVICE).half()
    write_means(kv, CHUNK, *means, None, SLOTS // CHUNK)
    completed = Completion(*means, CHUNK, (1.0, 0.5, 0.3))
    found["blocks"] = ops.attend_blocks(query, kv, chosen, rows, 8, SCALE, sinks=SINKS, **more)
    found["completed"] = ops.attend_blocks(query, kv, chosen, rows, 8, SCALE, completion=completed, **more)
    found["dense"] = ops.attend(query, kv, SCALE, sinks=SINKS, **more)
    found["verified"] = ops.attend_tokens(tokens, kv, SCALE, None, SCALES if is_small else None)
    return found


@pytest.mark.parametrize(("order", "page", "bits"), covering(ORDERS, [16, 64], [8, 16]))
def test_the_order_does_not_matter(order, page, bits):
    kv, with_kernels, with_pytorch = plain(page, bits)
    moved = laid_out(kv, order)
    assert moved.keys.stride() != kv.keys.stride()
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(everything(moved, kernels, complete.write_means), with_kernels, **exactly)
    torch.testing.assert_close(everything(moved, reference, reference.write_means), with_pytorch, **exactly)


@pytest.mark.parametrize("bits", [8, 16])
def test_kernels_agree_with_the_reference(bits):
    _, with_kernels, with_pytorch = plain(16, bits)
    torch.testing.assert_close(with_kernels, with_pytorch, rtol=4e-3, atol=4e-3, equal_nan=True)
