"""Bytes are counted exactly; on a CPU `test_interpreter.py` runs the kernels."""

import os

import pytest
import torch

from lycheedecode import ops
from lycheedecode.ops import Selections, reference
from lycheedecode.ops.count import Means

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(not RUNS_KERNELS, reason="Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")
BLOCK = 4


def make_selections(rows, lengths, capacity, lookahead=0):
    """Random blocks in no order, as many as fit; with a lookahead blocks that hold nothing yet are among them."""
    out = Selections.allocate(rows, len(lengths), capacity, DEVICE)
    for b, length in enumerate(lengths):
        exist = -(-(length + lookahead) // BLOCK) if length else 0
        for r in range(rows):
            chosen = torch.randperm(exist)[: min(exist, capacity - r % 2)].int()
            out.blocks[r, b, : len(chosen)] = chosen.to(DEVICE)
            out.counts[r, b] = len(chosen)
    return out


@runs_kernels
@pytest.mark.parametrize("lookahead", [0, 9])
@pytest.mark.parametrize(("capacity", "lengths"), [(5, [50, 0, 19, 1]), (40, [163, 40]), (4200, [20001])], ids=str)
def test_the_kernel_counts_what_the_definition_does(capacity, lengths, lookahead):
    from lycheedecode.ops.count.triton import count_bytes

    selections = make_selections(3, lengths, capacity, lookahead)
    whole_up_to = capacity * BLOCK - lookahead
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    costs = torch.tensor([256.0, 2.0**33 + 1, 0.0, 512 * 7 + 0.5], dtype=torch.float64, device=DEVICE)
    total = torch.arange(len(lengths), dtype=torch.float64, device=DEVICE) + 2.0**50
    expected = total.clone()
    for means in (None, Means((2, 0, 1), 16, 36.5)):
        reference.count_bytes(expected, lengths, selections, costs, BLOCK, whole_up_to, means)
        count_bytes(total, lengths, selections, costs, BLOCK, whole_up_to, means)
    assert torch.equal(total, expected)


@runs_kernels
def test_some_sequences_of_larger_buffers():
    """As in vLLM, whose selections and totals have room for more rows than a step has."""
    from lycheedecode.ops.count.triton import count_bytes

    whole = make_selections(2, [30, 21, 17], 5)
    some = Selections(whole.blocks[:, :2], whole.counts[:, :2])
    lengths = torch.tensor([30, 21], dtype=torch.int32, device=DEVICE)
    costs = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64, device=DEVICE)
    total, expected = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    count_bytes(total[:2], lengths, some, costs, BLOCK, 21)
    reference.count_bytes(expected[:2], lengths, some, costs, BLOCK, 21)
    assert torch.equal(total, expected)
    assert total[2] == 0


@pytest.mark.gpu
def test_a_graph_repeats_it():
    selections, lengths = make_selections(2, [30], 5), torch.ones(1, dtype=torch.int32, device=DEVICE)
    total, costs = torch.zeros(1, dtype=torch.float64, device=DEVICE), (3.0, 5.0, 7.0)
    ops.count_bytes(total, lengths, selections, costs, BLOCK)
    expected, graph = total.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.count_bytes(total, lengths, selections, costs, BLOCK)
    for length in (30, 30, 31):
        lengths.fill_(length)
        graph.replay()
        reference.count_bytes(expected, lengths, selections, torch.tensor(costs, device=DEVICE).double(), BLOCK, 0)
    assert torch.equal(total, expected)


def test_the_definition():
    selections = Selections.allocate(2, 3, 3, DEVICE)
    selections.blocks[0, 0] = torch.tensor([2, 0, 3])  # of 10 tokens: 2, 4 and, ahead of them, none
    selections.blocks[1, 0, :1] = 1
    selections.blocks[:, 1, :2] = torch.tensor([0, 1])  # 5 tokens
    lengths = torch.tensor([10, 5, 0], dtype=torch.int32, device=DEVICE)
    total = torch.ones(3, dtype=torch.float64, device=DEVICE)
    ops.count_bytes(total, lengths, selections, (1.0, 10.0, 100.0), BLOCK, whole_up_to=5)
    assert total.tolist() == [1 + 6 + 40 + 1000, 1 + 5 + 50, 1]


def test_costs_that_do_not_fit_are_refused():
    selections, lengths = Selections.allocate(2, 1, 3, DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="costs must be"):
        ops.count_bytes(torch.zeros(1, dtype=torch.float64), lengths, selections, (1.0, 2.0), BLOCK)


@pytest.mark.parametrize("pdl", [0, 1])
@pytest.mark.parametrize("capacity", [1, 128, 32768])
def test_it_compiles_for_hopper(compiled, capacity, pdl, tmp_path, monkeypatch):
    from hopper import spilled_bytes

    from lycheedecode.ops import kernel_common as common
    from lycheedecode.ops.count import triton as kernels

    monkeypatch.setattr(common, "has_pdl", lambda device: pdl)
    selections, lengths = Selections.allocate(16, 2, capacity, "cpu"), torch.zeros(2, dtype=torch.int32)
    total, costs = torch.zeros(2, dtype=torch.float64), torch.zeros(17, dtype=torch.float64)
    means = Means((1,) * 16, 128, 516.0) if capacity == 128 else None
    kernels.count_bytes(total, lengths, selections, costs, 32, 32 * capacity, means)
    [kernel] = compiled
    assert spilled_bytes(kernel, tmp_path) == 0
    ptx = kernel.asm["ptx"]
    assert ptx.count("relaxed.add.f64") == 1
    assert ("griddepcontrol.launch_dependents" in ptx) == bool(pdl)
    if pdl:  # the costs, which no kernel writes
        assert ptx[: ptx.index("griddepcontrol.wait")].count("ld.global") == 1
