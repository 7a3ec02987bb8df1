"""Speculative decoding, whoever drafts: several tokens of a sequence are verified with one reading of its cache.

    build   which sequences, the first of the batch, get no more tokens than drafts and one   -> metadata.verify
    layer   these with `ops.attend_tokens`, full attention; all others with the backend

Nothing is hybrid then: what is verified is full attention's, for every request.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops import KV
from ...ops.attend import MAX_TOKENS
from . import settings
from .group import able_layers, logger, why_all_dense, why_dense
from .parts import CommonAttentionMetadata
from .rows import is_causal, tokens_of


class VerifyStep(NamedTuple):
    """What the layers of a group need at a step.

    Attributes:
        layers: names of the layers that verify so.
        rows: how many sequences, the first of the batch.
        tokens: of all of them.
        most: tokens of the one that has most, `T`.
        lengths: int32 `[rows]`, tokens of each, the new ones included.
        page_table: int32 `[rows, pages]`.
        index: int64 `[rows, T]`, which token of the step is each sequence's T-th last, ..., last one, any where it has
            fewer; None: all have `T`.
        back: int64 `[tokens]`, the inverse.
        others: the backend's metadata of the other sequences; None when there are none.
    """

    layers: frozenset[str]
    rows: int
    tokens: int
    most: int
    lengths: Tensor
    page_table: Tensor
    index: Tensor | None
    back: Tensor | None
    others: Any


class Verifying:
    """Layers in which drafts are verified so, by name; `most` tokens of a sequence at once."""

    def __init__(self, layers: frozenset[str], most: int) -> None:
        self.layers, self.most = layers, most

    @classmethod
    def of(
        cls, vllm_config: Any, spec: Any, layer_names: list[str], device: torch.device, obstacle: str | None
    ) -> Verifying | None:
        """Those among `layer_names` that can verify so; None if none can, and the log says why."""
        most = vllm_config.speculative_config.num_speculative_tokens + 1
        why_all = obstacle or why_all_dense(vllm_config, spec, device)
        if most > MAX_TOKENS:
            why_all = f"{most} tokens of a sequence at once are more than {MAX_TOKENS}"

        def why_not(impl: Any) -> str | None:
            sinks = None if getattr(impl, "sinks", None) is None else "their softmax has sinks"
            return why_all or why_dense(impl) or sinks

        able = able_layers(vllm_config, layer_names, why_not, "leave drafts to vLLM's attention")
        if not able:
            return None
        whose = "the model's own drafts" if settings.drafts(vllm_config) else "drafts"
        said = f"LycheeDecode: speculative decoding: all requests have full attention, {whose} are verified at once in"
        logger.info_once("%s %d layers.", said, len(able))
        return cls(frozenset(able), most)

    def counts(self, common: CommonAttentionMetadata) -> list[int]:
        """Tokens of the first sequences, as far as they have few enough; none where attention is not simply causal."""
        if not is_causal(common):
            return []
        return list(takewhile(lambda count: 0 < count <= self.most, tokens_of(common)))


def step_of(layers: frozenset[str], common: CommonAttentionMetadata, counts: list[int], others: Any) -> VerifyStep:
    """The part of a step that its first sequences are, which have so many tokens each."""
    rows, most, tokens, index, back = len(counts), max(counts), sum(counts), None, None
    if tokens < rows * most:
        device = common.seq_lens.device
        given = torch.tensor(counts)
        column = torch.arange(most) - (most - given)[:, None]  # [rows, T]
        index = ((given.cumsum(0) - given)[:, None] + column.clamp(min=0)).to(device)
        back = (column >= 0).flatten().nonzero().flatten().to(device)
    table = common.block_table_tensor[:rows]
    return VerifyStep(layers, rows, tokens, most, common.seq_lens[:rows], table, index, back, others)


def attend(step: VerifyStep, query: Tensor, cache: tuple[Tensor, Tensor], scale: float, scales: Any) -> Tensor:
    """Output `[tokens, Hq, D]` of these tokens; `query` `[>= tokens, Hq, D]`."""
    asked = query[: step.tokens]
    asked = asked.unflatten(0, (step.rows, step.most)) if step.index is None else asked[step.index]
    found = ops.attend_tokens(asked, KV(*cache, step.lengths, None, step.page_table), scale, scales=scales)
    found = found.flatten(0, 1)
    return found if step.back is None else found[step.back]
