"""What servers add to the operations: budgets of sequences, sinks of heads, caches in 8 bits.

References against plain definitions, kernels against references; on a CPU `test_interpreter.py` runs the
kernels.
"""

import os

import pytest
import torch

from lycheedecode import HybridConfig, ops
from lycheedecode.ops import EVERYTHING, KV, Selections, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(not RUNS_KERNELS, reason="Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf

HEADS, GROUP, DIM, SCALE = 2, 3, 32, 0.3
LENGTHS, LIMITS = [70, 33, 0, 61, 90], [5, EVERYTHING, 3, 16, EVERYTHING]
CONFIGS = {
    "top_k": {"budget_tokens": 32},
    "ratio": {"budget_ratio": 0.5},
    "top_p": {"selection": "top_p", "top_p": 0.9},
    "threshold": {"selection": "threshold", "threshold": 0.02},
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def config_of(given):
    return HybridConfig(block_size=4, sink_tokens=4, recent_tokens=4, completion_chunk=8, **given)


def numbers(ints):
    return torch.tensor(ints, dtype=torch.int32, device=DEVICE)


def make(page=0, dtype=torch.float32, lengths=LENGTHS):
    batch = len(lengths)
    query = torch.randn(batch, HEADS * GROUP, DIM, device=DEVICE)
    pages = 96 // page if page else 1
    shape = (batch * pages, HEADS, page or 96, DIM)
    keys, values = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    table = torch.randperm(batch * pages, device=DEVICE).view(batch, pages).int() if page else None
    return query, KV(keys, values, numbers(lengths), None, table)


def room(batch=5, capacity=8, taken=True):
    blocks, counts = torch.full((HEADS, batch, capacity), 77, device=DEVICE), torch.full((HEADS, batch), 77)
    taken = torch.full((HEADS, batch, 12), 77, dtype=torch.int32, device=DEVICE) if taken else None
    return Selections(blocks.int(), counts.int().to(DEVICE), taken)


def sets(selections):
    return [[sorted(blocks[blocks >= 0].tolist()) for blocks in row] for row in selections.blocks]


SCALES = torch.tensor([0.5, 2.0], device=DEVICE), torch.tensor([3.0, 0.25], device=DEVICE)
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 2.0, -20.0], device=DEVICE)


# ---------------------------------------------------------------------- the definitions


@configs
def test_a_sequence_with_a_limit_has_what_it_would_have_alone(config):
    """With a buffer of that many blocks; one that gets everything has its whole context."""
    config, (query, kv) = config_of(config), make(page=8)
    out = room()
    ops.scan_select(query, kv, (0, 1), config, SCALE, out, limits=numbers(LIMITS))
    for b, limit in enumerate(LIMITS):
        if limit == EVERYTHING:
            assert (out.counts[:, b] == EVERYTHING).all()
            assert (out.blocks[:, b] == -1).all()
            assert (out.taken[:, b, : (LENGTHS[b] - 1) // 8] == 2).all()
            continue
        own = room(1, min(limit, 8))
        alone = kv._replace(lengths=kv.lengths[b : b + 1], page_table=kv.page_table[b : b + 1])
        ops.scan_select(query[b : b + 1], alone, (0, 1), config, SCALE, own)
        assert [row[b] for row in sets(out)] == [row[0] for row in sets(own)]
        assert torch.equal(out.counts[:, b], own.counts[:, 0])


def test_everything_is_full_attention():
    query, kv = make(page=8)
    rows = torch.tensor([1, 0], device=DEVICE)
    out = room()
    ops.scan_select(query, kv, (0, 1), config_of(CONFIGS["top_k"]), SCALE, out, limits=numbers([EVERYTHING] * 5))
    torch.testing.assert_close(ops.attend_blocks(query, kv, out, rows, 4, SCALE), ops.attend(query, kv, SCALE))


def test_bytes_of_a_mixed_batch():
    """Who has everything reads all and is not scanned; who has less than its blocks is."""
    selections = Selections(numbers([[[0, 3, -1], [-1, -1, -1], [0, 1, 2]]]), numbers([[2, EVERYTHING, 3]]))
    total = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    limits = numbers([2, EVERYTHING, 3])
    ops.count_bytes(total, numbers([15, 40, 12]), selections, (10.0, 1.0), 4, 16, None, limits)
    assert total.tolist() == [7 * 10 + 15, 400, 120]


@pytest.mark.parametrize("page", [0, 8])
def test_sinks_take_their_part_of_the_softmax(page):
    query, kv = make(page, lengths=[40, 9])
    plain = ops.attend(query, kv, SCALE, sinks=SINKS)
    for b, length in enumerate([40, 9]):
        keys, values = (reference_tokens(cache, kv, b)[:, :length] for cache in (kv.keys, kv.values))
        logits = (query[b].view(HEADS, GROUP, DIM) * SCALE) @ keys.mT  # [Hkv, G, S]
        weights = torch.cat((logits, SINKS.view(HEADS, GROUP, 1)), -1).softmax(-1)[..., :-1]
        torch.testing.assert_close(plain[b].view(HEADS, GROUP, DIM), weights @ values)
        scores = ops.scan_blocks(query, kv, (1,), 8, SCALE, sinks=SINKS)[0, b]
        mass = torch.nn.functional.pad(weights[1].mean(0), (0, 96 - length)).view(-1, 8).sum(-1)
        torch.testing.assert_close(scores[: len(mass)], mass[: len(scores)])


def reference_tokens(cache, kv, b):
    """`[Hkv, S, D]` of one sequence."""
    if kv.page_table is None:
        return cache[b]
    return cache[kv.page_table[b].long()].transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("page", [0, 8])
def test_a_cache_in_8_bits_is_what_its_numbers_stand_for(page):
    query, kv = make(page, torch.float8_e4m3fn)
    keys, values = ((cache.float() * scale[:, None, None]) for cache, scale in zip(kv[:2], SCALES, strict=True))
    wide, selections = kv._replace(keys=keys, values=values), room()
    config, rows = config_of(CONFIGS["top_k"]), torch.tensor([1, 0], device=DEVICE)
    ops.scan_select(query, kv, (0, 1), config, SCALE, selections, scales=SCALES)
    own = room()
    ops.scan_select(query, wide, (0, 1), config, SCALE, own)
    assert sets(selections) == sets(own)
    close = {"rtol": 1e-4, "atol": 1e-4}
    sparse = ops.attend_blocks(query, kv, selections, rows, 4, SCALE, scales=SCALES)
    torch.testing.assert_close(sparse, ops.attend_blocks(query, wide, own, rows, 4, SCALE), **close)
    torch.testing.assert_close(ops.attend(query, kv, SCALE, scales=SCALES), ops.attend(query, wide, SCALE), **close)


def test_what_does_not_fit_is_refused():
    query, kv = make()
    rows = torch.tensor([0, 0], device=DEVICE)
    with pytest.raises(ValueError, match=r"sinks must be float32 \[6\]"):
        ops.attend(query, kv, SCALE, sinks=SINKS[:3])
    with pytest.raises(ValueError, match="scales belong to keys and values in float8_e4m3fn"):
        ops.attend_blocks(query, kv, room(), rows, 4, SCALE, scales=SCALES)
    query, kv = make(dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="must share one float dtype"):
        ops.attend(query, kv, SCALE)
    with pytest.raises(ValueError, match=r"two scales, float32 \[2\] each"):
        ops.attend(query, kv, SCALE, scales=(SCALES[0][:1], SCALES[1]))


# ---------------------------------------------------------------------- the kernels


@runs_kernels
@pytest.mark.parametrize(
    ("config", "page", "has_sinks"),
    [("top_k", 8, True), ("ratio", 0, True), ("top_p", 8, False), ("threshold", 0, False), ("threshold", 8, True)],
)
def test_scan_and_select(config, page, has_sinks):
    """Every strategy, and every pair of page and sinks."""
    from lycheedecode.ops import operators as kernels

    config, (query, kv), sinks = config_of(CONFIGS[config]), make(page), SINKS if has_sinks else None
    found, right = room(), room()
    kernels.scan_select(query, kv, (0, 1), config, SCALE, found, limits=numbers(LIMITS), sinks=sinks)
    scores = reference.scan_blocks(query, kv, (0, 1), 4, SCALE, sinks=sinks)
    reference.select_blocks(scores, kv, config, right, numbers(LIMITS))
    assert sets(found) == sets(right)
    assert torch.equal(found.counts, right.counts)
    for b, length in enumerate(LENGTHS):
        complete = max(length - 1, 0) // 8
        assert torch.equal(found.taken[:, b, :complete], right.taken[:, b, :complete])


@runs_kernels
@pytest.mark.parametrize(
    ("case", "page", "splits"), [("sinks", 0, 4), ("8 bits", 8, 4), ("both", 0, 1), ("both", 8, 4)]
)
def test_attention(case, page, splits):
    from lycheedecode.ops.attend import triton_blocks, triton_dense
    from lycheedecode.ops.kernel_common import Tuning

    query, kv = make(page, torch.float32 if case == "sinks" else torch.float8_e4m3fn)
    query = query.half() if case == "8 bits" else query
    more = {"sinks": None if case == "8 bits" else SINKS, "scales": None if case == "sinks" else SCALES}
    rows, tuning, selections = torch.tensor([1, 0], device=DEVICE), Tuning(splits, 16, 2, 2), room()
    scores = torch.rand(HEADS, len(LENGTHS), 24, device=DEVICE)
    reference.select_blocks(scores, kv, config_of(CONFIGS["top_k"]), selections, numbers(LIMITS))
    found = triton_blocks.attend_blocks(query, kv, selections, rows, 4, SCALE, None, tuning, **more)
    close = {"rtol": 4e-3, "atol": 4e-3} if case == "8 bits" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, reference.attend_blocks(query, kv, selections, rows, 4, SCALE, **more), **close)
    dense = triton_dense.attend(query, kv, SCALE, None, tuning, **more)
    torch.testing.assert_close(dense, reference.attend(query, kv, SCALE, **more), **close)


@runs_kernels
def test_a_scan_of_keys_in_8_bits():
    from lycheedecode.ops.scan import triton as scan

    query, kv = make(8, torch.float8_e4m3fn)
    found = scan.scan_blocks(query, kv, (1, 0), 4, SCALE, sinks=SINKS, scales=SCALES)
    right = reference.scan_blocks(query, kv, (1, 0), 4, SCALE, sinks=SINKS, scales=SCALES)
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)


@runs_kernels
def test_bytes():
    from lycheedecode.ops.count import reference as definition
    from lycheedecode.ops.count import triton
    from lycheedecode.ops.types import constant

    selections, lengths = room(taken=False), numbers(LENGTHS)
    scores = torch.rand(HEADS, len(LENGTHS), 24, device=DEVICE)
    _, kv = make()
    reference.select_blocks(scores, kv, config_of(CONFIGS["top_k"]), selections, numbers(LIMITS))
    costs, totals = constant((3.0, 5.0, 7.0), torch.float64, lengths.device), []
    for module in (triton, definition):
        totals.append(torch.zeros(len(LENGTHS), dtype=torch.float64, device=DEVICE))
        module.count_bytes(totals[-1], lengths, selections, costs, 4, 32, None, numbers(LIMITS))
    assert totals[0].tolist() == totals[1].tolist()


@pytest.mark.skipif(RUNS_KERNELS, reason="Where kernels run, they compile.")
@pytest.mark.parametrize(("case", "page"), [("16 bits", 0), ("8 bits", 16)])
def test_kernels_compile_for_hopper(compiled, monkeypatch, case, page):
    """All that servers ask for at once, with bfloat16 queries."""
    from lycheedecode.ops import operators as kernels
    from lycheedecode.ops.count import triton as count
    from lycheedecode.ops.types import constant

    query, kv = make(page, torch.float8_e4m3fn if case == "8 bits" else torch.bfloat16)
    query, config, out = query.bfloat16(), config_of(CONFIGS["top_k"]), room(taken=False)
    more = {"sinks": SINKS, "scales": SCALES if case == "8 bits" else None}
    rows = torch.tensor([1, 0])
    kernels.scan_select(query, kv, (1,), config, SCALE, out.rows(0, 1), limits=numbers(LIMITS), **more)
    kernels.attend_blocks(query, kv, out, rows, 4, SCALE, **more)
    kernels.attend(query, kv, SCALE, **more)
    total = torch.zeros(5, dtype=torch.float64)
    costs = constant((3.0, 5.0, 7.0), torch.float64, total.device)
    count.count_bytes(total, numbers(LENGTHS), out, costs, 4, 32, None, numbers(LIMITS))
    assert len(compiled) == 6
