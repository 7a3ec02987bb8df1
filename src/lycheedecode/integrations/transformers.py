"""Hugging Face `generate`, made hybrid for as long as a context is open."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention import HybridAttention, HybridState
from ..checks import check_tokenizer, settings_from
from ..config import ConfigLike, HybridConfig
from ..engine.plans import PlanLike, plan_from
from ..engine.prompt import check_token_ids
from ..errors import ConfigError
from ..models.routing import RoutedAttention, layer_of, refuse_unless_plain, route_attention, supported_shape
from ..models.shape import ModelError, ModelShape, inner_model, vocabulary_of
from ..models.versions import CACHE_NAMES
from ..ops import KV, Selections

_MOST_CANDIDATES = 128
"""In assisted decoding. A pass that asks for more logits at once scores a text that exists already."""
_READ_AGAIN = (
    "The text is read again from its beginning, into a cache that holds {} tokens: assisted decoding (assistant_model, "
    "prompt_lookup_num_tokens) needs an empty one."
)
_NO_WEIGHTS = "Attention weights (output_attentions) do not exist in hybrid decoding."


@contextmanager
def hybrid(
    model: nn.Module, plan: PlanLike, config: ConfigLike = None, *, tokenizer: Any = None
) -> Iterator[nn.Module]:
    """Decode steps of `model` follow `plan` while the context is open; nothing is left behind when it closes.

    `plan` is a plan, its name or file, or `auto`: the model's known plan, or else a new one, which needs the tokenizer.
    `config` may be a mapping such as `{"budget_tokens": 512}`.

    It works with `generate` (greedy, sampling, beams, streaming) and any other caller, with batches padded on the left,
    dynamic and static caches, and a cache that already holds a prefix. Prefill stays dense. Static caches are not
    compiled inside the context. If the plan completes heads, every step computes the chunk means from the whole cache;
    `Engine` keeps them instead.

    In assisted decoding (`assistant_model`, `prompt_lookup_num_tokens`), each candidate attends as in a decode step of
    its own, so the text does not depend on the candidates. A forward pass over one sequence is taken to hold
    candidates when it asks for 2 to 128 logits (`logits_to_keep`). The cache must be empty at the start: over a filled
    one, transformers 5 reads the whole prompt again, which is refused here.

    >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
    >>> with hybrid(model, plan, HybridConfig(budget_tokens=1024)):
    ...     output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    >>> output.shape[1] - inputs["input_ids"].shape[1]
    4

    Raises:
        ModelError: the model's attention cannot be replaced, or is routed already.
        PlanError: the plan does not fit the model.
        ConfigError: a setting that only `Engine` supports.
    """
    config = settings_from(HybridConfig, config, "config")
    check_tokenizer(tokenizer)
    if config.correction_every:
        raise ConfigError("Cache Correction (correction_every) rewrites the cache, which only Engine can do.")
    if config.verify_every:
        raise ConfigError(
            "Lossless decoding (verify_every) drafts and verifies over one cache, which only Engine does: generate's "
            "assisted decoding keeps a cache for the drafts and another for the model."
        )
    if config.refresh_every > 1:
        raise ConfigError("refresh_every above 1 must know which sequence continues which, as only Engine does.")
    if config.scan_keys != "cache":
        raise ConfigError(f"scan_keys={config.scan_keys!r} keeps a copy beside the cache, which only Engine does.")
    if config.step_weights != "model":
        raise ConfigError("step_weights='float8' keeps a copy of the weights, which only Engine does.")
    head_plan = plan_from(plan, model, tokenizer, config)
    if head_plan is None:
        raise ConfigError("Hybrid attention needs a plan: a HeadPlan, the name or file of one, or 'auto'.")
    shape = supported_shape(model, head_plan)
    if getattr(inner_model(model).config, "output_attentions", False):
        raise ModelError(_NO_WEIGHTS)
    steps = _MaskedSteps(HybridAttention(head_plan, config, shape.global_layers))
    inner = inner_model(model)
    with route_attention(model, _StepsAndCandidates(shape, steps)), _without_compilation(inner), _passes(inner, steps):
        yield model


class _StepsAndCandidates(RoutedAttention):
    """Attention of a pass that may end in candidates: tokens of which each attends as in a step of its own."""

    def __init__(self, shape: ModelShape, steps: _MaskedSteps) -> None:
        super().__init__(shape, steps)
        self._steps = steps

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        tokens, number = query.shape[2], self._steps.candidates_of(query)
        if not number or layer_of(module) not in self._global_layers:
            return super().__call__(module, query, key, value, attention_mask, scaling, **options)
        refuse_unless_plain(options)
        self._shape.check_heads(layer_of(module), key.shape[1])
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        newest = query[0, :, -number:].transpose(0, 1)
        found = self._steps.attend_candidates(layer_of(module), newest, key, value, attention_mask, scale)
        if number == tokens:
            return found[None], None
        prompt, _ = super().__call__(module, query, key, value, attention_mask, scaling, **options)
        return torch.cat([prompt[:, :-number], found[None]], 1), None


class _MaskedSteps(threading.local):
    """Finds out, from the masks alone, where the tokens of each sequence lie; once a step, not once a layer.

    Every thread that calls the model has steps of its own.

    Attributes:
        logits_to_keep: of the pass that is being made.
    """

    logits_to_keep = 0

    def __init__(self, attention: HybridAttention) -> None:
        self._attention = attention
        self._layer = 1 << 30  # whatever layer comes first, a pass begins
        self._mask: Tensor | None = None
        self._lengths: Tensor | None = None
        self._starts: Tensor | None = None
        self._room = (0, 0)
        self._state: HybridState
        self._rows: Selections

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        if self._is_news(layer, mask):
            self._lengths, self._starts = (None, None) if mask is None else token_spans(mask, keys.shape[2])
        kv = KV(keys, values, self._lengths, self._starts)
        return self._attention(layer, query, kv, self._state_for(layer, kv), scale)

    def candidates_of(self, query: Tensor) -> int:
        """How many of the newest tokens of queries `[B, Hq, T, D]` are candidates; the last one of a prompt is none."""
        batch, _, tokens, _ = query.shape
        if batch > 1 or tokens == 1 or not 2 <= self.logits_to_keep <= _MOST_CANDIDATES:
            return 0
        return tokens if tokens <= self.logits_to_keep else self.logits_to_keep - 1

    def attend_candidates(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention `[n, Hq, D]` of the newest n tokens of one sequence: n sequences of different lengths in one cache.

        Args:
            layer, scale: as of a step.
            query: `[n, Hq, D]`.
            keys, values: `[1, Hkv, S, D]`.
            mask: bool `[1, 1, T, S]`, of which the last n rows are theirs; None: causal.
        """
        number, slots = query.shape[0], keys.shape[2]
        if self._is_news(layer, mask):
            self._lengths, self._starts = torch.arange(slots - number, slots).int().to(keys.device) + 1, None
            if mask is not None:
                rows = mask[0, :, -number:].transpose(0, 1)[:, :, None]  # [n, 1, 1, S]
                self._lengths, self._starts = token_spans(rows, slots)
        whole = KV(keys, values, *(None if one is None else one[-1:] for one in (self._lengths, self._starts)))
        state = self._state_for(layer, whole)
        if number > self._rows.counts.shape[1]:
            self._rows = self._attention.allocate(2 * number, self._room[1], keys.device).selections
        kv = KV(keys.expand(number, -1, -1, -1), values.expand(number, -1, -1, -1), self._lengths, self._starts)
        means = None if state.means is None else state.means.shared(number)
        return self._attention(layer, query, kv, HybridState(self._rows.sequences(number), means=means), scale)

    def _is_news(self, layer: int, mask: Tensor | None) -> bool:
        """Whether a layer is the first of a pass that is given its mask."""
        news = layer <= self._layer or mask is not self._mask
        self._layer, self._mask = layer, mask
        return news

    def _state_for(self, layer: int, kv: KV) -> HybridState:
        """The state, with room for this cache, and the layer's means."""
        if kv.batch != self._room[0] or kv.slots > self._room[1]:
            self._room = kv.batch, kv.slots + 256  # a cache that grows by a token a step then seldom asks again
            self._state = self._attention.allocate(*self._room, kv.keys.device)
            self._rows = self._state.selections
        if self._state.means is not None and layer in self._state.means.layers:
            self._state.means.write(layer, kv)
        return self._state


def token_spans(mask: Tensor, slots: int) -> tuple[Tensor | None, Tensor | None]:
    """`(lengths, starts)`, int32 `[B]` each, of a decode step's mask, bool `[B, 1, 1, S]`; None, None if all is seen.

    Raises:
        ModelError: a mask that is not boolean, differs between heads, or has gaps.
    """
    if mask.dim() != 4 or mask.dtype.is_floating_point or mask.shape[1:] != (1, 1, slots):
        raise ModelError(
            f"Hybrid attention needs a boolean mask [B, 1, 1, {slots}], not {mask.dtype} {tuple(mask.shape)}."
        )
    seen = mask[:, 0, 0].bool()
    if seen.all():
        return None, None
    lengths = seen.sum(-1)
    starts = seen.int().argmax(-1)
    last = slots - 1 - seen.flip(-1).int().argmax(-1)
    if (last - starts + 1 != lengths).any():
        raise ModelError("Hybrid attention needs the tokens of a sequence side by side; this attention mask has gaps.")
    return lengths.int(), starts.int()


@contextmanager
def _passes(model: PreTrainedModel, steps: _MaskedSteps) -> Iterator[None]:
    """Look at what every pass is asked for: how many logits, which tell candidates.

    Refused are passes without a cache, which would read the prompt anew, densely; those that read into a cache what it
    holds already; and to return attention weights.
    """
    vocabulary = vocabulary_of(model)

    def look(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
        given = options.get("use_cache")
        if not (model.config.get_text_config(decoder=True).use_cache if given is None else given):
            raise ModelError("Hybrid attention needs the KV cache: leave out use_cache=False.")
        if options.get("output_attentions"):
            raise ModelError(_NO_WEIGHTS)
        _refuse_unknown_tokens(options.get("input_ids"), vocabulary)
        _refuse_second_reading(options)
        kept = options.get("logits_to_keep", 0)
        steps.logits_to_keep = kept if isinstance(kept, int) else 0

    def forget(*_: Any) -> None:
        steps.logits_to_keep = 0

    hooks = (
        model.register_forward_pre_hook(look, with_kwargs=True),
        model.register_forward_hook(forget, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_unknown_tokens(token_ids: Tensor | None, vocabulary: int) -> None:
    """Raise `PromptError` for ids that the model does not know; single tokens on a GPU would have to be waited for."""
    if token_ids is not None and token_ids.numel() and not (token_ids.is_cuda and token_ids.shape[1] == 1):
        check_token_ids([torch.stack(token_ids.aminmax()).tolist()], vocabulary)


def _refuse_second_reading(options: dict[str, Any]) -> None:
    """Raise `ModelError` for tokens that a mask has no room for or, without one, whose positions begin anew."""
    token_ids, mask, positions = map(options.get, ("input_ids", "attention_mask", "position_ids"))
    caches = (options.get(name) for name in CACHE_NAMES)
    cache = next((one for one in caches if one is not None), None)
    if token_ids is None or token_ids.shape[1] == 1 or cache is None:
        return
    held = int(cache.get_seq_length())
    if mask is None:
        again = positions is not None and positions.dim() == 2 and not positions[0, 0]
    else:
        again = torch.is_tensor(mask) and mask.dim() == 2 and mask.shape[1] < held + token_ids.shape[1]
    if held and again:
        raise ModelError(_READ_AGAIN.format(held))


@contextmanager
def _without_compilation(model: nn.Module) -> Iterator[None]:
    """`generate` compiles the decode step of a static cache on a GPU; reading masks would break its graph apart."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        yield
        return
    before = settings.disable_compile
    settings.disable_compile = True
    try:
        yield
    finally:
        settings.disable_compile = before
