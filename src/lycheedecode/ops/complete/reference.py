"""The definition of a chunk's means, and of what they add to a softmax, in plain PyTorch."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ..types import KV, Completion, Selections, constant


def write_means(
    kv: KV, chunk: int, keys: Tensor, values: Tensor, first: Tensor | None, most: int, written: Tensor | None = None
) -> None:
    starts = [0] * kv.batch if kv.starts is None else kv.starts.tolist()
    known = [0] * kv.batch if first is None else first.tolist()
    counts = kv.token_counts().tolist()
    there = counts if written is None else written.tolist()
    for b, count in enumerate(counts):
        chunks = min(count // chunk, known[b] + most)
        if chunks <= known[b]:
            continue
        begin, end = starts[b] + known[b] * chunk, starts[b] + chunks * chunk
        page, entry = _places(torch.arange(known[b], chunks, device=keys.device), b, kv, chunk)
        for means, cache in ((keys, kv.keys), (values, kv.values)):
            tokens = _tokens(cache, kv, b, begin, end).unflatten(1, (-1, chunk))  # [Hkv, chunks, chunk, D]
            if there[b] < count:
                token = torch.arange(known[b] * chunk, chunks * chunk, device=keys.device).view(-1, chunk, 1)
                tokens = tokens.masked_fill(token >= there[b], 0)
            number = (there[b] - torch.arange(known[b], chunks, device=keys.device) * chunk).clamp(1, chunk)[:, None]
            # On a CPU `mean` takes thirty times as long as `sum` here.
            means[page, :, entry] = (tokens.float().sum(2) / number).to(means.dtype).transpose(0, 1)


def unread(
    query: Tensor,
    kv: KV,
    selections: Selections,
    rows: Tensor,
    block_size: int,
    heads: tuple[int, ...] | None,
    completion: Completion,
    most: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """What a head's unread tokens add to its softmax: logits `[B, H, G, C]` and mean values `[B, H, C, D]`, float32.

    Logits are -inf where nothing is unread, and values 0. None where no chunk is complete. `query`, `[B, H, G, D]`, has
    the factor on logits in it; other arguments as in `ops.attend_blocks`. `most`: chunks of a sequence, where the slots
    of `kv` do not say.
    """
    most = (kv.slots - 1) // completion.chunk if most is None else most
    chunks = min(selections.taken.shape[-1], most)
    if chunks <= 0:
        return None
    chunk = torch.arange(chunks, device=query.device)
    number = completion.chunk - block_size * selections.taken.index_select(0, rows).transpose(0, 1)[..., :chunks]
    if kv.lengths is not None or kv.starts is not None:
        complete = (kv.token_counts() - 1) // completion.chunk
        number = number.masked_fill(chunk >= complete[:, None, None], 0)
    factor = constant(completion.of(heads), torch.float32, query.device)
    weight = number * factor[:, None]  # [B, H, C]
    keys, values = (_means(x, kv, completion.chunk, chunk, heads) for x in (completion.keys, completion.values))
    nothing = weight <= 0
    logits = (query @ keys.mT + weight.log()[:, :, None]).masked_fill_(nothing[:, :, None], -inf)
    return logits, values.masked_fill(nothing[..., None], 0.0)


def _means(means: Tensor, kv: KV, size: int, chunk: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    """float32 `[B, H, C, D]`."""
    if heads is not None:
        means = means[:, list(heads)]
    if kv.page_table is None:
        return means[:, :, : len(chunk)].float()
    places = [_places(chunk, b, kv, size) for b in range(kv.batch)]
    return torch.stack([means[page, :, entry].transpose(0, 1) for page, entry in places]).float()


def _places(chunk: Tensor, b: int, kv: KV, size: int) -> tuple[Tensor, Tensor]:
    """Page and entry of the means of chunks of sequence `b`; see `Completion`."""
    if kv.page_table is None:
        return torch.full_like(chunk, b), chunk
    last = (chunk + 1) * size - 1 + (0 if kv.starts is None else kv.starts[b])
    page = kv.keys.shape[2]
    place = (last // page).clamp(max=kv.page_table.shape[1] - 1)
    return kv.page_table[b, place].clamp(min=0).long(), (last % page // size).long()


def _tokens(cache: Tensor, kv: KV, b: int, begin: int, end: int) -> Tensor:
    """Slots `begin` to `end - 1` of a sequence, `[Hkv, slots, D]`."""
    if kv.page_table is None:
        return cache[b, :, begin:end]
    page = cache.shape[2]
    first = begin // page
    pages = cache[kv.page_table[b, first : -(-end // page)].long()]  # [pages, Hkv, page, D]
    return pages.transpose(0, 1).flatten(1, 2)[:, begin - first * page : end - first * page]
