"""What tests of completion run on: caches, their means, selections, and the loop that is the truth."""

from math import ceil, log, nan

import torch

from lycheedecode.ops import KV, Selections

SCALE, BLOCK, CHUNK = 0.3, 4, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_cache(lengths, starts=None, slots=None, heads=2, dim=16, dtype=torch.float32, device="cpu"):
    """A cache of random tokens; slots without one are NaN."""
    starts = starts or [0] * len(lengths)
    slots = slots or max(s + n for s, n in zip(starts, lengths, strict=True))
    store = torch.full((2, len(lengths), heads, slots, dim), nan, dtype=dtype, device=device)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        store[:, b, :, start : start + length] = torch.randn(2, heads, length, dim).to(store)
    plain = not any(starts) and all(length == slots for length in lengths)
    return KV(
        *store,
        None if plain else torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device) if any(starts) else None,
    )


def paged(kv, page):
    """The same cache in pages out of order."""
    pages = ceil(kv.slots / page)
    order = torch.randperm(kv.batch * pages, generator=torch.Generator().manual_seed(2)) + 1
    stores = []
    for cache in kv[:2]:
        shape = (kv.batch * pages + 2, cache.shape[1], page, cache.shape[3])
        store = torch.full(shape, nan, dtype=cache.dtype, device=cache.device)
        for i, where in enumerate(order.tolist()):
            piece = cache[i // pages, :, i % pages * page : (i % pages + 1) * page]
            store[where, :, : piece.shape[1]] = piece
        stores.append(store)
    return KV(*stores, kv.token_counts(), kv.starts, order.view(kv.batch, pages).int().to(kv.keys.device))


def room_for_means(kv, chunk=CHUNK):
    """Mean keys and mean values of a cache, all NaN so far."""
    pages, heads, page, dim = kv.keys.shape
    chunks = max(page // chunk, 1) if kv.page_table is not None else max(kv.slots // chunk, 1)
    return torch.full((2, pages, heads, chunks, dim), nan, dtype=kv.keys.dtype, device=kv.keys.device)


def make_selections(kv, rows, capacity, chunk=CHUNK, block=BLOCK):
    """Random blocks of each sequence, counted by chunk."""
    out = Selections.allocate(rows, kv.batch, capacity, kv.keys.device, max(kv.slots // chunk, 1))
    for b, length in enumerate(kv.token_counts().tolist()):
        existing = ceil(length / block)
        for r in range(rows):
            count = min(int(torch.randint(1, capacity + 1, ())), existing)
            out.blocks[r, b, :count] = torch.randperm(existing)[:count].int().to(out.blocks)
            out.counts[r, b] = count
    out.count_taken(chunk // block)
    return out


def naive(query, kv, selections, rows, heads, factors, chunk=CHUNK, block=BLOCK):
    """A loop over sequences, heads and chunks of a contiguous cache, in float64."""
    lengths, group = kv.token_counts().tolist(), query.shape[1] // kv.keys.shape[1]
    output = torch.zeros(kv.batch, len(heads) * group, query.shape[2], dtype=torch.float64, device=query.device)
    for b, length in enumerate(lengths):
        start = 0 if kv.starts is None else int(kv.starts[b])
        for h, (head, row) in enumerate(zip(heads, rows.tolist(), strict=True)):
            keys, values = (x[b, head, start : start + length].double() for x in kv[:2])
            chosen = [n for n in selections.blocks[row, b].tolist() if n >= 0]
            read = sorted({t for n in chosen for t in range(n * block, min((n + 1) * block, length))})
            k, v, bias = [keys[read]], [values[read]], [0.0] * len(read)
            for c in range((length - 1) // chunk):
                unread = set(range(c * chunk, (c + 1) * chunk)) - set(read)
                if unread and factors[head]:
                    k.append(keys[c * chunk : (c + 1) * chunk].mean(0, keepdim=True))
                    v.append(values[c * chunk : (c + 1) * chunk].mean(0, keepdim=True))
                    bias.append(log(factors[head] * len(unread)))
            if read:
                logits = SCALE * query[b, head * group : (head + 1) * group].double() @ torch.cat(k).T
                weights = (logits + torch.tensor(bias, dtype=torch.float64, device=query.device)).softmax(-1)
                output[b, h * group : (h + 1) * group] = weights @ torch.cat(v)
    return output


def poison(kv, selections, rows, heads, block=BLOCK):
    """NaN in every block that a head's row did not select."""
    keys, values = kv.keys.clone(), kv.values.clone()
    for head, row in zip(heads, rows.tolist(), strict=True):
        for b, length in enumerate(kv.token_counts().tolist()):
            start = 0 if kv.starts is None else int(kv.starts[b])
            for n in set(range(ceil(length / block))) - set(selections.blocks[row, b].tolist()):
                for x in (keys, values):
                    x[b, head, start + n * block : start + min((n + 1) * block, length)] = nan
    return kv._replace(keys=keys, values=values)
