"""A dense pass: several tokens of every sequence go through the model at once, and their cache entries are written.

Cache Correction rewrites the entries of tokens that were decoded sparsely; rounds (`verify`) do the same with drafts,
and look at the logits. Dimensions as in `ops`; `T` tokens a sequence, `V` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import ops
from ..attention import FullAttention
from ..models.routing import Window
from ..ops import KV
from ..ops.append.rope import Rotation
from ..ops.attend import MAX_TOKENS
from .cache import KVCache
from .context import Context
from .decoder import Decoder
from .step import Forward, running


class DensePass:
    """A pass whose launches are the same at every length, over one cache as large as it is now; a `step.Pass`.

    `filled` and `token_ids` are set before each run. Running a pass twice leaves the cache as running it once does.

    Args:
        cache: its stores are written in place; its length is left to the caller.
        tokens: `T`, 1 to `ops.attend.MAX_TOKENS`.
        full: counts the bytes that are read.
        windows: how far back each layer looks.
        kv_bytes: float64 `[B]`, to which every run adds the bytes that it read.
        starts: int32 `[B]`, in place of the cache's.

    Attributes:
        token_ids: int64 `[B, T]`.
        filled: int32 `[B]`, slots in use, the tokens' own included.
    """

    def __init__(
        self,
        cache: KVCache,
        tokens: int,
        full: FullAttention,
        windows: Sequence[Window],
        kv_bytes: Tensor,
        starts: Tensor | None = None,
    ) -> None:
        self.stores = [layer.store for layer in cache.layers]
        self.kv_bytes = kv_bytes
        self._full, self._windows, self._key_bytes = full, windows, cache.key_bytes
        batch, device = kv_bytes.shape[0], kv_bytes.device
        self.token_ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
        self.filled = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        self._starts = cache.starts if starts is None else starts
        self._before = torch.arange(tokens - 1, -1, -1, dtype=torch.int32, device=device)
        self._begins: dict[Window, Tensor | None] = {}

    def run(self, forward: Forward, model: nn.Module) -> Tensor:
        """Logits float32 `[B, T, V]` of the tokens that follow each."""
        self._lengths = self.filled if self._starts is None else self.filled - self._starts
        self._slots = (self.filled[:, None] - self._before).flatten()
        counts = self._lengths[:, None] - self._before
        for window in set(self._windows):
            self._begins[window] = None if window.is_all else window.first_slot(counts, torch.zeros_like(counts)).int()
        with running(self):
            if self.token_ids.shape[1] > 1:
                logits = forward(model, self.token_ids, self._lengths, self.filled[:1])
            else:
                logits = forward(model, self.token_ids[:, 0], self._lengths, self.filled[:1])[:, None]
        self._full.count_bytes(self.kv_bytes, self._lengths, None, True, self._key_bytes)
        return logits

    def attend_tokens(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, rotation: Rotation | None = None
    ) -> Tensor:
        """See `step.Pass`."""
        keys, values = self.stores[layer]
        new = key.flatten(0, 1), value.flatten(0, 1)
        rotated = ops.append(keys, values, new[0], new[1], self._slots, query.flatten(0, 1), rotation)
        assert rotated is not None  # a query was given
        return ops.attend_tokens(
            rotated.unflatten(0, query.shape[:2]),
            KV(keys, values, self._lengths, self._starts),
            scale,
            self._begins[self._windows[layer]],
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, rotation: Rotation | None = None
    ) -> Tensor:
        """A pass of one token (`step.Step`)."""
        return self.attend_tokens(layer, query[:, None], key[:, None], value[:, None], scale, rotation)[:, 0]


def correct(context: Context, decoder: Decoder, full: FullAttention) -> Tensor:
    """Cache Correction: rewrite the entries of the tokens that were decoded since the last one.

    It is the pass of rounds (`verify`) without a doubt: every token was taken.

    Args:
        context: its newest token has no entry yet.
        decoder: whose model and windows the pass has.
        full: counts the bytes that are read.

    Returns:
        float32 `[B, V]`, the logits after the newest token.
    """
    cache, tokens = context.cache, torch.stack(context._uncorrected, 1)
    cache.reserve(cache.length + 1)  # if that is refused, the call can be made again
    context._uncorrected.clear()
    cache.truncate(cache.length - tokens.shape[1] + 1)
    for part in tokens.split(MAX_TOKENS, 1):
        logits = decoder.attempt(context, partial(_pass_logits, context, decoder, full, part))
        cache.advance(part.shape[1])
    return logits[:, -1].clone()


def _pass_logits(context: Context, decoder: Decoder, full: FullAttention, token_ids: Tensor) -> Tensor:
    """Logits of a dense pass over tokens `[B, T]` that the cache does not count yet; overwritten by the next."""
    key, kept = (decoder, "pass", token_ids.shape[1]), context.kept_steps
    with torch.inference_mode():
        one, run = kept.get(key, (None, None))
        if one is None:
            one = DensePass(context.cache, token_ids.shape[1], full, decoder.windows, context.kv_bytes)
        one.token_ids.copy_(token_ids)
        one.filled.fill_(context.cache.length + token_ids.shape[1])
        if run is None:
            run = decoder.capture(one.run, [context.kv_bytes], compiled=False)
            kept[key] = one, run
        with decoder.route:
            return run()
