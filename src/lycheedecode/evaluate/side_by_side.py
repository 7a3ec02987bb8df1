"""One prompt, decoded greedily with full attention and with a plan, from one prefill."""

from __future__ import annotations

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
from ..models.positions import Positions
from ..models.shape import inner_model, text_config


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
class Comparison:
    """Full attention beside hybrid decoding.

    Attributes:
        full, hybrid: both runs.
        equal_tokens: tokens until the two answers part.
        top1_agreement: share of steps at which both find the same token most probable, on the full answer's tokens.
        kl_mean: mean KL(full || hybrid) of those steps, in nats.
        speedup: tokens per second, hybrid over full.
        prompt_tokens, prefill_seconds: of the prompt that both share.
    """

    full: Run
    hybrid: Run
    equal_tokens: int
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
    max_new_tokens = Positions.of(text_config(inner_model(full.model))).new_tokens(max_new_tokens, len(prompt_ids))
    context = full.prefill([list(prompt_ids)], room=max(max_new_tokens, timed_tokens))
    ends = set() if ignore_eos else stop_token_ids(full.model, full.tokenizer)
    runs: dict[str, list[tuple[Run, Tensor]]] = {"full": [], "hybrid": []}
    for _ in range(repeats):
        for name, engine in (("full", full), ("hybrid", hybrid)):
            runs[name].append(_decode(engine, context, max_new_tokens, timed_tokens, ends))
    (full_run, logits), (hybrid_run, _) = (
        max(tried, key=lambda run: run[0].tokens_per_second) for tried in runs.values()
    )

    agreement, kl = 1.0, 0.0
    if len(full_run.token_ids) > 1:  # the first token comes from the prefill, which both share
        agreement, kl = _agreement(logits[1:], hybrid.score(context, [full_run.token_ids[:-1]])[0])
    return Comparison(
        full_run, hybrid_run, shared_tokens(full_run.token_ids, hybrid_run.token_ids), agreement, kl,
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
