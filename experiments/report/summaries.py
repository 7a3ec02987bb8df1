"""What a long result file says, in one table: it comes before all the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from experiments.report.faithful import SOLVED
from experiments.report.tables import table


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A table of policies, by kind of prompt or by task, or of texts that should be equal; nothing for short files."""
    cells = result.get("cells") or {}
    if len(cells) > 1 and any(len(scores) > 1 for scores in cells.values()):
        yield "Mean KL against full attention, in nats, with half the 95% interval where it was measured:"
        yield ""
        yield from table(_fidelity(cells))
    if "averages" in result:
        yield "Scores, with 95% intervals:"
        yield ""
        yield from table(_tasks(result["rows"], result["averages"]))
    exact = [row for row in result.get("rows") or () if row.get("part") == "exact"]
    if exact:
        yield "Lossless texts beside full attention's, greedy and sampled, of prompts of several lengths in one batch:"
        yield ""
        yield from table(_exact(exact))


def _exact(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each form of drafts: how many texts are full attention's, and where the others leave it."""
    forms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        eight = " with 8-bit weights" if row["weights"] == "float8" else ""
        form = f"{row['dtype']}, {row['way']} drafts{eight}, budget {row['budget_tokens']}"
        forms.setdefault(form, []).append(row)
    shown = []
    for form, cases in forms.items():
        pairs = [pair for row in cases for pair in zip(row["same"], row["tokens"], strict=True)]
        shaped = [one for row in cases for one in row["in_the_shape_of_the_pass"] or ()]
        shown.append(
            {
                "": form,
                "cases": len(cases),
                "tokens": sum(tokens for _, tokens in pairs),
                "full attention's texts": f"{sum(same == tokens for same, tokens in pairs)} of {len(pairs)}",
                "left at a near tie": sum(len(row["tie_token"]) for row in cases),
                "its texts in the pass's shape": f"{sum(shaped)} of {len(shaped)}" if shaped else "",
                "wrong": sum(len(row["wrong"]) for row in cases),
            }
        )
    return shown


def _fidelity(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each policy, a column for each kind of prompt; how many times the KL of hybrid it has on average."""
    labels = dict.fromkeys(label for scores in cells.values() for label in scores if label != "full")
    rows = []
    for label in labels:
        found = {kind: scores[label] for kind, scores in cells.items() if "kl_mean" in scores.get(label, ())}
        policy, comma, budget = label.partition(",")
        own = f"hybrid{comma}{budget}"
        ratios = [
            score["kl_mean"] / cells[kind][own]["kl_mean"]
            for kind, score in found.items()
            if cells[kind].get(own, {}).get("kl_mean") and score["kl_mean"]
        ]
        times = geometric_mean(ratios) if ratios and policy != "hybrid" else None
        columns = {kind: _spread(score) for kind, score in found.items()}
        rows.append({"": label, **dict.fromkeys(cells), **columns, "times hybrid's (geometric mean)": times})
    return rows if any(row["times hybrid's (geometric mean)"] for row in rows) else [_without_last(row) for row in rows]


def _spread(score: Mapping[str, Any]) -> float | str:
    error = score.get("kl_error")
    return f"{score['kl_mean']:.4g} ± {1.96 * error:.2g}" if error else score["kl_mean"]


def _without_last(row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(list(row.items())[:-1])


def _tasks(rows: Sequence[Mapping[str, Any]], averages: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row for each task, a column for each policy; then the averages."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(f"{row['task']}, {row['length']} tokens, {row['metric']}", {})[row["policy"]] = row
    shown = [
        {
            "": name,
            "n": next(iter(scores.values())).get("items"),
            **{label: _score(row) for label, row in scores.items()},
        }
        for name, scores in found.items()
    ]
    shown += [{"": f"average: {name}", **_shares(scores)} for name, scores in averages.items()]
    solved = [scores for scores in found.values() if scores.get("full", {}).get("score", 0) >= SOLVED]
    if solved:
        shared = [label for label in solved[0] if all(label in scores for scores in solved)]
        means = {label: fmean(scores[label]["score"] for scores in solved) for label in shared}
        named = f"average: {len(solved)} tasks that full attention solves ({SOLVED:.0%} or more)"
        shown.append({"": named, **_shares(means)})
    return shown


def _score(row: Mapping[str, Any]) -> str:
    return f"{row['score']:.1%}" + (f" ({row['low']:.0%} to {row['high']:.0%})" if "low" in row else "")


def _shares(scores: Mapping[str, float]) -> dict[str, str]:
    return {label: f"{score:.1%}" for label, score in scores.items()}
