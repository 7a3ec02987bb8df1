"""The kernels of `select_blocks` and `scan_select` against the reference."""

from math import ceil, nan

import pytest
import torch
from kernel_cases import DEVICE, SCALE, as_sets, kernels, make_cache, make_query

from lycheedecode import HybridConfig
from lycheedecode.ops import EVERYTHING, KV, Selections, Shares, reference
from lycheedecode.ops.kernel_common import Tuning
from lycheedecode.ops.select import triton as select

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf


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


@pytest.mark.parametrize(
    ("name", "each", "levels"),
    [
        *((name, each, 4) for name in CONFIGS for each in (64, 1)),
        *((name, 64, levels) for name in ("top_k", "capped ratio", "top_p", "threshold") for levels in (1, 10**6)),
    ],
)
def test_select(name, levels, each, monkeypatch):
    """By a row that is held, and one that is read again; of scores that are many ties, nothing but ties, or none."""
    monkeypatch.setattr(select, "IN_REGISTERS", each)
    monkeypatch.setattr(select, "_READ_AGAIN", 1)
    lengths, slots = [1000, 333, 0, 5, 40], 1003
    config = HybridConfig(**{"block_size": 8, "sink_tokens": 10, "recent_tokens": 9, **CONFIGS[name]})
    scores = make_scores(1, lengths, slots, 8, levels)
    kv = KV(*[torch.empty(5, 1, slots, 16, device=DEVICE)] * 2, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    capacity = config.capacity_blocks(ceil((slots + config.refresh_every - 1) / 8))
    expected = Selections.allocate(1, 5, capacity, DEVICE)
    reference.select_blocks(scores, kv, config, expected)
    everything = Selections.allocate(3, 5, capacity, DEVICE)
    everything.blocks.fill_(7)
    out = everything.rows(1, 1)
    select.select_blocks(scores, kv, select.Rule.of(config), out, Tuning(1, 32, 1, 1))
    assert as_sets(out) == as_sets(expected)
    assert (everything.blocks[0] == 7).all()
    assert (everything.blocks[2] == 7).all()


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
    kv = make_cache([150, 77, 0], starts=[0, 73, 0])
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
        scores = make_scores(1, [8 * num_blocks, 4100, 0], 8 * num_blocks, 8, levels)
        lengths = torch.tensor([8 * num_blocks, 4100, 0], dtype=torch.int32, device=DEVICE)
        kv = KV(*[torch.empty(3, 1, 8 * num_blocks, 16, device=DEVICE)] * 2, lengths)
        expected, out = (Selections.allocate(1, 3, 12, DEVICE) for _ in range(2))
        reference.select_blocks(scores, kv, config, expected)
        select.select_blocks(scores, kv, select.Rule.of(config), out)
        assert as_sets(out) == as_sets(expected)


@pytest.mark.parametrize("wanted", [20, 36, 37, 200])  # of which 4 are forced: as many more as there are lanes, and one
@pytest.mark.parametrize("order", ["one lane", "all but one lane", "one of every lane", "ascending", "zeros"])
def test_select_wherever_the_best_are(order, wanted):
    """More blocks than lanes, and fewer; the search begins at what the best of every lane say."""
    scores = torch.rand(1000) * 1e-3
    if order == "one lane":
        scores[5::32] += 0.1
    elif order == "all but one lane":
        scores[torch.arange(1000) % 32 != 5] += 0.1
    elif order == "one of every lane":
        scores[32:64] += 0.1
    elif order == "ascending":
        scores = scores.sort().values
    else:
        scores[torch.rand(1000) < 0.99] = 0.0
    config = HybridConfig(block_size=8, budget_tokens=8 * wanted, sink_tokens=10, recent_tokens=9)
    lengths = torch.tensor([7997], dtype=torch.int32, device=DEVICE)
    kv = KV(*[torch.empty(1, 1, 8000, 16, device=DEVICE)] * 2, lengths)
    expected, out = (Selections.allocate(1, 1, wanted, DEVICE) for _ in range(2))
    scores = scores[None, None].to(DEVICE)
    reference.select_blocks(scores, kv, config, expected)
    select.select_blocks(scores, kv, select.Rule.of(config), out, Tuning(1, 32, 1, 1))
    assert as_sets(out) == as_sets(expected)


SHARES = Shares.of_factors(heads=(0, 0, 0, 2, 1), factors=(0.5, 4, 1, 0.6, 1.2), budget=10, least=5)
"""Rows of three heads: one head is read with three budgets, and the heads are not in order."""
SHARE_LIMITS = {"none": None, "some": [10, 4, EVERYTHING, 7, 10]}


@pytest.mark.parametrize("limits", SHARE_LIMITS.values(), ids=SHARE_LIMITS)
@pytest.mark.parametrize("refresh_every", [1, 12])
def test_select_by_shares(refresh_every, limits):
    lengths, slots = [1000, 333, 72, 79, 40], 1003
    config = HybridConfig(block_size=8, sink_tokens=10, recent_tokens=9, budget_tokens=80, refresh_every=refresh_every)
    scores = make_scores(3, lengths, slots, 8, 40)
    kv = KV(*[torch.empty(5, 1, slots, 16, device=DEVICE)] * 2, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    limits = None if limits is None else torch.tensor(limits, dtype=torch.int32, device=DEVICE)
    expected, out = (Selections.allocate(5, 5, 40, DEVICE, chunks=8) for _ in range(2))
    reference.select_blocks(scores, kv, config, expected, limits, SHARES)
    kernels.select_blocks(scores, kv, config, out, limits, SHARES)
    assert as_sets(out) == as_sets(expected)
    assert torch.equal(out.counts, expected.counts)
    assert torch.equal(out.taken, expected.taken)


def test_scan_select_by_shares():
    """A head is scanned once for all of its rows, and not where a sequence fits into the budget."""
    config = HybridConfig(block_size=8, sink_tokens=10, recent_tokens=9, budget_tokens=80)
    kv = make_cache([300, 177, 80], starts=[0, 23, 0])
    query = make_query(kv, 3)
    shares = Shares.of_factors((0, 1, 1), (0.5, 2, 0.6), 10, 5)
    expected, out = (Selections.allocate(3, 3, 20, DEVICE) for _ in range(2))
    reference.select_blocks(reference.scan_blocks(query, kv, (0, 1), 8, SCALE), kv, config, expected, None, shares)
    kv.keys[2] = nan
    kernels.scan_select(query, kv, (0, 1), config, SCALE, out, shares=shares)
    assert as_sets(out) == as_sets(expected)
    assert out.counts.tolist() == [[5, 5, 10], [20, 20, 10], [6, 6, 10]]
