"""One prompt, decoded greedily with full attention and with a plan, from one prefill."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Context, Engine
from ..engine.generation import stop_token_ids
from ..engine.prefix import shared_tokens
from ..errors import ConfigError
from ..models.shape import positions_of

NEAR_TIE = 0.25
"""Nats that two tokens of a near tie are apart at most: one is no more than 1.3 times as probable as the other."""


@dataclass(frozen=True)
class Run:
    """What one way of decoding made of the prompt.

    Attributes:
        answer: text up to the model's end token.
        token_ids: its tokens, the end token included.
        tokens_per_second: decode steps a second, the best of the repeats.
        kv_bytes_per_token: mean bytes of the KV cache that a step read.
    """

    answer: str
    token_ids: tuple[int, ...]
    tokens_per_second: float
    kv_bytes_per_token: float


@dataclass(frozen=True)
class Parting:
    """The first place where two answers differ: what each way of decoding thought of both tokens there.

    Attributes:
        full_text, hybrid_text: the token that full attention chose, and the one that hybrid chose.
        full: probabilities of these two, in this order, with full attention.
        hybrid: the same with hybrid attention; both have read the same tokens.
    """

    full_text: str
    hybrid_text: str
    full: tuple[float, float]
    hybrid: tuple[float, float]

    @property
    def nats(self) -> float:
        """How far the two tokens are apart for full attention: the difference of their log-probabilities."""
        return math.log(self.full[0] / self.full[1]) if self.full[1] else math.inf

    def __str__(self) -> str:
        near = ", a near tie" if self.nats <= NEAR_TIE else ""
        return (
            f"full attention finds {self.full_text!r} {self.full[0]:.1%} and {self.hybrid_text!r} {self.full[1]:.1%} "
            f"probable ({self.nats:.2f} nats apart{near}), hybrid {self.hybrid[0]:.1%} and {self.hybrid[1]:.1%}"
        )


@dataclass(frozen=True)
class Comparison:
    """Full attention beside hybrid decoding.

    Attributes:
        full, hybrid: both runs.
        equal_tokens: tokens until the two answers part.
        parting: what both thought of their tokens there; None: the answers are equal.
        top1_agreement: share of steps at which both find the same token most probable, on the full answer's tokens.
        kl_mean: mean KL(full || hybrid) of those steps, in nats.
        speedup: tokens per second, hybrid over full.
        prompt_tokens, prefill_seconds: of the prompt that both share.
    """

    full: Run
    hybrid: Run
    equal_tokens: int
    parting: Parting | None
    top1_agreement: float
    kl_mean: float
    speedup: float
    prompt_tokens: int
    prefill_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return asdict(self)


def compare(
    full: Engine,
    hybrid: Engine,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    ignore_eos: bool = False,
    timed_tokens: int = 0,
    repeats: int = 1,
) -> Comparison:
    """Decode a prompt in both ways, then replay the full answer through the hybrid decode step.

    Args:
        full, hybrid: engines of the same model.
        prompt_ids: the prompt.
        max_new_tokens: most tokens of each answer, at least 2; the model's positions are a limit, too.
        ignore_eos: answers continue past the model's end tokens.
        timed_tokens: decode at least so many tokens for the timing, even if an answer ends earlier.
        repeats: measurements of each, taken in turn so that a passing load hits both.
    """
    if max_new_tokens < 2:
        raise ConfigError(f"A comparison needs at least 2 new tokens, not {max_new_tokens}.")
    max_new_tokens = positions_of(full.model).new_tokens(max_new_tokens, len(prompt_ids))
    context = full.prefill([list(prompt_ids)], room=max(max_new_tokens, timed_tokens))
    ends = set() if ignore_eos else stop_token_ids(full.model, full.tokenizer)
    runs: dict[str, list[tuple[Run, Tensor]]] = {"full": [], "hybrid": []}
    for _ in range(repeats):
        for name, engine in (("full", full), ("hybrid", hybrid)):
            runs[name].append(_decode(engine, context, max_new_tokens, timed_tokens, ends))
    (full_run, logits), (hybrid_run, hybrid_logits) = (
        max(tried, key=lambda run: run[0].tokens_per_second) for tried in runs.values()
    )

    agreement, kl = 1.0, 0.0
    if len(full_run.token_ids) > 1:  # the first token comes from the prefill, which both share
        agreement, kl = _agreement(logits[1:], hybrid.score(context, [full_run.token_ids[:-1]])[0])
    equal, parting = shared_tokens(full_run.token_ids, hybrid_run.token_ids), None
    if equal < len(full_run.token_ids):
        chosen = [run.token_ids[equal] for run in (full_run, hybrid_run)]
        first, second = (full.tokenizer.decode([one]) if full.tokenizer else str(one) for one in chosen)
        (a, b), (c, d) = (one[equal].double().softmax(-1)[chosen].tolist() for one in (logits, hybrid_logits))
        parting = Parting(first, second, (a, b), (c, d))
    return Comparison(
        full_run, hybrid_run, equal, parting, agreement, kl,
        hybrid_run.tokens_per_second / full_run.tokens_per_second if full_run.tokens_per_second else 0.0,
        len(prompt_ids), context.prefill_seconds,
    )  # fmt: skip


def _decode(
    engine: Engine, context: Context, max_new_tokens: int, timed_tokens: int, ends: set[int]
) -> tuple[Run, Tensor]:
    """A greedy answer of at most `max_new_tokens`, and the logits `[T, V]` that each of its tokens came from."""
    context.rewind()
    engine.decode_one_token(context, context.logits.argmax(-1))  # the first step allocates; it is not measured
    context.rewind()
    logits = [context.logits]
    token_ids = [int(context.logits.argmax(-1))]
    ended = token_ids[0] in ends
    length = 1 if ended else max_new_tokens
    began = time.perf_counter()
    while len(token_ids) < max(length, timed_tokens):
        logits.append(engine.decode_one_token(context, logits[-1].argmax(-1)))
        token_ids.append(int(logits[-1].argmax(-1)))  # waits for the device
        if not ended and token_ids[-1] in ends:
            ended, length = True, min(len(token_ids), max_new_tokens)
    seconds = time.perf_counter() - began
    steps = len(token_ids) - 1
    read = float(context.kv_bytes[0]) / max(context.steps, 1)
    answer = engine.tokenizer.decode(token_ids[:length], skip_special_tokens=True) if engine.tokenizer else ""
    run = Run(answer, tuple(token_ids[:length]), steps / seconds if steps else 0.0, read)
    return run, torch.cat(logits[:length])


def _agreement(expected: Tensor, replayed: Tensor) -> tuple[float, float]:
    """Share of equal top tokens and mean KL of logits `[T, V]`."""
    same = expected.argmax(-1) == replayed.argmax(-1)
    p, q = expected.log_softmax(-1), replayed.log_softmax(-1)
    return float(same.float().mean()), float((p.exp() * (p - q)).sum(-1).mean())
