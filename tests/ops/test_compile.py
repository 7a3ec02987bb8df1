"""Every kernel compiles for a Hopper GPU, without spilling registers; no GPU is needed for that, only its name.

The interpreter, which runs the kernels elsewhere in these tests, accepts programs that the compiler refuses.
"""

import re

import pytest
import torch
from hopper import SHARED_MEMORY, programs_at_once, spilled_bytes

from lycheedecode import HybridConfig
from lycheedecode.bench import read
from lycheedecode.errors import ConfigError
from lycheedecode.ops import KV, Completion, Selections, Shares, SmallKeys
from lycheedecode.ops import kernel_common as common
from lycheedecode.ops import operators as kernels
from lycheedecode.ops.append.rope import Rotation
from lycheedecode.ops.append.triton import append
from lycheedecode.ops.complete.triton import write_means
from lycheedecode.ops.noise.triton import add_noise


def check(compiled, tmp_path, count, spills=8):
    """Two registers on the stack, for the sake of a round number of them, cost nothing."""
    assert len(compiled) == count
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata.name
        assert spilled_bytes(kernel, tmp_path) <= spills, kernel.metadata.name


def make_cache(dim, dtype, page=0, slots=131072, heads=2):
    """Shapes; the memory behind them is never touched."""
    shape = (slots // page, heads, page, dim) if page else (1, heads, slots, dim)
    cache = torch.empty(shape, dtype=dtype)
    table = torch.empty(1, slots // page, dtype=torch.int32) if page else None
    return KV(cache, cache, torch.zeros(1, dtype=torch.int32), None, table)


def launch_all(kv, group=4, block_size=32, heads=None, **settings):
    """Every operation once, as it is launched by default."""
    query = torch.empty(1, kv.keys.shape[1] * group, kv.keys.shape[3], dtype=kv.keys.dtype)
    config = HybridConfig(block_size=block_size, **settings)
    count = kv.keys.shape[1] if heads is None else len(heads)
    out = Selections.allocate(count, 1, config.capacity_blocks(kv.slots // block_size), "cpu")
    kernels.attend(query, kv, 0.1, heads)
    rows = torch.zeros(count, dtype=torch.int64)
    kernels.attend_blocks(query, kv, out, rows, block_size, 0.1, heads)
    kernels.scan_select(query, kv, heads or tuple(range(count)), config, 0.1, out)


@pytest.mark.parametrize("dim", [256])  # 64, 80 and 128: below
def test_head_dims(compiled, dim, tmp_path):
    launch_all(make_cache(dim, torch.bfloat16))
    check(compiled, tmp_path, 5)


def test_float32(compiled, tmp_path):
    launch_all(make_cache(128, torch.float32))
    check(compiled, tmp_path, 5)


@pytest.mark.parametrize(("page", "dim"), [(16, 128), (64, 80)])
def test_pages_and_some_heads(compiled, page, dim, tmp_path):
    launch_all(make_cache(dim, torch.bfloat16, page, heads=3), heads=(0, 2))
    check(compiled, tmp_path, 5)


@pytest.mark.parametrize(("block_size", "group", "dim"), [(1, 1, 128), (16, 7, 64), (256, 1, 128)])
def test_blocks_and_groups(compiled, block_size, group, dim, tmp_path):
    launch_all(make_cache(dim, torch.float16, slots=4096 * block_size), group, block_size)
    check(compiled, tmp_path, 5)


def test_less_shared_memory(compiled, tmp_path, monkeypatch):
    """What a workstation's GPU has, for the head dimension that needs most."""
    monkeypatch.setattr(common, "shared_memory", lambda device: 99 * 1024)
    launch_all(make_cache(256, torch.bfloat16))
    check(compiled, tmp_path, 5)
    assert max(kernel.metadata.shared for kernel in compiled) <= 99 * 1024


@pytest.mark.parametrize(
    ("dim", "dtype", "page"),
    [(128, torch.bfloat16, 0), (256, torch.bfloat16, 16), (256, torch.float8_e4m3fn, 16)],
    ids=str,
)
def test_less_shared_memory_for_several_tokens(compiled, dim, dtype, page, tmp_path, monkeypatch):
    """Beside keys and values lie many queries and, in 8 bits, a tile in 16; a scan of 8 bits has larger tiles."""
    monkeypatch.setattr(common, "shared_memory", lambda device: 99 * 1024)
    monkeypatch.setattr(common, "read_rate", lambda device: 9e9)
    kv, scales = make_cache(dim, dtype, page), (torch.ones(2), torch.ones(2)) if dtype.itemsize == 1 else None
    query = torch.empty(1, 9, 8, dim, dtype=torch.bfloat16)
    kernels.attend_tokens(query, kv, 0.1, None, scales)
    kernels.scan_blocks(query[:, 0], kv, (1,), 32, 0.1, scales=scales)
    check(compiled, tmp_path, 4)
    assert max(kernel.metadata.shared for kernel in compiled) <= 99 * 1024


@pytest.mark.parametrize("page", [0, 16])
def test_largest_blocks_of_wide_heads(compiled, page, tmp_path):
    """A tile, which holds a whole block, fills most of the shared memory."""
    launch_all(make_cache(256, torch.bfloat16, page), block_size=256)
    check(compiled, tmp_path, 5)


def test_blocks_that_exceed_shared_memory_are_refused(compiled):
    with pytest.raises(ConfigError, match="A block of 256 float32 keys exceeds"):
        kernels.scan_blocks(torch.empty(1, 8, 256), make_cache(256, torch.float32), (1,), 256, 0.1)
    assert not compiled


def test_early_start(compiled, tmp_path, monkeypatch):
    """Programmatic dependent launch: the wait comes first, but for the loads of what no kernel writes."""
    monkeypatch.setattr(common, "has_pdl", lambda device: 1)
    launch_all(make_cache(128, torch.bfloat16))
    check(compiled, tmp_path, 5)
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        assert "griddepcontrol.launch_dependents" in ptx
        early_loads = ptx[: ptx.index("griddepcontrol.wait")].count("ld.global")
        assert early_loads == (kernel.metadata.name == "_attend_blocks_kernel")  # the rows, which no kernel writes


@pytest.mark.parametrize(
    ("dim", "dtype", "page"),
    [(128, torch.bfloat16, 0), (80, torch.float16, 0), (256, torch.bfloat16, 16), (128, torch.float32, 0)],
    ids=str,
)
def test_completion(compiled, dim, dtype, page, tmp_path, monkeypatch):
    """Means are read as wide as tokens are: 16 bytes a thread and load."""
    monkeypatch.setattr(common, "has_pdl", lambda device: 1)
    kv, config = make_cache(dim, dtype, page), HybridConfig()
    means = torch.empty(2, kv.keys.shape[0], 2, max((page or kv.slots) // 128, 1), dim, dtype=dtype)
    out = Selections.allocate(2, 1, 128, "cpu", 1024)
    query, rows = torch.empty(1, 8, dim, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    kernels.select_blocks(torch.empty(2, 1, 4096), kv, config, out)
    completion = Completion(*means, 128, (1.0, 0.0))
    kernels.attend_blocks(query, kv, out, rows, 32, 0.1, completion=completion)
    number = torch.zeros(1, dtype=torch.int32)
    write_means(kv, 128, *means, number, 3, number)
    check(compiled, tmp_path, 3)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x[0-9a-f]+),", compiled[1].asm["ptx"])
    narrow = sum(size != "0x10" for size in copies)
    assert len(copies) > narrow
    assert narrow == 0 or page  # those of the page table


@pytest.mark.parametrize(
    ("dim", "dtype", "page", "block_size"),
    [
        (128, torch.bfloat16, 16, 64),
        (64, torch.float16, 0, 16),
        (256, torch.bfloat16, 0, 32),
        (128, torch.float32, 0, 16),
    ],
    ids=str,
)
def test_dense_heads_that_select(compiled, dim, dtype, page, block_size, tmp_path):
    kv, config = make_cache(dim, dtype, page), HybridConfig(block_size=block_size)
    out = Selections.allocate(1, 1, 4096 // block_size, "cpu")
    kernels.attend_select(torch.empty(1, 8, dim, dtype=dtype), kv, (1,), config, 0.1, out)
    check(compiled, tmp_path, 3)


@pytest.mark.parametrize(
    ("dim", "newest", "form"),
    [(64, 1, "float8"), (128, 1, "float8"), (128, 2, "float8"), (64, 2, "int4"), (80, 1, "int4"), (128, 1, "int4")],
)
def test_scan_of_a_copy(compiled, dim, newest, form, tmp_path):
    """Keys of 8 and of 4 bits, widened in registers."""
    kv, config = make_cache(dim, torch.bfloat16), HybridConfig(refresh_every=newest)
    query, out = torch.empty(1, 8, dim, dtype=torch.bfloat16), Selections.allocate(2, 1, 128, "cpu")
    copy = SmallKeys.allocate(form, (1, 2, kv.slots), dim, "cpu")
    kernels.scan_select(query, kv, (0, 1), config, 0.1, out, copy)
    check(compiled, tmp_path, 3)
    assert "cvt.rn.f16x2.e4m3x2" in compiled[0].asm["ptx"]
    assert ".f32.f16.f16.f32" in compiled[0].asm["ptx"]  # no way round by bfloat16


@pytest.mark.parametrize(
    ("tokens", "group", "dim", "dtype", "page"),
    [
        (9, 4, 128, torch.bfloat16, 0),
        (5, 3, 64, torch.bfloat16, 16),
        (32, 8, 128, torch.float16, 16),
        (9, 4, 256, torch.bfloat16, 0),
        (9, 4, 80, torch.bfloat16, 0),
        (9, 4, 128, torch.float32, 0),
        (32, 4, 128, torch.float8_e4m3fn, 16),
    ],
    ids=str,
)
def test_several_tokens(compiled, tokens, group, dim, dtype, page, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "has_pdl", lambda device: 1)
    kv, eight_bits = make_cache(dim, dtype, page), dtype == torch.float8_e4m3fn
    query = torch.empty(1, tokens, 2 * group, dim, dtype=torch.bfloat16 if eight_bits else dtype)
    scales = (torch.ones(2), torch.ones(2)) if eight_bits else None
    kernels.attend_tokens(query, kv, 0.1, torch.zeros(1, tokens, dtype=torch.int32) if page else None, scales)
    check(compiled, tmp_path, 2)


@pytest.mark.parametrize("page", [0, 16])
def test_several_tokens_over_a_long_cache(compiled, page, tmp_path):
    """Tiles of 128 tokens, with as many in flight as fit into shared memory; addresses may lie on the stack."""
    kv = make_cache(128, torch.bfloat16, page, slots=2**20)
    kernels.attend_tokens(torch.empty(1, 9, 8, 128, dtype=torch.bfloat16), kv, 0.1)
    check(compiled, tmp_path, 2, spills=96)
    assert compiled[0].metadata.shared >= 2 * 128 * 512


@pytest.mark.parametrize(("tokens", "page"), [(0, 0), (0, 16), (1, 0)])
def test_programs_of_8_bit_caches_wait_for_each_other(compiled, tokens, page, tmp_path):
    """For a single token a processor holds three of them. 0 tokens: the dense operation's one."""
    kv, scales = make_cache(128, torch.float8_e4m3fn, page), (torch.ones(2), torch.ones(2))
    query = torch.empty(1, max(tokens, 1), 8, 128, dtype=torch.bfloat16)
    if tokens:
        kernels.attend_tokens(query, kv, 0.1, None, scales)
    else:
        kernels.attend(query[:, 0], kv, 0.1, scales=scales)
    assert compiled[0].metadata.name.startswith("_attend")
    assert programs_at_once(compiled[0], tmp_path) >= 3


STRATEGIES = {
    "ratio": {"budget_ratio": 0.1},
    "top_p": {"selection": "top_p", "top_p": 0.9},
    "threshold": {"selection": "threshold", "threshold": 0.01},
}


@pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES)
def test_strategies(compiled, settings, tmp_path):
    kv, config = make_cache(64, torch.bfloat16, slots=65536), HybridConfig(**settings)
    out = Selections.allocate(1, 1, config.capacity_blocks(2048), "cpu")
    query = torch.empty(1, 8, 64, dtype=torch.bfloat16)
    kernels.scan_select(query, kv, (1,), config, 0.1, out)
    check(compiled, tmp_path, 3)


@pytest.mark.parametrize("num_blocks", [4112, 32784, 40000])
def test_rows_of_scores(compiled, num_blocks, tmp_path):
    """Rows that a program holds, and longer ones."""
    kv, config = make_cache(64, torch.bfloat16, slots=32 * num_blocks), HybridConfig()
    query, out = torch.empty(1, 8, 64, dtype=torch.bfloat16), Selections.allocate(1, 1, 128, "cpu")
    kernels.select_blocks(kernels.scan_blocks(query, kv, (1,), 32, 0.1), kv, config, out)
    check(compiled, tmp_path, 3)


@pytest.mark.parametrize("limited", [False, True], ids=["", "limits"])
def test_shares_of_the_budget(compiled, limited, tmp_path):
    kv, config = make_cache(64, torch.bfloat16), HybridConfig()
    query, out = torch.empty(1, 8, 64, dtype=torch.bfloat16), Selections.allocate(3, 1, 512, "cpu", 1024)
    limits = torch.zeros(1, dtype=torch.int32) if limited else None
    shares = Shares.of_factors((0, 1, 1), (0.25, 0.5, 4), 128, 3)
    kernels.scan_select(query, kv, (0, 1), config, 0.1, out, limits=limits, shares=shares)
    check(compiled, tmp_path, 3)


@pytest.mark.parametrize("normed", [False, True])
def test_appending(compiled, normed, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "has_pdl", lambda device: 1)
    cache, (query, key) = (
        make_cache(128, torch.bfloat16).keys,
        (torch.empty(1, n, 128, dtype=torch.bfloat16) for n in (8, 2)),
    )
    rotation = Rotation(query[:, 0], query[:, 0], *([query[0, 0]] * 2 if normed else [None] * 2), 1e-5)
    append(cache, cache, key, key, torch.zeros(1, dtype=torch.int32), query, rotation)
    check(compiled, tmp_path, 1)


def test_noise(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "has_pdl", lambda device: 1)
    place = torch.zeros(4, dtype=torch.int32)
    add_noise(torch.empty(4, 128256), place[:2], place, place)
    check(compiled, tmp_path, 1)


def test_reading(compiled, tmp_path):
    read.read_all(torch.empty(1 << 22, dtype=torch.int32), read.scratch("cpu"))
    check(compiled, tmp_path, 1)
