"""Planning and fetching against plain bookkeeping, kernels against the reference; attention through places.

On a CPU `test_interpreter.py` runs the kernels.
"""

import os
from itertools import product
from math import nan

import pytest
import torch
from covering import covering

from lycheedecode.ops import KV, Completion, Selections, SmallKeys, attend_blocks, fetch, reference
from lycheedecode.ops.fetch import BlockMap, Tokens
from lycheedecode.ops.fetch import reference as definition

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(not RUNS_KERNELS, reason="Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf

ROWS, BATCH, BLOCKS, SLOTS, CAPACITY, TAIL, SIZE = 3, 2, 40, 9, 6, 2, 4
LAYERS, HEADS, DIM = 2, 3, 16
READERS = [(2, 1, 0, -1), (0, 0, 0, 1), (0, 1, 2, -1), (1, 0, 2, -1), (0, 1, 1, 0), (2, 0, 1, -1)]


@pytest.fixture(params=["reference", "kernels"])
def way(request):
    if request.param == "reference":
        return definition
    if not RUNS_KERNELS:
        pytest.skip("Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")
    from lycheedecode.ops.fetch import triton

    return triton


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def new_map(slots=SLOTS):
    return BlockMap.allocate(ROWS, BATCH, BLOCKS, slots, CAPACITY, DEVICE)


def selections(newest, seed):
    """Blocks up to each sequence's newest, which is always among them; sometimes fewer than there is room for."""
    generator, blocks = torch.Generator().manual_seed(seed), torch.full((ROWS, BATCH, CAPACITY), -1)
    for r in range(ROWS):
        for b, last in enumerate(newest):
            count = int(torch.randint(1, min(CAPACITY, last + 1) + 1, (), generator=generator))
            some = torch.randperm(last, generator=generator)[: count - 1]
            blocks[r, b, :count] = torch.cat((some, torch.tensor([last])))
    return blocks.int().to(DEVICE)


class Bookkeeping:
    """Least recently used, with dictionaries."""

    def __init__(self, slots):
        self.slots, self.held = slots, [[{} for _ in range(BATCH)] for _ in range(ROWS)]  # block: (slot, used)

    def plan(self, blocks, newest, clock):
        places, missing = [], []
        for r, row in enumerate(blocks.tolist()):
            for b, chosen in enumerate(row):
                held = self.held[r][b]
                stored = [n for n in chosen if 0 <= n <= newest[b] - TAIL]
                for n in stored:
                    if n in held:
                        held[n] = held[n][0], clock
                lacking = [n for n in stored if n not in held]
                order = sorted(
                    range(self.slots), key=lambda s: (max([u for t, u in held.values() if t == s] or [-1]), s)
                )
                for n, slot in zip(lacking, order, strict=False):
                    for other in [other for other, (taken, _) in held.items() if taken == slot]:
                        del held[other]
                    held[n] = slot, clock
                places.append([-1 if n < 0 else held[n][0] if n in held and n in stored else self.slots + n % TAIL
                               for n in chosen])  # fmt: skip
                missing.append(lacking)
        return places, missing


@pytest.mark.parametrize("slots", [6, 9, 16])
def test_plans_are_least_recently_used(way, slots):
    known, books = new_map(slots), Bookkeeping(slots)
    for clock in range(1, 25):
        newest = [10 + clock, 3 + clock // 2]
        blocks = selections(newest, clock)
        way.plan_fetch(blocks, known, ints(newest), ints([clock]), TAIL)
        places, missing = books.plan(blocks, newest, clock)
        assert known.places.flatten(0, 1).tolist() == places
        assert [[n for n in row if n >= 0] for row in known.missing.flatten(0, 1).tolist()] == missing
        assert known.misses.flatten().tolist() == [len(row) for row in missing]
        for held, slot_of, block_of in zip(
            [one for row in books.held for one in row],
            known.slot_of.flatten(0, 1).tolist(),
            known.block_of.flatten(0, 1).tolist(),
            strict=True,
        ):
            assert {n: slot for n, slot in enumerate(slot_of) if slot >= 0} == {
                n: slot for n, (slot, _) in held.items()
            }
            assert {n: slot for slot, n in enumerate(block_of) if n >= 0} == {n: slot for n, (slot, _) in held.items()}


def test_forgetting_blocks():
    known = new_map()
    definition.plan_fetch(selections([20, 30], 1), known, ints([20, 30]), ints([1]), TAIL)
    known.forget(torch.tensor([7, 12], device=DEVICE))
    assert (known.slot_of[:, 0, 7:] == -1).all()
    assert (known.slot_of[:, 1, 12:] == -1).all()
    assert (known.block_of[:, 0] < 7).all()
    assert (known.block_of[:, 1] < 12).all()
    assert ((known.used == -1) == (known.block_of == -1)).all()


def make_tokens(slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = LAYERS, BATCH, HEADS, slots, DIM
    made = [torch.randn(shape, generator=generator).to(torch.float16) for _ in range(2)]
    return Tokens(*(part.pin_memory() if DEVICE == "cuda" else part for part in made))


def empty_pool(slots=SLOTS):
    shape = LAYERS, BATCH, HEADS, (slots + TAIL) * SIZE, DIM
    return Tokens(*(torch.full(shape, nan, dtype=torch.float16, device=DEVICE) for _ in range(2)))


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("starts", [None, [0, 7]])
def test_missing_blocks_come_to_every_head_that_reads_them(way, starts, near, monkeypatch):
    """Two of them have their keys at hand: those in host memory are not read then. Beside the model, in pieces."""
    if way is not definition:
        monkeypatch.setattr(way, "LAUNCH", way.LAUNCH._replace(programs=5, warps=1, piece=16))
    source, known, pool = make_tokens(BLOCKS * SIZE + 8), new_map(), empty_pool()
    whole = Tokens(*(part.clone() for part in source))
    scanned, used = None, [(*reader[:3], -1) for reader in READERS]
    if near:
        used = READERS
        scanned = torch.full((2, BATCH, BLOCKS * SIZE + 20, DIM), nan, dtype=torch.float16, device=DEVICE)
        for _, layer, head, own in (reader for reader in READERS if reader[3] >= 0):
            scanned[own, :, : BLOCKS * SIZE + 8] = source.keys[layer, :, head].to(DEVICE)
            source.keys[layer, :, head] = nan
    starts, held = None if starts is None else ints(starts), set()
    for clock in range(1, 12):
        newest = [10 + clock, 3 + clock]
        way.plan_fetch(selections(newest, clock), known, ints(newest), ints([clock]), TAIL)
        for part, beside in ((used[:2], False), (used[2:], True)):
            way.fetch(source, pool, known, ints(part), scanned, starts, SIZE, beside)
        for (r, layer, head, _), b in product(READERS, range(BATCH)):
            for slot, block in enumerate(known.block_of[r, b].tolist()):
                if block < 0:
                    continue
                begin = block * SIZE + (0 if starts is None else int(starts[b]))
                held.add((layer, b, head, slot))
                for mine, right in zip(pool, whole, strict=True):
                    here = mine[layer, b, head, slot * SIZE : (slot + 1) * SIZE].cpu()
                    assert torch.equal(here, right[layer, b, head, begin : begin + SIZE])
    untouched = [(layer, b, head, slot) for layer in range(LAYERS) for b in range(BATCH) for head in range(HEADS)
                 for slot in range(SLOTS) if (layer, b, head, slot) not in held]  # fmt: skip
    for layer, b, head, slot in untouched:
        assert pool.keys[layer, b, head, slot * SIZE : (slot + 1) * SIZE].isnan().all()
    assert pool.values[..., SLOTS * SIZE :, :].isnan().all()


@pytest.mark.parametrize("starts", [None, [0, 7]])
@pytest.mark.parametrize(("begin", "end"), [(20, 20), (20, 23), (5, 13)])
def test_tails_go_back(way, begin, end, starts):
    target, pool = make_tokens(50), make_tokens((SLOTS + TAIL) * SIZE, 1)
    pool = Tokens(*(part.to(DEVICE) for part in pool))
    before = [part.clone() for part in target]
    way = fetch if begin == end else way
    way.write_back(pool, target, begin, end, None if starts is None else ints(starts), SLOTS * SIZE, TAIL * SIZE)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    for mine, whole, old in zip(pool, target, before, strict=True):
        for b in range(BATCH):
            for slot in range(50):
                token = slot - (starts[b] if starts else 0)
                is_new = begin <= slot < end and token >= 0
                right = mine[:, b, :, SLOTS * SIZE + token % (TAIL * SIZE)].cpu() if is_new else old[:, b, :, slot]
                assert torch.equal(whole[:, b, :, slot], right)


@pytest.mark.parametrize("form", ["cache", "float8", "int4"])
def test_newest_keys(way, form):
    query = torch.randn(BATCH, HEADS * 2, DIM, device=DEVICE).half()
    keys = torch.randn(BATCH, HEADS, 12, DIM, device=DEVICE).half() * 300
    if form == "cache":
        copy = SmallKeys(torch.zeros(2, BATCH, 30, DIM, device=DEVICE).half())
    else:
        copy = SmallKeys.allocate(form, (2, BATCH, 30), DIM, DEVICE)
    copy = copy.views(lambda part: part.transpose(0, 1))
    asking = way.newest_keys(query, keys, ints([3, 12]), ints([30, 17]), (2, 0), copy)
    assert torch.equal(asking, query.view(BATCH, HEADS, 2, DIM)[:, [2, 0]].flatten(1, 2))
    for b, (entry, slot) in enumerate(((2, 29), (11, 16))):
        right = copy.views(torch.zeros_like)
        right.write((b, slice(None), slot), keys[b, [2, 0], entry])
        for part, same in zip(copy, right, strict=True):
            assert part is None or torch.equal(part[b].view(torch.uint8), same[b].view(torch.uint8))


# ---------------------------------------------------------------------- attention through places


@pytest.mark.parametrize(
    ("lengths", "completed", "splits"), covering([(70, 33), (64, 1), (5, 0)], [False, True], [None, 1, 4]), ids=str
)
def test_places_change_nothing_but_where_it_reads(lengths, completed, splits):
    if splits and not RUNS_KERNELS:
        pytest.skip("Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(BATCH, HEADS, 72, DIM, generator=generator).to(DEVICE) for _ in range(2))
    query = torch.randn(BATCH, HEADS * 2, DIM, generator=generator).to(DEVICE)
    kv, rows = KV(keys, values, ints(lengths)), torch.tensor([2, 0, 2], device=DEVICE)
    chosen = Selections.allocate(ROWS, BATCH, CAPACITY, DEVICE, chunks=9)
    for b, length in enumerate(lengths):
        blocks = -(-length // SIZE)
        for r in range(ROWS):
            some = torch.randperm(blocks, generator=generator)[: CAPACITY - r].int().to(DEVICE)
            chosen.blocks[r, b, : len(some)] = some
            chosen.counts[r, b] = len(some)
    chosen.count_taken(2)
    completion = None
    if completed:
        means = torch.zeros(2, BATCH, HEADS, 9, DIM, device=DEVICE)
        reference.write_means(kv, 8, *means, None, 9)
        completion = Completion(*means, 8, (1.0, 0.5, 0.0))
    expected = reference.attend_blocks(query, kv, chosen, rows, SIZE, 0.3, None, completion)

    places = torch.stack([torch.randperm(SLOTS, generator=generator)[:CAPACITY] for _ in range(ROWS * BATCH)])
    places = places.view(ROWS, BATCH, CAPACITY).int().to(DEVICE).masked_fill_(chosen.blocks < 0, -1)
    pools = [torch.full((BATCH, HEADS, SLOTS * SIZE, DIM), nan, device=DEVICE) for _ in range(2)]
    for head, row in enumerate(rows.tolist()):
        for b, length in enumerate(lengths):
            for block, place in zip(chosen.blocks[row, b].tolist(), places[row, b].tolist(), strict=True):
                if block >= 0:
                    end = min((block + 1) * SIZE, length) - block * SIZE
                    for pool, whole in zip(pools, (keys, values), strict=True):
                        tokens = whole[b, head, block * SIZE : block * SIZE + end]
                        pool[b, head, place * SIZE : place * SIZE + end] = tokens
    placed = KV(*pools, kv.lengths)
    if splits:
        from lycheedecode.ops.attend.triton_blocks import attend_blocks as kernel
        from lycheedecode.ops.kernel_common import Tuning

        tuning = Tuning(splits, 16, 2, 2)
        found = kernel(query, placed, chosen, rows, SIZE, 0.3, None, tuning, None, completion, places=places)
    else:
        found = attend_blocks(query, placed, chosen, rows, SIZE, 0.3, completion=completion, places=places)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    query, blocks = torch.zeros(BATCH, 6, DIM), torch.zeros(ROWS, BATCH, CAPACITY, dtype=torch.int32)
    chosen, keys = Selections(blocks, blocks[..., 0]), torch.zeros(BATCH, HEADS, 8, DIM)
    rows, kv = torch.zeros(3, dtype=torch.int64), KV(keys, keys, torch.ones(BATCH, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"places must be int32 \(3, 2, 6\)"):
        attend_blocks(query, kv, chosen, rows, 4, 1.0, places=blocks[:1])
    with pytest.raises(ValueError, match="sequences have lengths"):
        attend_blocks(query, kv._replace(lengths=None), chosen, rows, 4, 1.0, places=blocks)
    with pytest.raises(ValueError, match="a store of 5 blocks cannot hold selections of 6"):
        fetch.plan_fetch(blocks, new_map(5), blocks[0, :, 0], blocks[0, 0, :1], TAIL)
    with pytest.raises(ValueError, match="a tail of 8 tokens does not hold slots 0 to 8"):
        fetch.write_back(make_tokens(44), make_tokens(50), 0, 9, None, 36, 8)
