"""Replay: answer tokens pass through the model again, over one dense prefill, with attention that we choose.

    prepare   prompts -> TeacherBatch: their KV cache, the answer, and what the full model makes of it (the teacher)
    replay    TeacherBatch + attention -> the hidden states of a student that decodes the same answer differently

All answer tokens go at once; a causal mask makes that the same as decoding them one by one. The prompt's cache is
shared by teacher and students, so gradients and extra memory come from the answer tokens alone. Layers that are not
global (sliding windows, chunks, linear attention) stay as they are, with the cache that transformers gives them.

Dimensions as in `ops`, and `T` answer tokens; a student sees `S + T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .. import ops
from ..config import HybridConfig
from ..engine.prompt import check_token_ids
from ..models.routing import RoutedAttention, layer_of, refuse_unless_plain, route_attention
from ..models.shape import ModelShape, vocabulary_of
from ..models.versions import cache_argument
from ..plan import HeadPlan
from ..prompts.makers import Prompt
from ..roles import shares_of


class TeacherBatchMeans(NamedTuple):
    """Chunks of a layer's tokens, each as one token.

    Attributes:
        weights: what one token with the chunk's mean key would weigh, float32 `[B, Hkv, G, T, C]`, in units of
            `Seen.weights`.
        values: mean values, float32 `[B, Hkv, C, D]`.
    """

    weights: Tensor
    values: Tensor


@dataclass(frozen=True)
class Seen:
    """What attention of one layer has to do with.

    Attributes:
        weights: normalised weights of full attention, float32 `[B, Hkv, G, T, S + T]`, so that every sparse form is a
            masked, renormalised copy of them.
        values: `[B, Hkv, S + T, D]`.
        keys: like `values`.
        query: scaled, `[B, Hkv, G * T, D]`.
        log_sum: logarithm of what the weights were divided by, `[B, Hkv, G, T, 1]`.
    """

    weights: Tensor
    values: Tensor
    keys: Tensor
    query: Tensor
    log_sum: Tensor

    def means(self, chunk: int) -> TeacherBatchMeans:
        """The means of all full chunks of `chunk` tokens, and the weights that queries give them."""
        whole = self.keys.shape[2] // chunk * chunk
        keys, values = (
            tokens[:, :, :whole].unflatten(2, (-1, chunk)).mean(3, dtype=torch.float32).to(tokens.dtype)
            for tokens in (self.keys, self.values)
        )
        logits = (self.query @ keys.mT).float().unflatten(2, self.weights.shape[2:4])
        return TeacherBatchMeans((logits - self.log_sum).exp(), values.float())

    def heads(self, heads: Sequence[int]) -> Seen:
        """The same, of some KV heads only."""
        return Seen(*(part[:, list(heads)] for part in vars(self).values()))


Attend = Callable[[int, Seen], Tensor]
"""`(layer, what it sees) -> output [B, Hkv, G, T, D]`."""


@dataclass(frozen=True)
class TeacherBatch:
    """A batch of prompts of one length, prefilled."""

    prefix: tuple[Any, ...]
    """An entry for every layer: keys and values of the prompts, `[B, Hkv, S, D]` each; or, where a layer is not global,
    its layer of the cache."""
    prompt_length: int
    """Tokens `S` of each prompt."""
    answer_ids: Tensor
    """int64 `[B, T]`, the answer tokens that are fed to the model (all but the last), padded on the right."""
    mask: Tensor
    """bool `[B, T]`, False on padding."""
    teacher: Tensor
    """Last hidden states of the full model, `[B, T, E]`."""


@dataclass(frozen=True)
class Drawn:
    """Answers that the model draws itself, instead of those of the prompts.

    Attributes:
        tokens: of each answer.
        temperature: of the distribution that they are drawn from.
        seed: of the random numbers.
    """

    tokens: int
    temperature: float = 0.7
    seed: int = 0


@torch.no_grad()
def prepare(
    model: PreTrainedModel, prompts: Sequence[Prompt], chunk: int = 4096, drawn: Drawn | None = None
) -> TeacherBatch:
    """Prefill prompts of equal length in chunks of `chunk` tokens, and run the teacher over their answers.

    Raises `PromptError` for token ids that the model does not know.
    """
    device = model.get_input_embeddings().weight.device
    if len({len(prompt.prompt_ids) for prompt in prompts}) != 1:
        raise ValueError("The prompts of a lesson must have the same length.")
    check_token_ids([prompt.prompt_ids + prompt.answer_ids for prompt in prompts], vocabulary_of(model))
    prompt_ids = torch.tensor([prompt.prompt_ids for prompt in prompts], device=device)
    cache = DynamicCache(config=model.config)
    for piece in prompt_ids.split(chunk, dim=1):
        states = model.base_model(input_ids=piece, use_cache=True, **cache_argument(cache)).last_hidden_state[:, -1:]
    inside = set(ModelShape.of(model).global_layers)
    prefix = tuple(
        (layer.keys, layer.values) if i in inside else deepcopy(layer) for i, layer in enumerate(cache.layers)
    )

    # The prefill predicts the first token of the answer; feeding the others but the last predicts the rest.
    answers = [prompt.answer_ids for prompt in prompts] if drawn is None else _draw(model, cache, states, drawn)
    fed = [ids[:-1] for ids in answers]
    answer_ids = torch.zeros(len(prompts), max(map(len, fed)), dtype=torch.int64)
    mask = torch.zeros_like(answer_ids, dtype=torch.bool)
    for row, ids in enumerate(fed):
        answer_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    answer_ids, mask = answer_ids.to(device), mask.to(device)
    lesson = TeacherBatch(prefix, prompt_ids.shape[1], answer_ids, mask, torch.empty(0))
    return replace(lesson, teacher=replay(model, lesson, full))


def _draw(model: PreTrainedModel, cache: Cache, states: Tensor, drawn: Drawn) -> list[list[int]]:
    """Answers after a prefill whose last hidden states `[B, 1, E]` these are; the cache grows."""
    noise, head, answer = torch.Generator().manual_seed(drawn.seed), model.get_output_embeddings(), []
    for _ in range(drawn.tokens):
        probabilities = (head(states)[:, 0].float() / drawn.temperature).softmax(-1)
        exponential = torch.empty(probabilities.shape).exponential_(generator=noise)
        answer.append((probabilities / exponential.to(probabilities.device)).argmax(-1))
        states = model.base_model(
            input_ids=answer[-1][:, None], use_cache=True, **cache_argument(cache)
        ).last_hidden_state
    return torch.stack(answer, 1).tolist()


def replay(model: PreTrainedModel, lesson: TeacherBatch, attend: Attend) -> Tensor:
    """Last hidden states `[B, T, E]` of the answer tokens when every global layer attends as `attend` says."""
    shape = ModelShape.of(model)
    inside, others = frozenset(shape.global_layers), RoutedAttention(shape)

    def routed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> tuple:
        layer = layer_of(module)
        if layer not in inside:
            return others(module, query, key, value, *rest, **options)
        refuse_unless_plain(options)
        output = attend(layer, _look(query, key, value, lesson.prompt_length, options.get("scaling")))
        return output.to(query.dtype).flatten(1, 2).transpose(1, 2), None

    start = lesson.prompt_length
    positions = torch.arange(start, start + lesson.answer_ids.shape[1], device=lesson.answer_ids.device)
    with route_attention(model, routed):
        output = model.base_model(
            input_ids=lesson.answer_ids,
            position_ids=positions[None],
            **cache_argument(Cache(layers=[_again(entry) for entry in lesson.prefix])),
            use_cache=True,
        )
    return output.last_hidden_state.to(lesson.answer_ids.device)  # a model may be spread over several devices


def _look(query: Tensor, keys: Tensor, values: Tensor, prompt_length: int, scale: float | None) -> Seen:
    """What queries `[B, Hq, T, D]` make of keys `[B, Hkv, S + T, D]`, each of those before it and its own."""
    steps, scale = query.shape[2], query.shape[-1] ** -0.5 if scale is None else scale
    grouped = (query * scale).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # one product for the whole group
    logits = (grouped @ keys.mT).float().unflatten(2, (-1, steps))
    future = torch.ones(steps, steps, dtype=torch.bool, device=query.device).triu(1)
    logits = logits.masked_fill(F.pad(future, (prompt_length, 0)), float("-inf"))
    return Seen(logits.softmax(-1), values, keys, grouped, logits.detach().logsumexp(-1, keepdim=True))


def _again(entry: Any) -> CacheLayerMixin:
    """A layer of the cache as the prefill left it, for one replay."""
    if isinstance(entry, tuple):
        return _Prefix(*entry)
    layer = deepcopy(entry)
    if hasattr(layer, "update_recurrent_state"):
        # It writes into the state that the backward pass needs; the new one is never used.
        layer.update_recurrent_state = lambda states, *_, **__: states
    return layer


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


def full(layer: int, seen: Seen) -> Tensor:
    """Full attention: the teacher."""
    return weigh(seen.weights, seen.values)


class Parts(NamedTuple):
    """Sums over the tokens that are read, and over the others by the means of their chunks (see `Completion`).

    Attributes:
        read, unread: weighted sums of values, `[B, Hkv, G, T, D]`.
        read_mass, unread_mass: sums of weights, `[B, Hkv, G, T, 1]`.
    """

    read: Tensor
    read_mass: Tensor
    unread: Tensor | None = None
    unread_mass: Tensor | None = None

    def output(self, factor: Tensor | float = 0.0) -> Tensor:
        """The attention output when unread tokens count with `factor` times the weight of their means."""
        if self.unread is None or self.unread_mass is None:
            return self.read / self.read_mass
        return (self.read + factor * self.unread) / (self.read_mass + factor * self.unread_mass)


def over_blocks(seen: Seen, chosen: Tensor, block_size: int) -> Tensor:
    """Attention over chosen blocks only, `chosen` bool `[B, Hkv, T, N]`."""
    return in_parts(seen, chosen, block_size).output()


def in_parts(
    seen: Seen, chosen: Tensor, block_size: int, chunk: int = 0, means: TeacherBatchMeans | None = None
) -> Parts:
    """Attention over chosen blocks `[B, Hkv, T, N]`, and over what they leave of chunks of `chunk` tokens.

    Args:
        means: `seen.means(chunk)`, None to leave the unread tokens out.
    """
    weights, steps = seen.weights, chosen.shape[2]
    tokens = chosen[..., None].expand(*chosen.shape, block_size).flatten(-2)[..., : weights.shape[-1]]
    kept = weights * tokens[:, :, None]
    parts = Parts(weigh(kept, seen.values), kept.sum(-1, keepdim=True))
    if means is None or not means.values.shape[2]:
        return parts
    chunks = torch.arange(means.values.shape[2], device=weights.device)
    read = (
        block_size
        * F.pad(chosen, (0, -chosen.shape[-1] % (chunk // block_size)))
        .unflatten(-1, (-1, chunk // block_size))
        .sum(-1)[..., : len(chunks)]
    )
    before = torch.arange(weights.shape[-1] - steps, weights.shape[-1], device=weights.device)
    number = (chunk - read) * (chunks < before[:, None] // chunk)  # a chunk counts once the step after it begins
    unread = number[:, :, None] * means.weights
    return Parts(parts.read, parts.read_mass, weigh(unread, means.values), unread.sum(-1, keepdim=True))


def weigh(weights: Tensor, values: Tensor) -> Tensor:
    """`[B, Hkv, G, T, S] x [B, Hkv, S, D] -> [B, Hkv, G, T, D]`, one product for the whole group."""
    return (weights.flatten(2, 3) @ values.float()).unflatten(2, weights.shape[2:4])


@torch.no_grad()
def choose_blocks(weights: Tensor, config: HybridConfig, shares: ops.Shares | None = None) -> Tensor:
    """The blocks that each head would select at each answer token, bool `[B, H, T, N]`, for weights `[B, H, G, T, S]`.

    Answer tokens become sequences of their own length, and `ops.select_blocks` decides: the code that decodes. With
    `shares`, a selection for each of them, in place of `H`.
    """
    batch, heads, _, steps, slots = weights.shape
    padded = F.pad(weights, (0, -slots % config.block_size)).unflatten(-1, (-1, config.block_size))
    per_query_head = padded.sum(-1) if config.block_score == "mass" else padded.amax(-1)
    scores = per_query_head.mean(2).movedim(1, 0).flatten(1, 2)  # [H, B * T, N]
    lengths = torch.arange(slots - steps + 1, slots + 1, dtype=torch.int32, device=weights.device).repeat(batch)
    nothing = weights.new_empty(1).expand(batch * steps, 1, slots, 1)
    rows, capacity = heads, config.capacity_blocks(scores.shape[-1])
    if shares is not None:
        rows, capacity = len(shares.heads), min(max(capacity, *shares.blocks), scores.shape[-1])
    found = ops.Selections.allocate(rows, batch * steps, capacity, weights.device)
    ops.select_blocks(scores, ops.KV(nothing, nothing, lengths), config, out=found, shares=shares)
    chosen = torch.zeros(rows, batch * steps, scores.shape[-1] + 1, dtype=torch.bool, device=weights.device)
    chosen.scatter_(-1, found.blocks.long() + 1, True)  # entry 0 catches the unused -1
    return chosen[..., 1:].unflatten(1, (batch, steps)).movedim(0, 1)


class Planned:
    """A student that follows a head plan, exactly as the engine decodes it."""

    def __init__(self, plan: HeadPlan, config: HybridConfig) -> None:
        self.plan = plan
        self.config = config
        self._factors = completion_factors(plan, config)
        self._chosen: dict[int, Tensor] = {}

    def __call__(self, layer: int, seen: Seen) -> Tensor:
        plan, heads, config = self.plan, list(self.plan.retrieval_heads(layer)), self.config
        if heads:
            shares = None if plan.budgets is None else shares_of(plan.rows(layer), heads, config)
            chosen = choose_blocks(seen.weights[:, heads], config, shares)
            self._chosen.update(enumerate(chosen.unbind(1), plan.first_row(layer)))
        donors = [self._chosen[row].to(seen.weights.device) for row in plan.donor_rows(layer)]
        factors = torch.tensor(self._factors[layer], device=seen.weights.device)
        means = seen.means(config.chunk_tokens) if any(self._factors[layer]) else None
        parts = in_parts(seen, torch.stack(donors, 1), config.block_size, config.chunk_tokens, means)
        output = parts.output(factors[:, None, None, None])
        if heads and config.retrieval_attention == "full":
            output[:, heads] = full(layer, seen.heads(heads))
        return output


def completion_factors(plan: HeadPlan, config: HybridConfig) -> tuple[tuple[float, ...], ...]:
    """The factor of every head's completion, `L x Hkv`, under a config."""
    if config.completion == "plan" and plan.completion is not None:
        return plan.completion
    factor = 1.0 if config.completion == "centroid" else 0.0
    return ((factor,) * plan.num_kv_heads,) * plan.num_layers
