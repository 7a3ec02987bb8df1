"""Fidelity: how far hybrid decoding strays from full attention, on fresh prompts, through real decode steps.

Each prompt is prefilled once. Every policy then decodes the same true answer token by token (KL, top-1 agreement), and
decodes on its own, greedily (exact match). The answer's first token comes from the prefill and is not counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import HybridConfig
from ..engine import Context, Engine
from ..identify.prompts import Cell, Prompt, makers_for
from ..plan import Head, HeadPlan

CELLS = (
    Cell("noise", 2048),
    Cell("noise", 4096),
    Cell("noise", 7168),
    Cell("prose", 2048),
    Cell("prose", 4096),
    Cell("prose", 2048, "passkey", 5),
    Cell("prose", 4096, "passkey", 5),
)
"""What the shipped plan is judged on."""


@dataclass(frozen=True)
class Score:
    """One policy on one kind of prompt.

    Attributes:
        prompts, tokens: how many were decoded.
        kl_mean, kl_p99: KL(full || policy) per answer token, in nats.
        top1_agreement: share of answer tokens at which both find the same token most probable.
        exact_match: share of prompts whose greedy answer holds everything that was hidden.
        kv_bytes_per_token: mean bytes of the KV cache that a decode step reads for a sequence.
    """

    prompts: int
    tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    exact_match: float
    kv_bytes_per_token: float


def policies(plan: HeadPlan, config: HybridConfig, random_plans: int = 3) -> dict[str, HeadPlan]:
    """The plan, and what it must be compared with at the same number of heads and the same budget.

    `same index`: its roles with the paper's inheritance; `random`: random roles with that inheritance, the first layer
    among them; `own top-k`: every head selects for itself, the best that the budget allows.
    """
    layers, width = plan.num_layers, plan.num_kv_heads
    always = [(0, head) for head in range(width)]
    others: list[Head] = [(layer, head) for layer in range(1, layers) for head in range(width)]
    named = {
        "hybrid": plan,
        "same index": HeadPlan.same_index(plan.retrieval, layers, width),
        "own top-k": HeadPlan.all_retrieval(layers, width),
    }
    for seed in range(random_plans):
        roles = always + random.Random(seed).sample(others, max(len(plan.retrieval) - width, 0))
        named[f"random {seed}"] = HeadPlan.same_index(roles, layers, width)
    return named


def measure_fidelity(
    model: Any,
    tokenizer: Any,
    plans: Mapping[str, HeadPlan],
    config: HybridConfig,
    cells: Sequence[Cell] = CELLS,
    *,
    prompts: int = 100,
    batch_size: int = 1,
    seed: int = 0,
    finished: dict[str, dict[str, Any]] | None = None,
    on_cell: Callable[[Cell, dict[str, Score]], None] = lambda cell, scores: None,
) -> dict[str, dict[str, Any]]:
    """Scores of every plan, and of full attention, on every kind of prompt.

    Args:
        model: Hugging Face decoder in eval mode.
        tokenizer: its tokenizer.
        plans: plans by name.
        config: decode form and budget of all of them.
        cells: kinds of prompts; those in `finished` are not decoded again.
        prompts: prompts of each kind, drawn from text that identification never uses.
        batch_size: prompts decoded together.
        seed: of the prompts.
        finished: results of an interrupted call.
        on_cell: called with every finished kind.

    Returns:
        `{kind: {policy: Score as a dict}}`.
    """
    makers = makers_for(tokenizer, cells, "evaluate")
    # Many plans for a few tokens each: compiling a step for all of them would take longer than their steps do.
    engines = {"full": Engine(model, tokenizer, execution="eager")}
    for name, plan in plans.items():
        engines[name] = Engine(model, tokenizer, plan=plan, config=config, execution="eager")
    results = dict(finished or {})
    for cell in cells:
        if str(cell) in results:
            continue
        # Strings seed alike on every machine; the cell is part of it, so cells can be run one by one.
        drawn = cell.make(makers, prompts, random.Random(f"fidelity/{seed}/{cell}"))
        sums = {name: _Sums() for name in engines}
        for start in range(0, prompts, batch_size):
            _decode_batch(engines, drawn[start : start + batch_size], sums)
        scores = {name: each.score() for name, each in sums.items()}
        results[str(cell)] = {name: vars(score) for name, score in scores.items()}
        on_cell(cell, scores)
    return results


def _decode_batch(engines: Mapping[str, Engine], prompts: Sequence[Prompt], sums: Mapping[str, _Sums]) -> None:
    """One prefill, then every engine: the true answers for the distributions, a greedy answer for the match."""
    fed = [prompt.answer_ids[:-1] for prompt in prompts]
    lengths = torch.tensor([len(ids) for ids in fed])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    full = engines["full"]
    context = full.prefill([prompt.prompt_ids for prompt in prompts], room=mask.shape[1] + 1)
    expected = full.score(context, fed)[mask.to(full.device)].log_softmax(-1)  # [tokens, V]
    for name, engine in engines.items():
        found = expected if engine is full else engine.score(context, fed)[mask.to(full.device)].log_softmax(-1)
        sums[name].add_tokens((expected.exp() * (expected - found)).sum(-1), expected.argmax(-1) == found.argmax(-1))
        texts = _greedy(engine, context, mask.shape[1] + 1)
        sums[name].add_answers(
            [prompt.is_solved_by(text) for prompt, text in zip(prompts, texts, strict=True)],
            (context.kv_bytes / context.steps).tolist(),
        )
        context.rewind()


def _greedy(engine: Engine, context: Context, tokens: int) -> list[str]:
    """Greedy answers of `tokens` tokens, `context` left as decoded."""
    found = [context.logits.argmax(-1)]
    for _ in range(tokens - 1):
        found.append(engine.decode_one_token(context, found[-1]).argmax(-1))
    return engine.tokenizer.batch_decode(torch.stack(found, 1))


class _Sums:
    """What one policy has shown so far on one kind of prompt."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._agreed: list[Tensor] = []
        self._solved: list[bool] = []
        self._bytes: list[float] = []

    def add_tokens(self, kl: Tensor, agreed: Tensor) -> None:
        self._kl.append(kl.double().cpu())
        self._agreed.append(agreed.double().cpu())

    def add_answers(self, solved: Sequence[bool], kv_bytes: Sequence[float]) -> None:
        self._solved += solved
        self._bytes += kv_bytes

    def score(self) -> Score:
        kl = torch.cat(self._kl)
        return Score(
            prompts=len(self._solved),
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.quantile(0.99)),
            top1_agreement=float(torch.cat(self._agreed).mean()),
            exact_match=sum(self._solved) / len(self._solved),
            kv_bytes_per_token=sum(self._bytes) / len(self._bytes),
        )
