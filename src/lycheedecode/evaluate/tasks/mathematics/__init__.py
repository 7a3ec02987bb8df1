"""Answers to mathematical problems: where they are in a solution, and whether two are the same.

`process_results` is what task files call: `(document, results) -> {metric: value}`, with several solutions a problem.
Spelling, structure (lists, sets, points, intervals) and exact numbers are ours; algebra is math-verify's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .compare import is_right, is_same
from .solution import final_answer, reference_answer

__all__ = ["final_answer", "is_right", "is_same", "process_results", "reference_answer"]


def process_results(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """`accuracy`: the share of the solutions that are right; `majority`: whether the most frequent answer is."""
    found = [final_answer(solution) for solution in results[0]]
    right = [answer is not None and is_right(answer, doc) for answer in found]
    votes = [sum(other is not None and is_same(answer, other) for other in found) if answer else 0 for answer in found]
    elected = max(range(len(found)), key=votes.__getitem__)
    return {"accuracy": sum(right) / len(right), "majority": float(right[elected])}
