"""All kernels together: compiled, refused, on large shapes, in a CUDA graph."""

import pytest
import torch
from kernel_cases import DEVICE, GPU, SCALE, as_sets, close, kernels, make_cache, make_query, step

from lycheedecode import HybridConfig
from lycheedecode.bench.verify import check_same_blocks
from lycheedecode.ops import KV, Selections, Shares, reference
from lycheedecode.ops.dispatch import kernel_obstacle

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf


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


def test_shares_pass_through_the_compiler():
    kv, config = make_cache([90, 33], slots=96), HybridConfig(block_size=8, budget_tokens=64, recent_tokens=8)
    query, shares = make_query(kv, 2), Shares.of_factors((0, 1, 1), (0.6, 0.5, 1.5), 8, 4)

    def select(query, kv, out):
        kernels.scan_select(query, kv, (0, 1), config, SCALE, out, shares=shares)
        return out.counts + 0

    expected, out = (Selections.allocate(3, 2, 12, DEVICE) for _ in range(2))
    compiled = torch.compile(select, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    assert torch.equal(compiled(query, kv, out), select(query, kv, expected))
    assert as_sets(out) == as_sets(expected)
    assert out.counts.tolist() == [[5, 5], [4, 5], [12, 5]]


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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_replayed_as_a_cuda_graph():
    """One graph serves every length: what it reads is in the tensors."""
    kv = make_cache([3000, 3000], heads=8, dim=128, dtype=torch.bfloat16)
    kv = kv._replace(lengths=torch.tensor([100, 100], dtype=torch.int32, device=DEVICE))
    config = HybridConfig(block_size=8, budget_tokens=512)
    query, rows = make_query(kv, 4), torch.tensor([0, 1, 2] * 2 + [1, 2], device=DEVICE)
    selections = Selections.allocate(3, 2, 64, DEVICE)
    step(query, kv, config, selections, rows)
    shares, uneven = Shares.of_factors((0, 1, 1), (0.25, 0.125, 4), 64, 4), Selections.allocate(3, 2, 256, DEVICE)
    kernels.scan_select(query, kv, (2, 3), config, SCALE, uneven, shares=shares)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, _ = step(query, kv, config, selections, rows)
        kernels.scan_select(query, kv, (2, 3), config, SCALE, uneven, shares=shares)
    for lengths in ([1, 3000], [0, 17], [2999, 512]):
        kv.lengths.copy_(torch.tensor(lengths))
        query.normal_()
        graph.replay()
        replayed, sets = result.clone(), as_sets(selections)
        expected, _ = step(query, kv, config, selections, rows)
        assert torch.equal(replayed, expected)
        assert sets == as_sets(selections)
        expected = Selections.allocate(3, 2, 256, DEVICE)
        kernels.scan_select(query, kv, (2, 3), config, SCALE, expected, shares=shares)
        assert as_sets(uneven) == as_sets(expected)
