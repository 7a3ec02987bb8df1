"""What the kernels share: where a token lies in the cache, and one step of a running softmax.

Kernels take a layer's cache as `cache_arguments` lists it. Names in kernels: `b` a sequence, `h` one of the heads asked
for, `head` its index in the cache, `g` a query head of the group, `d` a channel. Shapes that a compiled kernel is
specialised for are capitals; `GP`, `DP`: `G`, `D` padded to what a matrix instruction takes. Logits are in base 2.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .types import KV, constant, power_of_two

LOG2_E = 1.4426950408889634


class Tuning(NamedTuple):
    """How a kernel cuts its work; never changes what it computes.

    Attributes:
        splits: programs that share the tokens of one head of one sequence.
        tile: tokens that a program handles at once.
        warps: of a program.
        stages: depth of its load pipeline.
        pdl: programmatic dependent launch, an early start. 0: none. 1: start while the kernel before it drains, and
            once that has ended let the next one start. 2: let the next one start at once: for kernels that leave memory
            idle, if the next one may call its weights into the L2 meanwhile.
    """

    splits: int
    tile: int
    warps: int
    stages: int
    pdl: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Options of the launch itself."""
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages, "PDL": self.pdl}
        return {**options, "launch_pdl": True} if self.pdl else options

    def launch(self, kv: KV) -> dict[str, Any]:
        """Options of a launch that goes over a cache.

        Pages are looked up in one step of the pipeline and read in a later one: the same loads in flight take twice
        the steps.
        """
        return (self if kv.page_table is None else self._replace(stages=max(2 * self.stages - 1, 1))).options


# ---------------------------------------------------------------------- before a launch


def cache_arguments(kv: KV, slots: int | None = None) -> tuple[Any, ...]:
    """The cache as kernels take it: `keys, values, lengths, starts, page_table`, strides, slots, page.

    `slots`: in place of those that the cache has.
    """
    table = kv.page_table
    return (
        *(kv.keys, kv.values, kv.lengths, kv.starts, table),
        *kv.keys.stride()[:3],
        *kv.values.stride()[:3],
        0 if table is None else table.stride(0),
        kv.slots if slots is None else slots,
        0 if table is None else kv.keys.shape[2],
    )


def check_strides(query: Tensor | None, kv: KV) -> None:
    """Refuse what the kernels cannot address, naming the argument."""
    named = {"query": query, "keys": kv.keys, "values": kv.values, "page_table": kv.page_table}
    for name, tensor in {**named, "lengths": kv.lengths, "starts": kv.starts}.items():
        if tensor is None:
            continue
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must have a contiguous last dimension, not strides {tensor.stride()}.")
        if query is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}.")


def padded(group: int, dim: int) -> dict[str, int]:
    """Group size and head dim, and what a matrix instruction takes in their place."""
    return {"G": group, "D": dim, "GP": max(16, power_of_two(group)), "DP": max(16, power_of_two(dim))}


def tile_of(kv: KV, size: int) -> int:
    """Tokens, at least 16, whose keys fill `size` bytes.

    float32 is multiplied without matrix instructions: larger tiles would not fit into registers.
    """
    if kv.keys.dtype == torch.float32:
        return 16
    return max(min(size // (power_of_two(kv.keys.shape[3]) * kv.keys.element_size()), 128), 16)


def even_splits(pairs: int, tiles: int, programs: int, most: int) -> int:
    """Splits of each of `pairs` heads that make about `programs` programs in all, of at least one tile each."""
    wanted = power_of_two(ceil(programs / pairs))
    return max(min(wanted, most, power_of_two(tiles)), 1)


def filling_splits(pairs: int, places: int) -> int:
    """Splits of each of `pairs` heads that fill the places in which programs run at once, as few as that takes."""
    least = max(min(places // pairs, 64), 1)
    return max(range(least, max(least, 8) + 1), key=lambda splits: pairs * splits / ceil(pairs * splits / places))


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H200's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@lru_cache(maxsize=64)
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program can have; an H200's where there is no GPU to ask."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


@lru_cache(maxsize=64)
def read_rate(device: torch.device) -> float:
    """Bytes a second that memory has for each processor: 25e9 of an H100; an H200's where there is no GPU to ask."""
    if device.type != "cuda":
        return 37e9
    index = torch.cuda.current_device() if device.index is None else device.index
    known = triton.runtime.driver.active.utils.get_device_properties(index)
    return known["mem_clock_rate"] * 1e3 * 2 * known["mem_bus_width"] / 8 / known["multiprocessor_count"]


def reads_fast(device: torch.device) -> bool:
    """Whether memory has as much for each processor as an H200's, which an H100's has not."""
    return read_rate(device) > 30e9


def fitting(tuning: Tuning, kv: KV, rows: int = 16) -> Tuning:
    """The tuning, with smaller tiles if keys and values in flight would not fit into this GPU's shared memory.

    Beside them lie `rows` of the query and, where matrix instructions read a tile of an 8-bit cache from there, that
    tile in 16 bits.
    """
    dim, size = power_of_two(kv.keys.shape[3]), kv.keys.element_size()
    token = tuning.stages * 2 * dim * size + (2 * dim if rows >= 64 and size == 1 else 0)
    most = room_for_tiles(kv, rows) // token
    return tuning._replace(tile=max(min(tuning.tile, power_of_two(most + 1) // 2), 16))


def room_for_tiles(kv: KV, rows: int) -> int:
    """Bytes of shared memory that are left beside `rows` of the query."""
    return shared_memory(kv.keys.device) - 8192 - rows * power_of_two(kv.keys.shape[3]) * max(kv.keys.element_size(), 2)


def head_index(heads: tuple[int, ...] | None, kv: KV) -> Tensor | None:
    """int32 `[H]` on the cache's device; None for all heads in order."""
    num_heads = kv.keys.shape[1]
    if heads is None or heads == tuple(range(num_heads)):
        return None
    if not all(0 <= head < num_heads for head in heads):
        raise ValueError(f"heads {heads} do not all exist: the cache has {num_heads} KV heads.")
    return constant(heads, torch.int32, kv.keys.device)


@lru_cache(maxsize=64)
def has_pdl(device: torch.device) -> int:
    """1 if this GPU can start a kernel while the one before it drains: from Hopper on."""
    return int(device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))


def on_device(tensor: Tensor) -> Any:
    """Kernels start on the current device: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


# ---------------------------------------------------------------------- inside a kernel


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """With an early start: wait until the kernel before has written all, and let the next one start early, too.

    Before this point kernels write nothing, and read only what no kernel writes.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def mask_if(condition, mask):
    """`mask` if `condition`, a single truth value, holds, else nothing.

    For a GPU it is `mask & condition`; Triton's interpreter makes int32 of that, which 3.9 takes for no mask.
    """
    return tl.where(condition, mask, False)


@triton.jit
def extent(b, lengths, starts, slots):
    """First slot of a sequence, and its tokens."""
    first = 0
    if starts is not None:
        first = tl.load(starts + b)
    count = slots - first
    if lengths is not None:
        count = tl.minimum(count, tl.load(lengths + b))
    return first, count


@triton.jit
def locate(b, slot, exists, page_table, stride_table, PAGE: tl.constexpr):
    """Page and entry of slots, 64-bit; reads the page table only where the token exists (None: everywhere)."""
    if PAGE == 0:
        page = slot.to(tl.int64) * 0 + b
        entry = slot.to(tl.int64)
    else:
        at = page_table + b.to(tl.int64) * stride_table + slot // PAGE
        page = tl.load(at).to(tl.int64) if exists is None else tl.load(at, mask=exists, other=0).to(tl.int64)
        entry = (slot % PAGE).to(tl.int64)
    return page, entry


@triton.jit
def locate_means(b, first, chunk, exists, page_table, stride_table, PAGE: tl.constexpr, MEAN_OF: tl.constexpr):
    """Page and entry of the means of chunks, 64-bit: see `Completion`."""
    if PAGE == 0:
        page = chunk.to(tl.int64) * 0 + b
        entry = chunk.to(tl.int64)
    else:
        last = first + chunk * MEAN_OF + MEAN_OF - 1
        page = tl.load(page_table + b.to(tl.int64) * stride_table + last // PAGE, mask=exists, other=0).to(tl.int64)
        entry = (last % PAGE // MEAN_OF).to(tl.int64)
    return page, entry


@triton.jit
def load_query(
    query, b, head, stride_b, stride_h, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr
):
    """`[GP, DP]`: the queries of a group, zeros around them."""
    g = tl.arange(0, GP)[:, None]
    d = tl.arange(0, DP)[None, :]
    at = query + b.to(tl.int64) * stride_b + (head * G + g) * stride_h + d
    return tl.load(at, mask=(g < G) & (d < D), other=0.0)


@triton.jit
def load_tokens(
    cache, page, entry, head, exists, stride_page, stride_head, stride_slot, D: tl.constexpr, DP: tl.constexpr
):
    """`[tokens, DP]`: rows of the cache, zeros where nothing exists (None: everything does)."""
    d = tl.arange(0, DP)[None, :]
    row = page * stride_page + head.to(tl.int64) * stride_head + entry * stride_slot
    at = cache + row[:, None] + d
    if exists is None:
        tokens = tl.load(at) if DP == D else tl.load(at, mask=d < D, other=0.0)
    else:
        tokens = tl.load(at, mask=exists[:, None] if DP == D else exists[:, None] & (d < D), other=0.0)
    return tokens


@triton.jit
def tile_after(tile, end, SPLITS: tl.constexpr):
    """The first tile from `end` on that falls to the split whose next one is `tile`."""
    return tile + tl.cdiv(tl.maximum(end - tile, 0), SPLITS) * SPLITS


@triton.jit
def whole_of(b, whole_up_to, limits, BLOCK: tl.constexpr):
    """Tokens up to which a sequence is not looked at: see `ops.scan_select`."""
    if limits is not None:
        limit = tl.load(limits + b)
        whole_up_to = tl.where(limit < 0, 0x3FFFFFFF, tl.minimum(whole_up_to, limit * BLOCK))
    return whole_up_to


@triton.jit
def load_sinks(sinks, head, split, G: tl.constexpr, GP: tl.constexpr):
    """`[GP]`: logits in base 2 of a group's sinks, which the first split counts; -inf for all others."""
    g = tl.arange(0, GP)
    x = tl.load(sinks + head * G + g, mask=mask_if(split == 0, g < G), other=float("-inf"))
    return x * 1.4426950408889634


@triton.jit
def for_8_bit_keys(q, scale):
    """The query and the factor on logits such that keys in 8-bit floats take one step to become like the query.

    They become float16 in one step, bfloat16 in three.
    """
    if q.dtype == tl.bfloat16:
        size = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)[:, None]
        q = (q / size).to(tl.float16)
        scale = scale * size
    return q, scale


@triton.jit
def logits_of(q, k, exists, scale):
    """`[GP, tokens]` logits in base 2; -inf where nothing exists (None: everything does)."""
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if exists is not None:
        x = tl.where(exists[None, :], x, float("-inf"))
    return x


@triton.jit
def finite(peak):
    """A maximum that may be subtracted: -inf, the maximum of nothing, becomes 0."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def attend_tile(acc, peak, total, q, k, v, exists, scale, bias=None):
    """Add a tile to a running softmax: values `acc [GP, DP]`, largest logits `peak [GP]`, mass `total [GP]`.

    `bias [tokens]`, in base 2, is added to the logits.
    """
    x = logits_of(q, k, exists, scale)
    if bias is not None:
        x += bias[None, :]
    new_peak = tl.maximum(peak, tl.max(x, 1))
    shift = finite(new_peak)
    p = tl.exp2(x - shift[:, None])
    fade = tl.exp2(peak - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_peak, total * fade + tl.sum(p, 1)
