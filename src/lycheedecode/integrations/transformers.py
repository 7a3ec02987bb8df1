"""Hugging Face `generate`, made hybrid for as long as a context is open."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention import HybridAttention, HybridState
from ..checks import check_tokenizer, settings_from
from ..config import ConfigLike, HybridConfig
from ..engine.plans import PlanLike, plan_from
from ..errors import ConfigError
from ..models.routing import RoutedAttention, route_attention, supported_shape
from ..models.shape import ModelError, inner_model
from ..ops import KV

_NO_WEIGHTS = "Attention weights (output_attentions) do not exist in hybrid decoding."


@contextmanager
def hybrid(
    model: nn.Module, plan: PlanLike, config: ConfigLike = None, *, tokenizer: Any = None
) -> Iterator[nn.Module]:
    """Decode steps of `model` follow `plan` while the context is open; nothing is left behind when it closes.

    `plan` is a plan, its name or file, or `auto`: the model's known plan, or else a new one, which needs the tokenizer.
    `config` may be a mapping such as `{"budget_tokens": 512}`.

    Any caller works: `generate`, greedily or with sampling, beams or streaming, in batches padded on the left, with
    dynamic or static caches, with a prefix in the cache. Several tokens at once (the prompt, candidates of assisted
    decoding) are dense. Static caches are not compiled inside the context. If the plan completes heads, each step
    computes the chunk means from the whole cache; `Engine` keeps them.

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
        raise ConfigError("scan_keys='float8' keeps a copy beside the cache, which only Engine does.")
    if config.step_weights != "model":
        raise ConfigError("step_weights='float8' keeps a copy of the weights, which only Engine does.")
    head_plan = plan_from(plan, model, tokenizer, config)
    if head_plan is None:
        raise ConfigError("Hybrid attention needs a plan: a HeadPlan, the name or file of one, or 'auto'.")
    shape = supported_shape(model, head_plan)
    if getattr(inner_model(model).config, "output_attentions", False):
        raise ModelError(_NO_WEIGHTS)
    routed = RoutedAttention(shape, _MaskedSteps(HybridAttention(head_plan, config, shape.global_layers)))
    with route_attention(model, routed), _without_compilation(inner_model(model)), _with_cache(inner_model(model)):
        yield model


class _MaskedSteps(threading.local):
    """Finds out, from the masks alone, where the tokens of each sequence lie; once a step, not once a layer.

    Every thread that calls the model has steps of its own.
    """

    def __init__(self, attention: HybridAttention) -> None:
        self._attention = attention
        self._layer = -1
        self._mask: Tensor | None = None
        self._lengths: Tensor | None = None
        self._starts: Tensor | None = None
        self._state: HybridState | None = None
        self._room = (0, 0)

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        if layer <= self._layer or mask is not self._mask:
            self._lengths, self._starts = (None, None) if mask is None else token_spans(mask, keys.shape[2])
        self._layer, self._mask = layer, mask
        self._make_room(keys)
        kv = KV(keys, values, self._lengths, self._starts)
        assert self._state is not None
        if self._state.means is not None and layer in self._state.means.layers:
            self._state.means.write(layer, kv)
        return self._attention(layer, query, kv, self._state, scale)

    def _make_room(self, keys: Tensor) -> None:
        batch, slots = keys.shape[0], keys.shape[2]
        if batch != self._room[0] or slots > self._room[1]:
            self._room = batch, slots + 256  # a cache that grows by a token a step then seldom asks again
            self._state = self._attention.allocate(*self._room, keys.device)


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
def _with_cache(model: PreTrainedModel) -> Iterator[None]:
    """Refuse passes without a cache, which would read the prompt anew, densely; and to return attention weights."""

    def refuse(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
        given = options.get("use_cache")
        if not (model.config.get_text_config(decoder=True).use_cache if given is None else given):
            raise ModelError("Hybrid attention needs the KV cache: leave out use_cache=False.")
        if options.get("output_attentions"):
            raise ModelError(_NO_WEIGHTS)

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


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
