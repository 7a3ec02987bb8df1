"""Dense causal attention of a chunk of tokens of a prompt over everything before it.

    keys     | all earlier tokens          | the chunk's own |
    queries    see them all                  causal            -> two attentions without a mask, merged by their lse

So a chunk costs what FlashAttention costs, and its memory grows with the chunk alone. Windowed layers go in tiles of
queries, whose masks are small. On a GPU, chunks of a few tokens use `ops.attend_tokens`, which splits the keys.
Dimensions as in `ops`; `T` tokens of the chunk, the last of `S`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from .. import ops
from ..models.routing import AttentionRoute, Window, layer_of, refuse_a_mask, refuse_unless_plain
from ..models.shape import ModelError
from ..models.versions import cache_argument
from ..ops import KV, torch_private
from ..ops.attend import MAX_TOKENS
from ..ops.types import constant
from ..scoped import scoped
from .cache import KVCache

_TILE = 1024
"""Queries of a windowed layer that share a mask."""
_MUCH = 1 << 39
"""Products of a layer's queries and keys from which on cuDNN is worth its plan for a new shape.

It saved an H100 a third to a half of the attention, and planned for 45 to 90 ms, once for all layers.
"""


class ChunkAttention:
    """Attention of every layer of a model while a chunk passes through it.

    Args:
        windows: how far back each layer looks.
        padding: unused slots before each sequence; None where there are none.
    """

    def __init__(self, windows: Sequence[Window], padding: Sequence[int] | None = None) -> None:
        self._windows, self._padding = windows, padding

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Query `[B, Hq, T, D]` of the last `T` of `S` tokens, keys and values `[B, Hkv, S, D]` -> `[B, Hq, T, D]`."""
        window = self._windows[layer]
        if window.is_all and query.is_cuda and query.shape[2] <= MAX_TOKENS:
            kv = KV(keys, values, None, self._starts(query.device))
            return ops.attend_tokens(query.transpose(1, 2), kv, scale).transpose(1, 2)
        if not window.is_all:
            return attend_within(query, keys, values, window, self._padding, scale)
        if self._padding is None:
            return attend_causal(query, keys, values, scale)
        return _each_without_padding(query, keys, values, self._padding, scale)

    def _starts(self, device: torch.device) -> Tensor | None:
        return None if self._padding is None else constant(tuple(self._padding), torch.int32, device)


_passing: ContextVar[ChunkAttention] = ContextVar("lycheedecode_chunk")


def passing(chunk: ChunkAttention) -> AbstractContextManager[None]:
    """Attention layers of `route` that this thread passes belong to `chunk` while this is open."""
    return scoped(_passing, chunk)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The model computes in its own dtype: casts of single operations would leave keys and values in two."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def route(model: nn.Module) -> AttentionRoute:
    """Attention layers of `model` take part in the passing chunk while the route is open."""
    return AttentionRoute(model, _attention_layer, masks=False, name="chunk", brief=True)


def _attention_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for several tokens a sequence; the keys and values are all so far."""
    refuse_unless_plain(options)
    refuse_a_mask(attention_mask)
    chunk = _passing.get(None)
    if chunk is None:
        raise ModelError("Another thread is reading a prompt with this model; call it when that is done.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = chunk.attend(layer_of(module), query, key, value, scale).transpose(1, 2)
    return output.contiguous(), None  # as transformers' own functions return it: models may ask for a view


def read_chunk(
    model: nn.Module,
    chunk_route: AttentionRoute,
    chunk: ChunkAttention,
    cache: KVCache,
    token_ids: Tensor,
    keep: int = 1,
) -> Tensor:
    """Append tokens int64 `[B, T]` to a cache; returns logits float32 `[B, keep, V]` of the last ones.

    Raises:
        ModelError: the model does not store every token once in every layer.
    """
    first, tokens = cache.length, token_ids.shape[1]
    positions = torch.arange(first, first + tokens, device=token_ids.device)[None]
    if cache.starts is not None:
        positions = (positions - cache.starts[:, None]).clamp_(min=0)
    with chunk_route, passing(chunk), torch.inference_mode(), without_autocast(token_ids.device):
        output = model(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
            **cache_argument(cache),
        )
    cache.check_length(first + tokens)
    return output.logits[:, -keep:].float()


def attend_causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The last `T` of `S` tokens attend to themselves and all before them.

    Args:
        query: `[B, Hq, T, D]`.
        keys, values: `[B, Hkv, S, D]`.
        scale: factor on the logits.

    Returns:
        `[B, Hq, T, D]`.
    """
    earlier = keys.shape[2] - query.shape[2]
    own, own_lse = _with_lse(query, keys[:, :, earlier:], values[:, :, earlier:], scale, causal=True)
    if earlier == 0:
        return own
    past, past_lse = _with_lse(query, keys[:, :, :earlier], values[:, :, :earlier], scale, causal=False)
    share = (past_lse - own_lse).sigmoid()[..., None].float()
    return torch.lerp(own.float(), past.float(), share).to(query.dtype)


def _cudnn_pays(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> bool:
    products = query.numel() * keys.shape[2] // (2 if causal else 1)
    if not query.is_cuda or products < _MUCH or torch.cuda.get_device_capability(query.device)[0] < 9:
        return False
    return can_use_cudnn_attention(SDPAParams(query, keys, values, None, 0.0, causal, True))


def _with_lse(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention without a mask, and the logarithm of each query's mass, float32 `[B, Hq, T]`."""
    if query.device.type == "cpu":
        return torch_private.flash_on_cpu(query, keys, values, scale, causal)
    if _cudnn_pays(query, keys, values, causal):
        return torch_private.cudnn(query, keys, values, scale, causal)
    if can_use_flash_attention(SDPAParams(query, keys, values, None, 0.0, causal, True)):
        dim = query.shape[-1]
        query, keys, values = (F.pad(x, (0, -dim % 8)) if dim % 8 else x for x in (query, keys, values))
        output, lse = torch_private.flash(query, keys, values, scale, causal)
        return output[..., :dim], lse
    keys, values = (_repeated(x, query) for x in (keys, values))
    output, lse = torch_private.efficient(query, keys, values, scale, causal)
    return output, lse[:, :, : query.shape[2]]


def attend_within(
    query: Tensor, keys: Tensor, values: Tensor, window: Window, padding: Sequence[int] | None, scale: float
) -> Tensor:
    """`attend_causal` of a windowed layer, after `padding` unused slots."""
    tokens, slots = query.shape[2], keys.shape[2]
    starts = 0 if padding is None else torch.tensor(padding, device=query.device)[:, None]
    outputs = []
    for begin in range(slots - tokens, slots, _TILE):
        end = min(begin + _TILE, slots)
        low = max(begin + 1 - window.span, 0)
        asking = torch.arange(begin, end, device=query.device)
        first = window.first_slot(asking + 1, starts).clamp(max=asking)  # padding sees itself: anything but nothing
        seen = torch.arange(low, end, device=query.device)
        mask = (seen >= first[..., None]) & (seen <= asking[:, None])
        mask = mask if mask.dim() == 2 else mask[:, None]
        tile = query[:, :, begin - (slots - tokens) : end - (slots - tokens)]
        near_keys, near_values = (_repeated(x[:, :, low:end], query) for x in (keys, values))
        outputs.append(F.scaled_dot_product_attention(tile, near_keys, near_values, attn_mask=mask, scale=scale))
    return torch.cat(outputs, 2)


def _each_without_padding(query: Tensor, keys: Tensor, values: Tensor, padding: Sequence[int], scale: float) -> Tensor:
    """`attend_causal`, a sequence at a time; padding attends to nothing and gives zeros."""
    output, first = torch.zeros_like(query), keys.shape[2] - query.shape[2]
    for b, unused in enumerate(padding):
        skip = max(unused - first, 0)
        if skip < query.shape[2]:
            one = slice(b, b + 1)
            output[one, :, skip:] = attend_causal(
                query[one, :, skip:], keys[one, :, unused:], values[one, :, unused:], scale
            )
    return output


def _repeated(states: Tensor, query: Tensor) -> Tensor:
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)
