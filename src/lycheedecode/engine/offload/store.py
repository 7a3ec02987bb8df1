"""The GPU's share of a cache in host memory: pools of blocks, their map, and keys to scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil

import torch
from torch import Tensor

from ...config import ScanKeys
from ...ops import KV, Selections, SmallKeys
from ...ops.fetch import BlockMap, Tokens, fetch, plan_fetch, write_back
from ...plan import HeadPlan
from .lane import Lane, Mark
from .pinned import wait_for

_WINDOW = 2
"""Layers ahead of a layer at which its blocks are fetched: `python -m experiments tune-memory` compares others."""
_PIECE = 8192
"""Keys that are converted at a time."""


def pool_blocks(ratio: float, capacity: int, blocks: int, block_size: int, refresh_every: int) -> tuple[int, int]:
    """Slots and tail of a head's pool, in blocks: `ratio` selections of `capacity` blocks, if that is enough.

    A map, which takes less than a block of each head that reads its row, is part of that. Slots hold a whole selection.
    In the tail the newest block is being filled, the one before it may not be in host memory yet; and while a selection
    stands, more may follow, which must not take the place of those that it knows.
    """
    tail = 2 + ceil((refresh_every - 1) / block_size)
    return min(max(ceil(ratio * capacity) - tail - 1, capacity), max(blocks, capacity)), tail


class BlockStore:
    """Blocks of the cache that are on the GPU, for one attention; `ops.fetch` shows the layout of a pool.

    Args:
        source: the cache in host memory.
        readers: layer (as in `source`) and head of every head that attends over each row of the selections.
        rows: the rows that each layer writes, as first and number.
        selections: of the attention.
        block_size: tokens per block.
        blocks: of a sequence, at most.
        ratio: blocks of a head on the GPU and their map, as a multiple of a selection.
        refresh_every: steps from one selection to the next.
        starts: as in `KVCache`.
        device: of the pools.
        ahead: fetch blocks for later layers in the background; False: before the model goes on.
        scanned: keys on the device that need not be fetched.

    Attributes:
        source, selections, block_size, readers: as given.
        slots, tail_blocks: see `pool_blocks`.
        pool, known: keys and values of the blocks, `[L, B, Hkv, P, D]`, and where each block lies.
        lane: the stream on which blocks for later layers are fetched.
        missed, asked: blocks that were missing, and selected, counted for every head that reads them; float64 `[B]`.
        pulled: what of the missing blocks crossed the link; half a block where its keys were there.
        clock: int32 `[1]`, selections so far.
        fresh: int32 `[1]`, 1 while the store is empty.
        written: slots whose tokens are in host memory; -1 before the first step.
    """

    def __init__(
        self,
        source: Tokens,
        readers: Sequence[Sequence[tuple[int, int]]],
        rows: Mapping[int, tuple[int, int]],
        selections: Selections,
        block_size: int,
        blocks: int,
        ratio: float,
        refresh_every: int,
        starts: Tensor | None,
        device: torch.device,
        ahead: bool = True,
        scanned: ScannedKeys | None = None,
    ) -> None:
        num_rows, batch, capacity = selections.blocks.shape
        self.source, self.selections, self.block_size, self.readers = source, selections, block_size, readers
        self.slots, self.tail_blocks = pool_blocks(ratio, capacity, blocks, block_size, refresh_every)
        self._later_tokens = refresh_every - 1  # for which a selection stands, after the one that made it
        layers, _, heads, _, dim = source.keys.shape
        shape = layers, batch, heads, (self.slots + self.tail_blocks) * block_size, dim
        with torch.inference_mode(False):  # steps may be prepared outside of that mode, and write these there
            self.pool = Tokens(*(torch.empty(shape, dtype=source.keys.dtype, device=device) for _ in range(2)))
            self.known = BlockMap.allocate(num_rows, batch, blocks, self.slots, capacity, device)
            self.clock = torch.zeros(1, dtype=torch.int32, device=device)
            self.fresh = torch.ones(1, dtype=torch.int32, device=device)
            counters = (torch.zeros(batch, dtype=torch.float64, device=device) for _ in range(3))
            self.missed, self.asked, self.pulled = counters
        self._rows, self._starts = dict(rows), starts
        self._first = [0] * batch if starts is None else starts.tolist()
        self._scanned = None if scanned is None or scanned.is_small else scanned
        self._jobs = self._plan_jobs(device)
        weights = [(len(row), sum(1 if self._near(*head) < 0 else 0.5 for head in row)) for row in readers]
        self._weights = torch.tensor(weights, dtype=torch.float64, device=device)
        self.lane = Lane(device if ahead else torch.device("cpu"))
        self._arriving: dict[int, tuple[int, Mark]] = {}
        self._launched = self._arrived = 0
        self._counted: Mark = None
        self.written = -1
        self._has_tail = False

    def _near(self, layer: int, head: int) -> int:
        """Row of a head's keys among those on the GPU for scanning, which need not be fetched; -1: it has none."""
        return -1 if self._scanned is None else self._scanned.row_of.get((layer, head), -1)

    def _plan_jobs(self, device: torch.device) -> dict[int, list[tuple[int, Tensor]]]:
        """`fetch_order`, with readers as `ops.fetch` takes them."""
        return {
            at: [
                (layer, torch.tensor([(*one, self._near(*one[1:])) for one in readers], dtype=torch.int32).to(device))
                for layer, readers in jobs
            ]
            for at, jobs in fetch_order(self.readers, self._rows, _WINDOW).items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(part.nbytes for part in (*self.pool, *self.known))

    # ------------------------------------------------------------------ between steps

    def before_step(self, filled: int, now: bool) -> None:
        """Prepare for a step after `filled` slots; `now`: write them to host memory even if they fill no block."""
        if self.written < 0:
            self.written = filled  # the cache was complete when this store was made
        if not self._has_tail:
            self.write_back(filled)
            self._load_tail(filled)
        if now or filled - self.written >= self.block_size:
            self.write_back(filled)

    def write_back(self, filled: int) -> None:
        """Write new tokens to host memory."""
        if 0 <= self.written < filled:
            place = self.slots * self.block_size, self.tail_blocks * self.block_size
            write_back(self.pool, self.source, self.written, filled, self._starts, *place)
            self.written = filled

    def append_densely(self, filled: int, end: int) -> None:
        """Note that others write slots `filled` to `end - 1` to host memory, a layer at a time."""
        if self.written < end:
            self.write_back(filled)
            self.written, self._has_tail = end, False

    def truncate(self, slots: int) -> None:
        """The cache forgets every slot from `slots` on."""
        self.write_back(slots)
        self.written = min(self.written, slots)
        self._has_tail = False
        first = torch.tensor([(slots - start) // self.block_size for start in self._first], device=self.clock.device)
        self.known.forget(first)
        self.fresh.fill_(1)
        for counter in (self.missed, self.asked, self.pulled):
            counter.zero_()

    def _load_tail(self, filled: int) -> None:
        size = self.block_size
        wait_for(self.clock.device)
        for b, start in enumerate(self._first):
            length = filled - start
            begin = max((max(length - 1, 0) // size - self.tail_blocks + 1) * size, 0)
            token = torch.arange(begin, length, device=self.clock.device)
            entry = self.slots * size + token % (self.tail_blocks * size)
            for mine, whole in zip(self.pool, self.source, strict=True):
                mine[:, b, :, entry] = whole[:, b, :, start + begin : start + length].to(mine.device)
        self._has_tail = True
        if filled:  # writes what is there already: the kernel is compiled now, not in the middle of a generation
            place = self.slots * size, self.tail_blocks * size
            write_back(self.pool, self.source, filled - 1, filled, self._starts, *place)

    # ------------------------------------------------------------------ in a step: no number reaches the host

    def begin(self, lengths: Tensor, refresh: bool) -> None:
        """Begin a step with sequences of `lengths` tokens, int32 `[B]`, the new ones included."""
        size = self.block_size
        self.at = (lengths - 1) % (self.tail_blocks * size) + (self.slots * size + 1)
        self._newest = (lengths + (self._later_tokens - 1)) // size
        if refresh:
            self.clock.add_(1)

    def kv(self, layer: int, lengths: Tensor) -> KV:
        """What attention reads of a layer, through `places`."""
        keys, values = self.pool
        return KV(keys[layer], values[layer], lengths)

    def plan(self, layer: int) -> None:
        """Find places for the blocks that a layer has selected."""
        first, count = self._rows[layer]
        known, chosen = self.known.rows(first, count), self.selections.rows(first, count)
        plan_fetch(chosen.blocks, known, self._newest, self.clock, self.tail_blocks)

    def fetch(self, layer: int) -> None:
        """Fetch what is due when a layer is reached and has selected: for itself now, for later layers in the lane."""
        keys = None if self._scanned is None else self._scanned.keys.numbers
        for reader, table in self._jobs.get(layer, ()):
            more = self.source, self.pool, self.known, table, keys, self._starts, self.block_size
            if reader == layer:
                fetch(*more)
            else:
                mark = self.lane.run(partial(fetch, *more, beside=True))
                self._launched += 1
                self._arriving[reader] = self._launched, mark
        if layer == max(self._rows, default=None):
            self._counted = self.lane.run(self._count)

    def wait_for(self, layer: int) -> None:
        """Wait until all blocks that a layer's attention reads have arrived."""
        number, mark = self._arriving.pop(layer, (0, None))
        if number > self._arrived:
            self.lane.wait(mark)
            self._arrived = number

    def finish(self) -> None:
        """End a step that selected: wait until nothing is left in the lane."""
        if self._counted is not None:
            self.lane.wait(self._counted)

    def _count(self) -> None:
        """Count selected and missing blocks of this step, except for the first selection: the store was empty."""
        weights = self._weights[:, :, None] * (1 - self.fresh)
        self.missed.add_((self.known.misses * weights[:, 0]).sum(0))
        self.pulled.add_((self.known.misses * weights[:, 1]).sum(0))
        self.asked.add_((self.selections.counts * weights[:, 0]).sum(0))
        self.fresh.zero_()


def fetch_order(
    readers: Sequence[Sequence[tuple[int, int]]], rows: Mapping[int, tuple[int, int]], window: int
) -> dict[int, list[tuple[int, list[tuple[int, int, int]]]]]:
    """What to fetch when a layer is reached: for which layers, the nearest first; row, layer and head of their readers.

    A layer that selects fetches for itself at once. Later layers get theirs when they are `window` layers away: nearer
    ones, whose donors may select after theirs did, then do not wait behind what is needed much later.
    """
    found: dict[int, dict[int, list[tuple[int, int, int]]]] = {}
    for selecting, (first, count) in rows.items():
        for row in range(first, first + count):
            for layer, head in readers[row]:
                jobs = found.setdefault(max(selecting, layer - window), {})
                jobs.setdefault(layer, []).append((row, layer, head))
    return {at: sorted(jobs.items()) for at, jobs in found.items()}


def readers_of(
    plan: HeadPlan, layers: Mapping[int, int]
) -> tuple[list[list[tuple[int, int]]], dict[int, tuple[int, int]]]:
    """Readers of each row of the selections, and the rows that each layer writes; layers as `layers` numbers them."""
    readers: list[list[tuple[int, int]]] = [[] for _ in plan.retrieval]
    for layer, number in layers.items():
        for head, row in enumerate(plan.donor_rows(layer)):
            readers[row].append((number, head))
    rows = {
        number: (plan.first_row(layer), len(plan.retrieval_heads(layer)))
        for layer, number in layers.items()
        if plan.retrieval_heads(layer)
    }
    return readers, rows


class ScannedKeys:
    """The keys that retrieval heads scan, on the GPU.

    Args:
        heads: retrieval heads of every layer.
        position: of these layers among those with full attention.
        form: as in `HybridConfig.scan_keys`; what is not `cache` is all that the GPU has of these keys.
        dtype, batch, slots, dim: of the cache.
        device: of the copy.

    Attributes:
        keys: `[H, B, S]` of them; their numbers may be those of the cache, `[H, B, S, D]`.
        row_of: which of these are a head's; layers as `position` numbers them.
    """

    def __init__(
        self,
        heads: Mapping[int, tuple[int, ...]],
        position: Mapping[int, int],
        form: ScanKeys,
        dtype: torch.dtype,
        batch: int,
        slots: int,
        dim: int,
        device: torch.device,
    ) -> None:
        self._first, rows = {}, 0
        for layer, mine in heads.items():
            self._first[layer], rows = rows, rows + len(mine)
        self._heads = dict(heads)
        pairs = [(position[layer], head) for layer, mine in heads.items() for head in mine]
        self.row_of = {pair: row for row, pair in enumerate(pairs)}
        self.is_small = form != "cache"
        if form == "cache":
            with torch.inference_mode(False):
                self.keys = SmallKeys(torch.empty((rows, batch, slots, dim), dtype=dtype, device=device))
        else:
            self.keys = SmallKeys.allocate(form, (rows, batch, slots), dim, device)
        self._like = torch.empty(dim, dtype=dtype, device=device)
        self.known = 0

    @property
    def key_bytes(self) -> int:
        """Bytes of one key in the copy."""
        return self.keys.key_bytes

    def of_layer(self, layer: int) -> SmallKeys:
        """`[B, R, S]` keys."""
        first = self._first[layer]
        return self.keys.views(lambda part: part[first : first + len(self._heads[layer])].transpose(0, 1))

    def seen(self, layer: int, lengths: Tensor | None, starts: Tensor | None) -> tuple[KV, SmallKeys | None]:
        """The cache that a layer's scan takes, and the copy in its place; beside that, its keys are but a shape."""
        keys = self.of_layer(layer)
        if not self.is_small:
            return KV(keys.numbers, keys.numbers, lengths, starts), None
        like = self._like.expand(*keys.numbers.shape[:3], -1)
        return KV(like, like, lengths, starts), keys

    def truncate(self, slots: int) -> None:
        """The cache forgets every slot from `slots` on."""
        self.known = min(self.known, slots)

    def before_step(self, store_of: Callable[[int], tuple[Tensor, Tensor]], filled: int) -> None:
        """Copy new keys from host memory; the step itself writes the key of its token."""
        if self.known < filled:
            for layer, heads in self._heads.items():
                keys = store_of(layer)[0]
                for row, head in enumerate(heads):
                    for b, whole in enumerate(keys[:, head]):
                        self._copy((self._first[layer] + row, b), whole, filled)
        self.known = filled + 1

    def _copy(self, place: tuple[int, int], whole: Tensor, filled: int) -> None:
        """Keys `[S, D]` of a head; in fewer bits a piece at a time, which is first copied as it is."""
        if not self.is_small:
            self.keys.numbers[place][self.known : filled].copy_(whole[self.known : filled], non_blocking=True)
            return
        for begin in range(self.known, filled, _PIECE):
            piece = slice(begin, min(begin + _PIECE, filled))
            self.keys.write((*place, piece), whole[piece].to(self._like.device, non_blocking=True))
