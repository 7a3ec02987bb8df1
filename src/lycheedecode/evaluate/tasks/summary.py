"""Results of tasks as a table, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from . import catalogue


def rows(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A flat row for each metric of each policy on each task that was not skipped; what does not apply is left out."""
    found = []
    for cell in cells:
        place = {"task": cell["task"]} | ({} if cell["length"] is None else {"length": cell["length"]})
        for policy, entry in cell.get("scores", {}).items():
            details = {name: entry.get(name) for name in ("tokens_per_answer", "cut_off", "kv_bytes_per_token")}
            for i, (metric, score) in enumerate(entry["metrics"].items()):
                row = {**place, "policy": policy, "metric": metric, "score": score["value"]}
                row |= {"low": score["low"], "high": score["high"], "items": entry["items"]}
                if i == 0 and "difference" in entry:
                    row |= {f"difference_{name}": value for name, value in entry["difference"].items()}
                row |= {"skipped": len(entry["skipped"]), **details}
                found.append({name: value for name, value in row.items() if value is not None})
    return found


def averages(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean of the first metric over RULER of each length and over LongBench: `{what: {policy: mean}}`.

    Only of several tasks; one without a score is left out for all policies. Of a part of the tasks, the name says so.
    """
    found: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for cell in cells:
        scores = cell.get("scores", {})
        if scores and all(one["metrics"] for one in scores.values()):
            for family, members in catalogue.FAMILIES.items():
                if cell["task"] in members:
                    found.setdefault((family, cell["length"]), []).append(scores)
    means = {}
    for (family, length), tasks in found.items():
        every = len(catalogue.FAMILIES[family])
        name = family if length is None else f"{family}, {length} tokens"
        name += f", {len(tasks)} of {every} tasks" if len(tasks) < every else ""
        if len(tasks) > 1:
            means[name] = {policy: fmean(_first(scores[policy]) for scores in tasks) for policy in tasks[0]}
    return means


def _first(entry: Mapping[str, Any]) -> float:
    return next(iter(entry["metrics"].values()))["value"]
