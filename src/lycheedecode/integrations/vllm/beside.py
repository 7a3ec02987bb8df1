"""Data kept beside vLLM's pages, page for page: the means of chunks, and copies of scanned keys in 8 or 4 bits.

    a step is to come, before any CUDA graph   `Beside.write`: what is not there yet of the sequences that get a token
    a layer of it                              reads both; a scan copies the newest token's key itself
    a layer of a step that drafts              first `Beside.follow`: means of chunks that drafts complete

Nothing is assumed about a page's past. When a sequence decodes for the first time, everything beside its pages is
written from what vLLM's cache holds, which reads the cache once, like one dense step. After that, a chunk is written
every `chunk` steps, never inside a step's graph. So means and copies match the pages, whatever filled these (prefill,
prefix cache, a KV connector) and wherever they lie after a preemption. Sequences that share pages write the same there.

A page has room for the means of `ceil(page / chunk)` chunks. With pages shorter than chunks most of it stays unused:
pages as long as chunks (vLLM's `--block-size`) cost least (`bytes_of_page`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...attention import HybridAttention, HybridState
from ...ops import KV, SmallKeys, key_bytes, reference, write_means


class Page(NamedTuple):
    """The shape of a page in vLLM's cache of a layer, and the dtype of queries."""

    heads: int
    tokens: int
    dim: int
    dtype: torch.dtype


class Grown(NamedTuple):
    """How sequences that draft have grown.

    Attributes:
        lengths: int32 `[rows]`, tokens of each without the newest.
        first: int32 `[rows]`, chunks whose means are final; there may be more.
        chunks: how many may have been completed since, at most.
    """

    lengths: Tensor
    first: Tensor
    chunks: int


class Beside:
    """Means and copies of the layers of a group.

    Args:
        attention: which layers are completed, which heads scan, and whether they scan copies.
        page: what vLLM's pages are like.
        device: of its cache.
    """

    def __init__(self, attention: HybridAttention, page: Page, device: torch.device) -> None:
        self.chunk, self._page, self._device = attention.config.chunk_tokens, page, device
        self._completed = set(attention.completed)
        self._form = attention.config.scan_keys
        copied = self._form != "cache"
        self._scanned = {layer: heads for layer, heads in attention.scanned.items() if heads and copied}
        self.pages = 0
        self.means: dict[int, Tensor] = {}
        self.copies: dict[int, SmallKeys] = {}

    @property
    def is_used(self) -> bool:
        return bool(self._completed or self._scanned)

    @property
    def layers(self) -> set[int]:
        """The layers that have something beside their pages."""
        return self._completed | self._scanned.keys()

    @property
    def has_copies(self) -> bool:
        return bool(self._scanned)

    @property
    def bytes_of_page(self) -> int:
        """Bytes that all layers together have beside one page."""
        means = len(self._completed) * self._page.heads * ceil(self._page.tokens / self.chunk) * self.mean_bytes * 2
        return means + sum(map(len, self._scanned.values())) * self._page.tokens * self.scan_bytes

    @property
    def mean_bytes(self) -> int:
        """Bytes of a mean key."""
        return self._page.dim * self._page.dtype.itemsize

    @property
    def scan_bytes(self) -> int:
        """Bytes of a key that is scanned."""
        return key_bytes(self._form, self._page.dim, self._page.dtype.itemsize)

    def fit(self, pages: int) -> None:
        """Make room beside so many pages; where their number changes, what was written is forgotten."""
        if pages == self.pages or not self.is_used:
            return
        heads, tokens, dim, dtype = self._page
        self.pages, self.means, self.copies = pages, {}, {}
        with torch.inference_mode(False):  # the self-check writes it outside of that mode
            for layer in self._completed:
                shape = 2, pages, heads, ceil(tokens / self.chunk), dim
                self.means[layer] = torch.zeros(shape, dtype=dtype, device=self._device)
        for layer, scanning in self._scanned.items():
            self.copies[layer] = SmallKeys.allocate(self._form, (pages, len(scanning), tokens), dim, self._device)

    def write(
        self,
        layers: Collection[int],
        kv_of: Callable[[int], KV],
        before: Sequence[int],
        after: Sequence[int],
        meant: Sequence[int] | None = None,
    ) -> None:
        """Write what belongs beside the pages of sequences that have grown, but for the copy of their newest token.

        Args:
            layers: some of `self.layers`; in a step, all of them.
            kv_of: the cache of a layer; lengths include the newest token, which need not be there yet. Most steps have
                nothing to write, and do not ask.
            before: tokens of each sequence for which all is written already; too low a number only costs time.
            after: tokens that it has at this step; too high a number does no harm.
            meant: as `before`, for means only; None: the same.
        """
        first = [max(length - 1, 0) // self.chunk for length in (before if meant is None else meant)]
        chunks = [max(length - 1, 0) // self.chunk - old for old, length in zip(first, after, strict=True)]
        rows = [row for row, count in enumerate(chunks) if count > 0]
        if rows and self._completed:
            known = torch.tensor([first[row] for row in rows], dtype=torch.int32).to(self._device)
            for layer in self._completed.intersection(layers):
                kv = _rows_of(kv_of(layer), rows)
                write_means(kv, self.chunk, *self.means[layer], known, max(chunks[row] for row in rows))
        if self._scanned:
            found = [self._pages_to_copy(old, new) for old, new in zip(before, after, strict=True)]
            spans = [(row, begin, end) for row, (begin, end) in enumerate(found) if begin < end]
            for layer in self._scanned.keys() & layers if spans else ():
                kv = kv_of(layer)
                pages = torch.cat([kv.page_table[row, begin:end] for row, begin, end in spans]).long()
                reference.write_pages_to_copy(self.copies[layer], kv.keys, self._scanned[layer], pages)

    def follow(self, layer: int, kv: KV, grown: Grown) -> None:
        """Write the means of a layer's newly completed chunks from what its cache holds; CUDA graphs include it."""
        if layer in self.means:
            written = kv._replace(lengths=grown.lengths)
            write_means(written, self.chunk, *self.means[layer], grown.first, grown.chunks)

    def _pages_to_copy(self, before: int, after: int) -> tuple[int, int]:
        """First page whose copy lacks a token, and the page after the last one; a scan copies token `after - 1`."""
        if before >= after - 1:
            return 0, 0
        return before // self._page.tokens, ceil((after - 1) / self._page.tokens)


def _rows_of(kv: KV, rows: list[int]) -> KV:
    """Some sequences, without their newest token."""
    if len(rows) < len(kv.lengths):
        index = torch.tensor(rows).to(kv.lengths.device)
        kv = kv._replace(lengths=kv.lengths[index], page_table=kv.page_table[index])
    return kv._replace(lengths=kv.lengths - 1)


@dataclass(eq=False)
class PagedState(HybridState):
    """What `HybridAttention` keeps of a step. Means and copies belong to pages, whatever the batch."""

    beside: Beside | None = None

    def copy_of(self, layer: int) -> SmallKeys | None:
        """See `HybridState`."""
        return self.beside.copies.get(layer)

    def means_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `HybridState`."""
        keys, values = self.beside.means[layer]
        return keys, values

    def scan_bytes(self, key_bytes: int) -> float:
        """See `HybridState`."""
        return self.beside.scan_bytes if self.beside.has_copies else key_bytes

    def mean_bytes(self, key_bytes: int) -> float:
        """See `HybridState`."""
        return self.beside.mean_bytes

    def first_rows(self, rows: int) -> PagedState:
        """The state of the first `rows` sequences, as views."""
        limits = None if self.limits is None else self.limits[:rows]
        return PagedState(self.selections.sequences(rows), limits=limits, beside=self.beside)


def share_of_memory(bytes_of_page: int, page_bytes: Iterable[int]) -> float:
    """The share of its cache's memory that is left to vLLM if each page needs `bytes_of_page` beside it.

    `page_bytes`: of a page in every layer whose pages they lie beside.
    """
    cache = sum(page_bytes)
    return cache / (cache + bytes_of_page)
