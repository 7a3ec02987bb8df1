"""The kernels of `fetch`, and attention through places, compile for a Hopper GPU; see `test_compile`."""

import re

import pytest
import torch
from test_compile import check, make_cache

from lycheedecode.ops import Completion, Selections, SmallKeys
from lycheedecode.ops import kernel_common as common
from lycheedecode.ops import operators as kernels
from lycheedecode.ops.fetch import BlockMap, Tokens, triton


def tokens(slots, dim, dtype):
    return Tokens(*(torch.empty(2, 3, 8, slots, dim, dtype=dtype) for _ in range(2)))


@pytest.mark.parametrize(
    ("dim", "dtype", "block_size", "capacity", "pdl"),
    [(128, torch.bfloat16, 32, 128, 1), (80, torch.float16, 16, 256, 0), (64, torch.float32, 64, 64, 1),
     (256, torch.bfloat16, 1, 1024, 1)],
    ids=str,
)  # fmt: skip
def test_fetching(compiled, dim, dtype, block_size, capacity, pdl, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "has_pdl", lambda device: pdl)
    known = BlockMap.allocate(4, 3, 4096, 2 * capacity, capacity, "cpu")
    blocks, counts = torch.zeros(4, 3, capacity, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    source, pool = tokens(8192, dim, dtype), tokens(2 * capacity * block_size + 64, dim, dtype)
    readers, clock = torch.zeros(20, 4, dtype=torch.int32), counts[:1]
    triton.plan_fetch(blocks, known, counts, clock, 2)
    scanned = torch.empty(5, 3, 8200, dim, dtype=dtype)
    triton.fetch(source, pool, known, readers, scanned, counts, block_size)
    triton.fetch(source, pool, known, readers, scanned, counts, block_size, beside=True)
    triton.write_back(pool, source, 5, 30, counts, 2 * capacity * block_size, 64)
    query = torch.empty(3, 32, dim, dtype=dtype)
    copies = [SmallKeys.allocate(form, (3, 2, 8192), dim, "cpu") for form in ("float8", "int4")]
    for copy in (SmallKeys(torch.empty(3, 2, 8192, dim, dtype=dtype)), *copies):
        triton.newest_keys(query, pool.keys[0], counts, counts, (0, 7), copy)
    check(compiled, tmp_path, 7)
    if dim == 128:  # a block is read as wide as the link wants it
        for kernel in compiled[1:3]:
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"])) >= 3


@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.bfloat16), (80, torch.float16), (256, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("completed", [False, True])
def test_places(compiled, dim, dtype, completed, tmp_path, monkeypatch):
    """Tokens are read as wide as without them."""
    monkeypatch.setattr(common, "has_pdl", lambda device: 1)
    kv, out = make_cache(dim, dtype), Selections.allocate(2, 1, 128, "cpu", 1024)
    means = torch.empty(2, 1, 2, 1024, dim, dtype=dtype)
    completion = Completion(*means, 128, (1.0, 0.5)) if completed else None
    query, rows = torch.empty(1, 8, dim, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    kernels.attend_blocks(query, kv, out, rows, 32, 0.1, completion=completion, places=out.blocks.clone())
    check(compiled, tmp_path, 1)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x[0-9a-f]+),", compiled[0].asm["ptx"])
    assert copies
    assert set(copies) == {"0x10"}


def test_what_is_not_contiguous_is_refused(compiled):
    known = BlockMap.allocate(4, 3, 64, 16, 8, "cpu")
    blocks, counts = torch.zeros(4, 3, 8, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="the map must be contiguous"):
        triton.plan_fetch(blocks, known._replace(used=known.used.mT), counts, counts[:1], 2)
    with pytest.raises(ValueError, match="must be contiguous"):
        triton.write_back(
            Tokens(*(part.transpose(1, 2) for part in tokens(8, 64, torch.float16))),
            tokens(9, 64, torch.float16), 0, 1, None, 0, 8,
        )  # fmt: skip
    assert not compiled
