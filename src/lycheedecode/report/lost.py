"""Where something else is better than hybrid decoding: said first, and computed from the result files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .tables import shown

PEERS = ("paper", "kascade", "tidaldecode", "quest", "duo", "streaming", "same-index", "random")
"""Policies that hybrid must beat; the oracle `own-topk` reads all keys with every head."""


def sentences(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Sentences about every result file that compares."""
    said = [sentence for name, report in reports.items() for sentence in _lost(name, report)]
    yield "**Where something else is better.**" if said else "There is nothing to compare yet."
    yield from said


def _lost(name: str, report: Mapping[str, Any]) -> Iterator[str]:
    result = report.get("result") or {}
    if "variants" in report:
        yield _lost_ways(name, report["variants"])
    elif any("kl_mean" in score for scores in result.get("cells", {}).values() for score in scores.values()):
        yield _lost_cells(name, result["cells"])
    if report.get("command") == "evaluate tasks":
        yield from _lost_tasks(name, result.get("rows", ()))
    slow = [row for row in result.get("rows", ()) if row.get("speedup") is not None]
    if slow:
        slower = [row for row in slow if row["speedup"] < 1]
        rows = "; ".join(f"{_subject(row)} {row['speedup']:.2f}x" for row in slower)
        yield f"{name}: {_of(len(slower), len(slow))} rows are slower than what they are compared with" + (
            f" ({rows})." if rows else "."
        )


def _lost_ways(name: str, variants: Mapping[str, Mapping[str, Any]], ours: str = "sensitivity") -> str:
    """Other ways to identify as many heads that led to a plan with a lower KL, on average or on one kind of prompt."""
    own = variants.get(ours)
    others = {way: found for way, found in variants.items() if own and way != ours}
    others = {way: found for way, found in others.items() if found["retrieval_heads"] == own["retrieval_heads"]}
    if not others:
        return f"{name}: nothing to compare with {ours}."
    better = [way for way, found in others.items() if found["kl_mean"] <= own["kl_mean"]]
    kinds = [kind for kind in own["kl"] if any(found["kl"][kind] <= own["kl"][kind] for found in others.values())]
    ahead = f" ({'; '.join(better)})" if better else ""
    return (
        f"{name}: {_of(len(better), len(others))} other ways have a mean KL as low as {ours}{ahead}; on "
        f"{_of(len(kinds), len(own['kl']))} kinds of prompts some other way does."
    )


def _lost_cells(name: str, cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Peers that were at least as close to full attention as hybrid and read no more, wherever both were measured."""
    compared, lost = 0, []
    for kind, scores in cells.items():
        rows = [score for score in scores.values() if "kl_mean" in score]
        for own in (row for row in rows if row.get("policy") == "hybrid"):
            for peer in PEERS:
                theirs = [row for row in rows if row.get("policy") == peer and _reads_no_more(row, own)]
                compared += bool(theirs)
                best = min(theirs, key=lambda row: row["kl_mean"], default=None)
                if best is not None and best["kl_mean"] <= own["kl_mean"]:
                    lost.append(f"{peer} on {kind}, {_point(best)}, hybrid {_point(own)}")
    if not compared:
        return f"{name}: no policy reads as little as hybrid."
    listed = f": {'; '.join(lost)}." if lost else "."
    return (
        f"{name}: a policy that reads no more KV bytes than hybrid (up to 2%) is at least as close to full attention "
        f"in {_of(len(lost), compared)} comparisons{listed}"
    )


def _lost_tasks(name: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where hybrid scores lower than full attention, and where a peer that reads no more scores higher."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        places.setdefault(", ".join(str(row[key]) for key in ("task", "length", "metric") if key in row), []).append(
            row
        )
    own = [(place, row, rows) for place, rows in places.items() for row in rows if _policy(row) == "hybrid"]
    compared = [(place, row) for place, row, _ in own if "difference_high" in row]
    lower = [
        f"{row['policy']} on {place} {row['difference_value']:+.3g}"
        for place, row in compared
        if row["difference_high"] < 0
    ]
    yield f"{name}: beyond its 95% interval, hybrid scores lower than full attention in {_listed(lower, len(compared))}"
    number, higher = 0, []
    for place, row, others in own:
        for peer in PEERS:
            theirs = [other for other in others if _policy(other) == peer and _reads_no_more(other, row)]
            number += bool(theirs)
            best = max(theirs, key=lambda other: other["score"], default=row)
            if best["score"] > row["score"]:
                higher.append(f"{best['policy']} {best['score']:.3g} on {place}, {row['policy']} {row['score']:.3g}")
    yield f"A policy that reads no more KV bytes than hybrid (up to 2%) scores higher in {_listed(higher, number)}"


def _policy(row: Mapping[str, Any]) -> str:
    return str(row["policy"]).split(",")[0].partition("+")[0]


def _listed(found: Sequence[str], total: int) -> str:
    return f"{_of(len(found), total)} comparisons" + (f": {'; '.join(found)}." if found else ".")


def _point(score: Mapping[str, Any]) -> str:
    return f"KL {score['kl_mean']:.4g} at {shown(score['kv_bytes_per_token'], 'bytes')} a token"


def _reads_no_more(row: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Up to two percent: answers differ in length, and how full the last block is costs policies differently."""
    return row.get("kv_bytes_per_token", 0) <= 1.02 * own.get("kv_bytes_per_token", 0)


def _of(number: int, total: int) -> str:
    return f"{number or 'none'} of {total}"


def _subject(row: Mapping[str, Any]) -> str:
    named = [str(row[key]) for key in ("op", "form", "way") if isinstance(row.get(key), str)][:1]
    return ", ".join(named + [f"{key} {row[key]}" for key in ("batch", "context") if key in row])
