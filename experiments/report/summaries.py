"""What a long result file says, in one table: it comes before all the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from experiments.report.tables import table

SOLVED = 0.5
"""Score from which on full attention counts as solving a task."""


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A table of policies, by kind of prompt or by task; nothing where there is little to sum up."""
    cells = result.get("cells") or {}
    if len(cells) > 1 and any(len(scores) > 1 for scores in cells.values()):
        yield "Mean KL against full attention, in nats:"
        yield ""
        yield from table(_fidelity(cells))
    if "averages" in result:
        yield "Scores:"
        yield ""
        yield from table(_tasks(result["rows"], result["averages"]))


def _fidelity(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each policy, a column for each kind of prompt; how many times the KL of hybrid it has on average."""
    labels = dict.fromkeys(label for scores in cells.values() for label in scores if label != "full")
    rows = []
    for label in labels:
        kl = {kind: scores[label]["kl_mean"] for kind, scores in cells.items() if "kl_mean" in scores.get(label, ())}
        policy, comma, budget = label.partition(",")
        own = f"hybrid{comma}{budget}"
        ratios = [
            kl[kind] / cells[kind][own]["kl_mean"]
            for kind in kl
            if cells[kind].get(own, {}).get("kl_mean") and kl[kind]
        ]  # fmt: skip
        times = geometric_mean(ratios) if ratios and policy != "hybrid" else None
        rows.append({"": label, **dict.fromkeys(cells), **kl, "times hybrid's (geometric mean)": times})
    return rows


def _tasks(rows: Sequence[Mapping[str, Any]], averages: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row for each task, a column for each policy; then the averages."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(f"{row['task']}, {row['length']} tokens, {row['metric']}", {})[row["policy"]] = row["score"]
    solved = [scores for scores in found.values() if scores.get("full", 0) >= SOLVED]
    summed = {f"average: {name}": dict(scores) for name, scores in averages.items()}
    if solved:
        shared = [policy for policy in solved[0] if all(policy in scores for scores in solved)]
        means = {policy: fmean(scores[policy] for scores in solved) for policy in shared}
        summed[f"average: {len(solved)} tasks that full attention solves ({SOLVED:.0%} or more)"] = means
    return [{"": name, **scores} for name, scores in (found | summed).items()]
