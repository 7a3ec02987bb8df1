"""Caches, queries and selections for tests of the Triton kernels against the reference; unread memory is NaN.

On a CPU kernels need Triton's interpreter, which must be chosen before Triton is imported: `test_interpreter.py` does.
"""

import os
from math import ceil, nan

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Runs with TRITON_INTERPRET=1, as test_interpreter.py does.", allow_module_level=True)
pytest.importorskip("triton", reason="The kernels need Triton.")

from lycheedecode.ops import KV, Selections  # noqa: E402
from lycheedecode.ops import operators as kernels  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
SCALE = 0.2
# The interpreter reads the bits of a bfloat16 as an integer when it multiplies matrices.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_cache(lengths, starts=None, slots=None, heads=2, dim=64, dtype=torch.float32):
    """A cache inside a larger store; whatever is no token of it is NaN."""
    starts = starts or [0] * len(lengths)
    slots = slots or max(start + length for start, length in zip(starts, lengths, strict=True))
    store = torch.full((2, len(lengths), heads, slots + 3, dim), nan, dtype=dtype, device=DEVICE)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens = torch.randn(2, heads, length, dim, dtype=torch.float32, device=DEVICE)
        store[:, b, :, start : start + length] = tokens.to(dtype)
    plain = all(start == 0 for start in starts) and all(length == slots for length in lengths)
    return KV(
        store[0, :, :, :slots],
        store[1, :, :, :slots],
        None if plain else torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE) if any(starts) else None,
    )


def paged(kv, page):
    """The same cache in shuffled pages; pages that nobody owns are NaN, table entries that nobody needs are wild."""
    pages = ceil(kv.slots / page)
    order = torch.randperm(kv.batch * pages, device=DEVICE) + 1
    stores = []
    for cache in (kv.keys, kv.values):
        shape = (kv.batch * pages + 2, page, cache.shape[1], cache.shape[3])
        store = torch.full(shape, nan, dtype=cache.dtype, device=DEVICE).transpose(1, 2)
        for i, where in enumerate(order.tolist()):
            piece = cache[i // pages, :, i % pages * page : (i % pages + 1) * page]
            store[where, :, : piece.shape[1]] = piece
        stores.append(store)
    table = order.view(kv.batch, pages).int()
    counts = kv.token_counts()
    used = counts if kv.starts is None else counts + kv.starts
    first_unused = (used + page - 1) // page
    wild = torch.arange(pages, device=DEVICE) >= first_unused[:, None]
    return KV(*stores, counts, kv.starts, table.masked_fill(wild, 123456789))


def tame(kv):
    """For the reference, which reads pages before it masks them."""
    if kv.page_table is None:
        return kv
    return kv._replace(page_table=kv.page_table.clamp(max=kv.keys.shape[0] - 1))


def make_query(kv, group):
    batch, heads, dim = kv.batch, kv.keys.shape[1], kv.keys.shape[3]
    return torch.randn(batch, heads * group, dim, device=DEVICE).to(kv.keys.dtype)


def make_selections(kv, rows, capacity, block_size):
    """Random blocks of each sequence: at least one, as far as there are any, in no order."""
    out = Selections.allocate(rows, kv.batch, capacity, DEVICE)
    for b, length in enumerate(kv.token_counts().tolist()):
        existing = ceil(length / block_size)
        for r in range(rows):
            count = min(int(torch.randint(1, capacity + 1, ())), existing)
            out.blocks[r, b, :count] = torch.randperm(existing, device=DEVICE)[:count].int()
            out.counts[r, b] = count
    return out


def poison_unselected(kv, selections, rows, block_size):
    """NaN in every block of a head that its row did not select."""
    keys, values = kv.keys.clone(), kv.values.clone()
    first = [0] * kv.batch if kv.starts is None else kv.starts.tolist()
    for h, row in enumerate(rows.tolist()):
        for b in range(kv.batch):
            kept = set(selections.blocks[row, b].tolist())
            for block in range(ceil(int(kv.token_counts()[b]) / block_size)):
                if block not in kept:
                    start = first[b] + block * block_size
                    keys[b, h, start : start + block_size] = nan
                    values[b, h, start : start + block_size] = nan
    return kv._replace(keys=keys, values=values)


def close(result, expected, dtype):
    torch.testing.assert_close(result.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def as_sets(selections):
    counts = selections.counts.flatten().tolist()
    rows = selections.blocks.flatten(0, 1).tolist()
    for row, count in zip(rows, counts, strict=True):
        assert all(block == -1 for block in row[count:])
    return [sorted(row[:count]) for row, count in zip(rows, counts, strict=True)]


LAYOUTS = {
    "plain": {"lengths": [163, 163]},
    "lengths": {"lengths": [83, 40], "slots": 90},
    "left padding": {"lengths": [20, 83], "starts": [63, 0]},
    "odd dim": {"lengths": [63, 17], "starts": [0, 5], "dim": 80},
    "wide": {"lengths": [40, 90], "dim": 256},
    "an empty one": {"lengths": [0, 33], "dim": 96},
    "one token": {"lengths": [1]},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def step(query, kv, config, selections, rows):
    kernels.scan_select(query, kv, (1,), config, SCALE, selections.rows(1, 1))
    scores = kernels.scan_blocks(query, kv, (0,), 8, SCALE)
    kernels.select_blocks(scores, kv, config, selections.rows(2, 1))
    sparse = kernels.attend_blocks(query + 0, kv, selections, rows, 8, SCALE)
    return sparse + kernels.attend(query, kv, SCALE), scores
