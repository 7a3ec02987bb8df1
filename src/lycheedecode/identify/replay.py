"""Replay: answer tokens pass through the model again, over one dense prefill, with attention that we choose.

    prepare   prompts -> Lesson: their KV cache, the answer tokens, and what the full model makes of them (the teacher)
    replay    Lesson + attention -> the hidden states of a student that decodes the same answer differently

All answer tokens go at once; a causal mask makes that the same as decoding them one by one. The prompt's cache is
shared by teacher and students, so gradients and extra memory come from the answer tokens alone.

Dimensions as in `ops`, and `T` answer tokens; a student sees `S + T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .. import ops
from ..config import HybridConfig
from ..models.routing import route_attention
from ..models.versions import cache_argument
from ..plan import HeadPlan
from ..prompts.makers import Prompt

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""`(layer, weights [B, Hkv, G, T, S + T], values [B, Hkv, S + T, D]) -> output [B, Hkv, G, T, D]`; weights are the
normalised float32 weights of full attention, so that every sparse form is a masked, renormalised copy of them."""


@dataclass(frozen=True)
class Lesson:
    """A batch of prompts of one length, prefilled."""

    prefix: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of the prompts, `[B, Hkv, S, D]` each, a pair for every layer."""
    answer_ids: Tensor
    """int64 `[B, T]`, the answer tokens that are fed to the model (all but the last), padded on the right."""
    mask: Tensor
    """bool `[B, T]`, False on padding."""
    teacher: Tensor
    """Last hidden states of the full model, `[B, T, E]`."""

    @property
    def prompt_length(self) -> int:
        return self.prefix[0][0].shape[2]


@torch.no_grad()
def prepare(model: nn.Module, prompts: Sequence[Prompt], chunk: int = 4096) -> Lesson:
    """Prefill prompts of equal length in chunks of `chunk` tokens, and run the teacher over their answers."""
    device = model.get_input_embeddings().weight.device
    if len({len(prompt.prompt_ids) for prompt in prompts}) != 1:
        raise ValueError("The prompts of a lesson must have the same length.")
    prompt_ids = torch.tensor([prompt.prompt_ids for prompt in prompts], device=device)
    cache = DynamicCache(config=model.config)
    for piece in prompt_ids.split(chunk, dim=1):
        model.base_model(input_ids=piece, use_cache=True, **cache_argument(cache))
    prefix = tuple((layer.keys, layer.values) for layer in cache.layers)

    # The prefill predicts the first token of the answer; feeding the others but the last predicts the rest.
    fed = [prompt.answer_ids[:-1] for prompt in prompts]
    answer_ids = torch.zeros(len(prompts), max(map(len, fed)), dtype=torch.int64)
    mask = torch.zeros_like(answer_ids, dtype=torch.bool)
    for row, ids in enumerate(fed):
        answer_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    answer_ids, mask = answer_ids.to(device), mask.to(device)
    lesson = Lesson(prefix, answer_ids, mask, torch.empty(0))
    return Lesson(prefix, answer_ids, mask, replay(model, lesson, full))


def replay(model: nn.Module, lesson: Lesson, attend: Attend) -> Tensor:
    """Last hidden states `[B, T, E]` of the answer tokens when every layer attends as `attend` says."""

    def routed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple:
        weights = _full_weights(query, key, lesson.prompt_length, options.get("scaling"))
        output = attend(module.layer_idx, weights, value)  # [B, Hkv, G, T, D]
        return output.to(query.dtype).flatten(1, 2).transpose(1, 2), None

    start = lesson.prompt_length
    positions = torch.arange(start, start + lesson.answer_ids.shape[1], device=lesson.answer_ids.device)
    with route_attention(model, routed):
        output = model.base_model(
            input_ids=lesson.answer_ids,
            position_ids=positions[None],
            **cache_argument(Cache(layers=[_Prefix(*pair) for pair in lesson.prefix])),
            use_cache=True,
        )
    return output.last_hidden_state.to(lesson.answer_ids.device)  # a model may be spread over several devices


def _full_weights(query: Tensor, key: Tensor, prompt_length: int, scale: float | None) -> Tensor:
    """Softmax weights `[B, Hkv, G, T, S + T]` in float32 of queries `[B, Hq, T, D]`."""
    steps, scale = query.shape[2], query.shape[-1] ** -0.5 if scale is None else scale
    grouped = (query * scale).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # one product for the whole group
    logits = (grouped @ key.mT).float().unflatten(2, (-1, steps))
    future = torch.ones(steps, steps, dtype=torch.bool, device=query.device).triu(1)
    return logits.masked_fill(F.pad(future, (prompt_length, 0)), float("-inf")).softmax(-1)


class _Prefix(CacheLayerMixin):
    """A cache layer that hands out prompt and answer together and keeps only the prompt."""

    is_compileable = False
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prompt is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers 5


# ---------------------------------------------------------------------- ways to attend


def full(layer: int, weights: Tensor, values: Tensor) -> Tensor:
    """Full attention: the teacher."""
    return _weigh(weights, values)


def over_blocks(weights: Tensor, values: Tensor, chosen: Tensor, block_size: int) -> Tensor:
    """Attention over chosen blocks only, `chosen` bool `[B, Hkv, T, N]`."""
    tokens = chosen[..., None].expand(*chosen.shape, block_size).flatten(-2)[..., : weights.shape[-1]]
    kept = weights * tokens[:, :, None]
    return _weigh(kept, values) / kept.sum(-1, keepdim=True)


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """`[B, Hkv, G, T, S] x [B, Hkv, S, D] -> [B, Hkv, G, T, D]`, one product for the whole group."""
    return (weights.flatten(2, 3) @ values.float()).unflatten(2, weights.shape[2:4])


@torch.no_grad()
def choose_blocks(weights: Tensor, config: HybridConfig) -> Tensor:
    """The blocks that each head would select at each answer token, bool `[B, H, T, N]`, for weights `[B, H, G, T, S]`.

    Answer tokens become sequences of their own length, and `ops.select_blocks` decides: the code that decodes.
    """
    batch, heads, _, steps, slots = weights.shape
    padded = F.pad(weights, (0, -slots % config.block_size)).unflatten(-1, (-1, config.block_size))
    per_query_head = padded.sum(-1) if config.block_score == "mass" else padded.amax(-1)
    scores = per_query_head.mean(2).movedim(1, 0).flatten(1, 2)  # [H, B * T, N]
    lengths = torch.arange(slots - steps + 1, slots + 1, dtype=torch.int32, device=weights.device).repeat(batch)
    nothing = weights.new_empty(1).expand(batch * steps, 1, slots, 1)
    found = ops.Selections.allocate(heads, batch * steps, config.capacity_blocks(scores.shape[-1]), weights.device)
    ops.select_blocks(scores, ops.KV(nothing, nothing, lengths), config, out=found)
    chosen = torch.zeros(heads, batch * steps, scores.shape[-1] + 1, dtype=torch.bool, device=weights.device)
    chosen.scatter_(-1, found.blocks.long() + 1, True)  # entry 0 catches the unused -1
    return chosen[..., 1:].unflatten(1, (batch, steps)).movedim(0, 1)


class Planned:
    """A student that follows a head plan, exactly as the engine decodes it."""

    def __init__(self, plan: HeadPlan, config: HybridConfig) -> None:
        self.plan = plan
        self.config = config
        self._chosen: dict[tuple[int, int], Tensor] = {}

    def __call__(self, layer: int, weights: Tensor, values: Tensor) -> Tensor:
        heads = list(self.plan.retrieval_heads(layer))
        if heads:
            chosen = choose_blocks(weights[:, heads], self.config)
            self._chosen.update({(layer, head): chosen[:, i] for i, head in enumerate(heads)})
        donors = [self._chosen[donor].to(weights.device) for donor in self.plan.donors[layer]]
        output = over_blocks(weights, values, torch.stack(donors, 1), self.config.block_size)
        if heads and self.config.retrieval_attention == "full":
            output[:, heads] = full(layer, weights[:, heads], values[:, heads])
        return output
