"""Kernels of completion against the definition; on a CPU `test_interpreter.py` runs the kernels."""

import os
from math import nan

import pytest
import torch
from completing import CHUNK, DEVICE, SCALE, make_cache, make_selections, naive, paged, poison, room_for_means
from covering import covering

from lycheedecode import HybridConfig
from lycheedecode.ops import Completion, Selections, reference

RUNS_KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(not RUNS_KERNELS, reason="Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")
# The interpreter reads the bits of a bfloat16 as an integer when it multiplies matrices.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LAYOUTS = {
    "plain": {"lengths": [163, 163]},
    "whole chunks": {"lengths": [96, 96]},
    "lengths": {"lengths": [83, 40], "slots": 90},
    "left padding": {"lengths": [20, 83], "starts": [63, 0]},
    "odd dim": {"lengths": [63, 17], "starts": [0, 5], "dim": 80},
    "wide": {"lengths": [40, 90], "dim": 256},
    "short ones": {"lengths": [0, 33, 3], "dim": 96},
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf


def of(layout, **changes):
    return make_cache(**{"dim": 64, "device": DEVICE, **layout, **changes})


def close(result, expected, dtype):
    torch.testing.assert_close(result.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@runs_kernels
@pytest.mark.parametrize(
    ("layout", "page", "some"),
    covering(LAYOUTS, [0, 8, 64], [(None, None), (2, None), (None, 3), (2, 20)]),
    ids=str,
)
def test_means(layout, page, some):
    """All of them, new ones only, and where the last tokens are still to come."""
    from lycheedecode.ops.complete.triton import write_means

    (first, missing), kv = some, of(LAYOUTS[layout], dtype=torch.float16)
    kv = paged(kv, page) if page else kv
    known = None if first is None else torch.full((kv.batch,), first, dtype=torch.int32, device=DEVICE)
    written = None if missing is None else (kv.token_counts() - missing).clamp(min=0).int()
    found, right = room_for_means(kv), room_for_means(kv)
    for function, out in ((write_means, found), (reference.write_means, right)):
        function(kv, CHUNK, *out, known, 4, written)
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3, equal_nan=True)


@runs_kernels
@pytest.mark.parametrize(("layout", "dtype", "page"), covering(LAYOUTS, DTYPES, [0, 8, 32]), ids=str)
def test_attention(layout, dtype, page):
    """Whatever is neither selected nor a mean of a complete chunk is NaN."""
    from lycheedecode.ops.attend.triton_blocks import attend_blocks

    plain = of(LAYOUTS[layout], dtype=dtype)
    query = torch.randn(plain.batch, 6, plain.keys.shape[3], device=DEVICE).to(dtype)
    rows, factors = torch.tensor([2, 0], device=DEVICE), (1.0, 0.3)
    selections = make_selections(plain, 3, 9)
    expected = naive(query, plain, selections, rows, (0, 1), factors)
    kv = paged(plain, page) if page else plain
    means = room_for_means(kv)
    reference.write_means(kv, CHUNK, *means, None, 99)
    poisoned = poison(plain, selections, rows, (0, 1))
    kv = paged(poisoned, page) if page else poisoned
    completion = Completion(*means, CHUNK, factors)
    close(attend_blocks(query, kv, selections, rows, 4, SCALE, completion=completion), expected, dtype)


@runs_kernels
@pytest.mark.parametrize(
    ("group", "splits", "sizes"), covering([1, 4, 20], [1, 3, 8], [(1, 16), (8, 128), (64, 64)]), ids=str
)
def test_groups_splits_and_sizes(group, splits, sizes):
    from lycheedecode.ops.attend.triton_blocks import attend_blocks
    from lycheedecode.ops.kernel_common import Tuning

    (block, chunk), kv = sizes, of({"lengths": [260, 31, 0, 129], "slots": 262})
    query, rows = torch.randn(4, 2 * group, 64, device=DEVICE), torch.tensor([1, 1], device=DEVICE)
    selections = make_selections(kv, 2, 9, chunk, block)
    means = room_for_means(kv, chunk)
    reference.write_means(kv, chunk, *means, None, 99)
    completion = Completion(*means, chunk, (0.5, 2.0))
    result = attend_blocks(query, kv, selections, rows, block, SCALE, None, Tuning(splits, 32, 2, 2), None, completion)
    close(result, naive(query, kv, selections, rows, (0, 1), (0.5, 2.0), chunk, block), torch.float32)


@runs_kernels
def test_some_heads_and_some_factors():
    from lycheedecode.ops.attend.triton_blocks import attend_blocks

    kv = of({"lengths": [163, 70], "heads": 3})
    query, rows = torch.randn(2, 6, 64, device=DEVICE), torch.tensor([1, 0], device=DEVICE)
    selections = make_selections(kv, 2, 9)
    means = room_for_means(kv)
    reference.write_means(kv, CHUNK, *means, None, 99)
    for factors in ((0.0, 9.0, 0.7), (0.4, 0.0, 0.0), (0.0, 1.0, 0.0)):
        completion = Completion(*means, CHUNK, factors)
        result = attend_blocks(query, kv, selections, rows, 4, SCALE, (0, 2), completion=completion)
        close(result, naive(query, kv, selections, rows, (0, 2), factors), torch.float32)


@runs_kernels
def test_everything_selected_is_as_without():
    from lycheedecode.ops.attend.triton_blocks import attend_blocks

    kv = of({"lengths": [163, 36]})
    selections = make_selections(kv, 1, 1)
    selections = Selections.allocate(1, 2, 41, DEVICE, 10)
    selections.blocks[0, 0] = torch.arange(41)
    selections.blocks[0, 1, :9] = torch.arange(9)
    selections.counts[:] = torch.tensor([41, 9])
    selections.count_taken(4)
    query, rows = torch.randn(2, 6, 64, device=DEVICE), torch.tensor([0, 0], device=DEVICE)
    completion = Completion(*room_for_means(kv), CHUNK, (1.0, 1.0))  # NaN, which nobody may read
    whole = attend_blocks(query, kv, selections, rows, 4, SCALE, completion=completion)
    assert torch.equal(whole, attend_blocks(query, kv, selections, rows, 4, SCALE))


STRATEGIES = {
    "top_k": {"budget_tokens": 96},
    "ratio": {"budget_ratio": 0.3},
    "top_p": {"selection": "top_p", "top_p": 0.7},
    "threshold": {"selection": "threshold", "threshold": 0.01},
    "ahead": {"budget_tokens": 128, "refresh_every": 12},
}


@runs_kernels
@pytest.mark.parametrize(("strategy", "chunk", "held"), covering(STRATEGIES, [8, 32, 1024], [True, False]))
def test_selection_counts_what_it_takes(strategy, chunk, held, monkeypatch):
    """Rows that are held and that are read again; chunks of one block, of several, of more than a vector of keys."""
    from lycheedecode.ops import KV
    from lycheedecode.ops.kernel_common import Tuning
    from lycheedecode.ops.select import triton as select

    if not held:
        monkeypatch.setattr(select, "IN_REGISTERS", 1)
        monkeypatch.setattr(select, "_READ_AGAIN", 2)
    lengths, slots = [1000, 333, 0, 5, 40, 129], 1003
    config = HybridConfig(
        **{"block_size": 8, "sink_tokens": 10, "recent_tokens": 9, **STRATEGIES[strategy]}, completion_chunk=chunk
    )
    scores = torch.rand(1, 6, 126, device=DEVICE)
    cache = torch.empty(6, 1, slots, 16, device=DEVICE)
    kv = KV(cache, cache, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    capacity = config.capacity_blocks(-(-(slots + config.refresh_every - 1) // 8))
    out = Selections.allocate(1, 6, capacity, DEVICE, max(slots // chunk, 1))
    out.taken.fill_(77)
    select.select_blocks(scores, kv, select.Rule.of(config), out, Tuning(1, 32, 1, 1))
    found = out.taken.clone()
    out.count_taken(chunk // 8)
    assert torch.equal(found, out.taken)


@runs_kernels
def test_compiled_without_graph_breaks():
    from lycheedecode.ops import operators as kernels

    kv = of({"lengths": [90, 70], "slots": 96})
    config = HybridConfig(block_size=4, budget_tokens=32, recent_tokens=8, completion_chunk=CHUNK)
    query, rows = torch.randn(2, 6, 64, device=DEVICE), torch.tensor([0, 0], device=DEVICE)
    means = room_for_means(kv)
    reference.write_means(kv, CHUNK, *means, None, 99)
    completion = Completion(*means, CHUNK, (1.0, 0.5))

    def step(query, selections):
        kernels.scan_select(query, kv, (1,), config, SCALE, selections)
        return kernels.attend_blocks(query + 0, kv, selections, rows, 4, SCALE, completion=completion)

    expected, out = (Selections.allocate(1, 2, 8, DEVICE, 6) for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(query, out), step(query, expected))
        assert torch.equal(out.taken, expected.taken)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 16])
def test_large_and_replayed_as_a_cuda_graph(page):
    """A 128K context as the engine has it; one graph serves every length."""
    from lycheedecode import ops

    kv = make_cache([131_000, 131_000], heads=8, dim=128, dtype=torch.bfloat16, device=DEVICE)
    lengths = torch.tensor([131_000, 131_000], dtype=torch.int32, device=DEVICE)
    kv = kv._replace(lengths=lengths)
    if page:
        kv = paged(kv._replace(keys=kv.keys[:, :2], values=kv.values[:, :2]), page)
    heads = kv.keys.shape[1]
    means = room_for_means(kv, 128)
    ops.write_means(kv, 128, *means)
    right = torch.full_like(means, nan)
    reference.write_means(kv, 128, *right, None, 2000)
    torch.testing.assert_close(means, right, rtol=1e-2, atol=1e-3, equal_nan=True)
    config, query = HybridConfig(), torch.randn(2, 4 * heads, 128, device=DEVICE).bfloat16()
    rows = torch.tensor([0, 1] * (heads // 2), device=DEVICE)
    completion = Completion(*means, 128, (1.0, 0.5) * (heads // 2))
    selections = Selections.allocate(2, 2, 128, DEVICE, 1023)

    def step():
        ops.scan_select(query, kv, (0, 1), config, SCALE, selections)
        return ops.attend_blocks(query, kv, selections, rows, 32, SCALE, completion=completion)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for now in ([131_000, 5_000], [129, 70_001], [0, 4096], [131_000, 131_000]):
        kv.lengths.copy_(torch.tensor(now))
        query.normal_()
        graph.replay()
        found = result.clone()
        expected = reference.attend_blocks(query, kv, selections, rows, 32, SCALE, completion=completion)
        close(found, expected, torch.bfloat16)
        without = ops.attend_blocks(query, kv, selections, rows, 32, SCALE)
        assert torch.equal(found, without) == (max(now) <= 4096)
