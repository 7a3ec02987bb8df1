"""Decode one prompt with a plan and write down what every step selected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...attention import HybridAttention, HybridState
from ...engine.engine import Context, Engine
from ...engine.sampling import Sampling, TokenText
from ...errors import ConfigError
from ...models.shape import positions_of
from ...ops import KV
from ...policies.base import roles_of


@dataclass(frozen=True)
class TokenView:
    """One answer token, and the step that made it.

    Attributes:
        text: of the token.
        blocks: block index -> KV heads that attended to it, those beyond the prompt left out; None for the first token,
            which comes from the prefill.
        covered: share of the attention mass inside the selections, the mean over retrieval heads; None for the first.
        chance: probability of this token under full attention.
        otherwise: full attention's most likely token where that is another one, with its probability.
    """

    text: str
    blocks: dict[int, int] | None
    covered: float | None
    chance: float
    otherwise: tuple[str, float] | None


@dataclass(frozen=True)
class AnswerView:
    """What the page shows.

    Attributes:
        prompt: text of each block of `block_size` tokens.
        tokens: the answer, token by token.
        block_size, budget_tokens: of the selections.
        heads: KV heads in layers with full attention, and how many of them retrieve.
    """

    prompt: tuple[str, ...]
    tokens: tuple[TokenView, ...]
    block_size: int
    budget_tokens: int | None
    heads: tuple[int, int]


class _Watched:
    """A hybrid attention that writes down what its retrieval heads select, for one sequence."""

    graph_safe = False

    def __init__(self, attention: HybridAttention) -> None:
        self._attention = attention
        self.refresh_every = attention.refresh_every
        self.allocate = attention.allocate
        self.count_bytes = attention.count_bytes
        plan = attention.plan
        self._readers = Counter(row for layer in range(plan.num_layers) for row in plan.donor_rows(layer))
        self.steps: list[tuple[Counter[int], list[float]]] = []

    def __call__(
        self, layer: int, query: Tensor, kv: KV, state: HybridState, scale: float, refresh: bool = True
    ) -> Tensor:
        output = self._attention(layer, query, kv, state, scale, refresh)
        plan, size = self._attention.plan, self._attention.config.block_size
        heads = plan.retrieval_heads(layer)
        if heads:
            mass = ops.scan_blocks(query, kv, heads, size, scale)[:, 0]  # [R, N]
            own = [plan.donor_rows(layer)[head] for head in heads]
            for row in range(plan.first_row(layer), plan.first_row(layer) + len(plan.rows(layer))):
                chosen = state.selections.blocks[row, 0]
                chosen = chosen[(chosen >= 0) & (chosen < mass.shape[1])].long()
                if row in own:
                    self.steps[-1][1].append(float(mass[own.index(row), chosen].sum()))
                for block in chosen.tolist():
                    self.steps[-1][0][block] += self._readers[row]
        return output


def watch(
    engine: Engine,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str | int] = (),
    ignore_eos: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> AnswerView:
    """Generate an answer with a plan's engine, and look at every step of it.

    The answer is decoded twice more than usual: once to write down the selections, once with full attention.

    Args:
        engine: with a head plan and a tokenizer.
        prompt_ids: the prompt's tokens.
        max_new_tokens, sampling, stop, ignore_eos: as in `Engine.stream`.
        report: told of steps done, and how many there will be; of 0 when the answer is there.
    """
    attention, tokenizer = engine.attention, engine.tokenizer
    if not isinstance(attention, HybridAttention) or tokenizer is None:
        raise ConfigError("Only an engine with a head plan and a tokenizer has selections to show.")
    max_new_tokens = positions_of(engine.model).new_tokens(max_new_tokens, len(prompt_ids))
    context = engine.prefill([list(prompt_ids)], room=max_new_tokens)
    [made] = engine.generate(context, max_new_tokens, sampling=sampling, stop=stop, ignore_eos=ignore_eos)
    watched = _Watched(attention)
    watching = Engine(engine.model, tokenizer, attention=watched, config=engine.config, execution="eager")
    full = Engine(engine.model, tokenizer, execution="eager")
    total = 2 * (len(made.token_ids) - 1)
    report(0, total)
    context.rewind()
    for step, token in enumerate(made.token_ids[:-1]):
        watched.steps.append((Counter(), []))
        watching.decode_one_token(context, torch.tensor([token], device=engine.device))
        report(step + 1, total)
    chances, others = _by_full_attention(full, context, made.token_ids, lambda step: report(total // 2 + step, total))
    texts = _texts(tokenizer, made.token_ids)
    size = attention.config.block_size
    blocks = _by_block(_texts(tokenizer, prompt_ids), size)
    steps = [(None, None), *((_inside(seen, len(blocks)), _mean(mass)) for seen, mass in watched.steps)]
    tokens = [
        TokenView(text, seen, mass, chance, None if other is None else (tokenizer.decode([other[0]]), other[1]))
        for text, (seen, mass), chance, other in zip(texts, steps, chances, others, strict=True)
    ]
    shape = engine.shape
    heads = len(shape.global_layers) * shape.num_kv_heads, len(roles_of(attention.plan, shape))
    return AnswerView(blocks, tuple(tokens), size, attention.config.budget_tokens, heads)


def _by_full_attention(
    full: Engine, context: Context, token_ids: Sequence[int], report: Callable[[int], None]
) -> tuple[list[float], list[tuple[int, float] | None]]:
    """For each answer token its probability, and the likeliest token with its own where that is another one."""
    context.rewind()
    logits, chances, others = context.logits, [], []
    for step, token in enumerate(token_ids):
        probabilities = logits[0].softmax(-1)
        best = int(probabilities.argmax())
        chances.append(float(probabilities[token]))
        others.append(None if best == token else (best, float(probabilities[best])))
        if step + 1 < len(token_ids):
            logits = full.decode_one_token(context, torch.tensor([token], device=full.device))
            report(step + 1)
    context.rewind()
    return chances, others


def _texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens counts for the last of them."""
    text = TokenText(tokenizer)
    pieces = [text.push(token) for token in token_ids]
    if pieces:
        pieces[-1] += text.finish()
    return pieces


def _by_block(texts: Sequence[str], size: int) -> tuple[str, ...]:
    return tuple("".join(texts[first : first + size]) for first in range(0, len(texts), size))


def _inside(seen: Counter[int], blocks: int) -> dict[int, int]:
    return {block: count for block, count in sorted(seen.items()) if block < blocks}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
