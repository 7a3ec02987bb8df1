"""Selections that change from step to step as those of a trained model do, for models with random weights.

What `bench memory` counts on a real model, misses by the size of the store, says how far down a list of blocks, the one
selected last on top, a step looks for its own:

    recently selected  | first budget | to 1.5 budgets | to 2 | to 3 | all others |
    share of a step      1 - m(1)       m(1) - m(1.5)    ...    ...    m(3)

m(f) are the misses of a store of f budgets. Steps drawn from such a list miss as often as the real ones did, in a store
of any of these sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..results import Result

Misses = Mapping[float, float]
"""Share of selected blocks that a store of so many percent of a selection does not hold."""
_FIXED = 3
"""Blocks of a selection that are the sink or the newest ones."""


@dataclass(frozen=True)
class Reuse:
    """What was measured on a real model.

    Attributes:
        misses: by the size of the store; of the later half of each text, if the result says so much: while a store
            fills, more is missing.
        budget_tokens, context: with which selections of which texts.
    """

    misses: Misses
    budget_tokens: int
    context: int


def reuse_of(path: str | Path, budget_tokens: int, context: int, reading: str) -> Reuse:
    """Misses by the size of the store, from those selections in a result of `bench memory` that are most like these.

    Args:
        path: the result.
        budget_tokens, context: of the case.
        reading: `budget`: those of the same budget, however long the texts were; `share`: those that read the same
            share of their texts.
    """
    rows = [row for row in Result.load(path).rows if row.get("store_percent") and row.get("part", "texts") == "texts"]
    if not rows or not all("budget_tokens" in row for row in rows):
        raise InputError(f"{str(path)!r} has no misses by the size of the store: make it with bench memory.")

    def distance(row: Mapping[str, float]) -> tuple[float, float]:
        """How unlike the case a row is: first in what the reading compares, then in the other."""
        budget = abs(log(row["budget_tokens"] / budget_tokens))
        share = abs(log(row["budget_tokens"] / row["context"]) - log(budget_tokens / context))
        return (budget, share) if reading == "budget" else (share, budget)

    nearest = min(rows, key=distance)
    found: dict[int, list[float]] = {}
    for row in rows:
        if distance(row) == distance(nearest):
            found.setdefault(row["store_percent"], []).append(row.get("later_miss_rate", row["miss_rate"]))
    misses: Misses = {percent: sum(rates) / len(rates) for percent, rates in sorted(found.items())}
    return Reuse(misses, nearest["budget_tokens"], nearest["context"])


def unchanged(capacity: int) -> Misses:
    """Misses of selections of `capacity` blocks that never change but for the newest blocks."""
    return {100 * (capacity - _FIXED) / capacity: 0.0}


def replay(
    misses: Misses, steps: int, rows: int, batch: int, capacity: int, context: int, block_size: int, seed: int
) -> Tensor:
    """int32 `[steps, rows, batch, capacity]`: selections, the sink and the two newest blocks among them.

    `context` counts the tokens that the first of them may hold, but for the newest one.
    """
    generator, others = np.random.default_rng(seed), capacity - _FIXED
    blocks = np.arange(1, context // block_size - 1, dtype=np.int32)
    if others < 1 or len(blocks) < 4 * capacity:
        raise InputError(f"{context} tokens are too few for selections of {capacity} blocks that change.")
    edges = [0, *(min(ceil(percent * capacity / 100 - 1e-9), len(blocks)) for percent in misses), len(blocks)]
    left = [1.0, *misses.values(), 0.0]
    shares = [max(before - after, 0.0) for before, after in pairwise(left)]
    made = np.empty((steps, rows, batch, capacity), dtype=np.int32)
    newest = (context + np.arange(steps)) // block_size
    made[..., 0] = 0
    made[..., 1], made[..., 2] = newest[:, None, None], newest[:, None, None] - 1
    for row in range(rows):
        for b in range(batch):
            recent = generator.permutation(blocks)
            for step in range(steps):
                at = _positions(generator, edges, shares, others)
                chosen = recent[at]
                made[step, row, b, _FIXED:] = generator.permutation(chosen)
                recent = np.concatenate((chosen, np.delete(recent, at)))
    return torch.from_numpy(made)


def _positions(generator: np.random.Generator, edges: list[int], shares: list[float], count: int) -> np.ndarray:
    """`count` places in the list of blocks, of each stretch its share."""
    wanted = np.floor(np.cumsum(shares) / sum(shares) * count + generator.random())
    wanted[-1] = count
    numbers = np.diff(wanted, prepend=0).astype(int)
    found, more = [], 0
    for (begin, end), number in zip(pairwise(edges), numbers, strict=True):
        taken = min(number + more, end - begin)  # what a short stretch does not have, the next one gives
        more += number - taken
        found.append(begin + generator.choice(end - begin, taken, replace=False))
    return np.concatenate(found)
