"""What a long result file says, in one table: it comes before all the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from experiments.report.faithful import SOLVED
from experiments.report.sources import PromptKind
from experiments.report.tables import table


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A table of policies, by kind of prompt or by task, or of texts that should be equal; nothing for short files."""
    cells = result.get("cells") or {}
    if len(cells) > 1 and any(len(scores) > 1 for scores in cells.values()):
        yield "Mean KL against full attention, in nats, with half the 95% interval where it was measured:"
        yield ""
        yield from table(_fidelity(cells))
    students = [row for row in result.get("rows") or () if "student" in row]
    if students:
        yield "Mean KL against full attention, in nats, with half the 95% interval:"
        yield ""
        yield from table(_students(students))
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
    bases = _bases(list(labels))
    rows = []
    for label in labels:
        found = {kind: scores[label] for kind, scores in cells.items() if "kl_mean" in scores.get(label, ())}
        columns = {PromptKind.parse(kind).title: _spread(found[kind]) if kind in found else None for kind in cells}
        times = {name: _times(cells, label, base) for name, base in bases[label].items()}
        rows.append({"": label, **columns, **times})
    empty = {name for row in rows for name in row} - {name for row in rows for name in row if row[name] is not None}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def _bases(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Label -> column -> hybrid's label: hybrid of the same plan or budget; every hybrid, where some have no such."""
    own = {label: "hybrid" + "".join(label.partition(",")[1:]) for label in labels}
    plans = [label for label in labels if label.startswith("hybrid, plan ")]
    if plans and any(base not in own for base in own.values()):
        return {label: {f"times that of {plan} (geometric mean)": plan for plan in plans} for label in labels}
    return {label: {"times hybrid's (geometric mean)": base} for label, base in own.items()}


def _times(cells: Mapping[str, Mapping[str, Mapping[str, Any]]], label: str, base: str) -> float | None:
    """The geometric mean of a policy's KL over that of another, where both were measured."""
    pairs = [(scores.get(label, {}).get("kl_mean"), scores.get(base, {}).get("kl_mean")) for scores in cells.values()]
    ratios = [one / other for one, other in pairs if one and other]
    return geometric_mean(ratios) if ratios and label != base else None


def _students(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each student, a column for each kind of prompt."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        cell = f"{PromptKind.parse(row['cell']).title}, n = {row['prompts']}"
        found.setdefault(row["student"], {})[cell] = _spread(row) if row["kl_mean"] is not None else None
    return [{"": student, **cells} for student, cells in found.items()]


def _spread(score: Mapping[str, Any]) -> float | str:
    error = score.get("kl_error")
    return f"{score['kl_mean']:.4g} ± {1.96 * error:.2g}" if error else score["kl_mean"]


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
