"""Where something else is better than hybrid decoding: said first, and computed from the result files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.report.tables import shown

PEERS = ("paper", "kascade", "tidaldecode", "quest", "duo", "streaming", "same-index", "random")
"""Policies that hybrid must beat; the oracle `own-topk` reads all keys with every head."""


def lines(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence on all result files that compare, and an item for each that finds something better."""
    compared = {name: items for name, report in reports.items() if (items := _lost(report)) is not None}
    if not compared:
        yield "There is nothing to compare yet."
        return
    lost = {name: items for name, items in compared.items() if items}
    yield f"**Where something else is better**: in {_of(len(lost), len(compared))} result files that compare."
    if lost:
        yield ""
    for name, items in lost.items():
        yield f"- **{name}**: {' '.join(items)}"


def _lost(report: Mapping[str, Any]) -> list[str] | None:
    """What is better than hybrid in a result file; None where it compares nothing."""
    result = report.get("result") or {}
    found = []
    if "variants" in result:
        found.append(_lost_ways(result["variants"]))
    elif any("kl_mean" in score for scores in result.get("cells", {}).values() for score in scores.values()):
        found.append(_lost_cells(result["cells"]))
    if report.get("command") == "evaluate tasks":
        found += [_lost_to_full(result.get("rows", ())), _lost_to_peers(result.get("rows", ()))]
    found.append(_slower(result.get("rows", ())))
    compared = [sentence for sentence in found if sentence is not None]
    return [sentence for sentence in compared if sentence] if compared else None


# Each of these says what is better, says nothing where nothing is, and returns None where nothing is compared.


def _slower(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Rows of a benchmark that took longer than what they are compared with."""
    timed = [row for row in rows if row.get("speedup") is not None]
    slower = [f"{_subject(row)} {row['speedup']:.2f}x" for row in timed if row["speedup"] < 1]
    if not timed:
        return None
    return f"Slower than what they are compared with are {_listed(slower, len(timed), 'rows')}" if slower else ""


def _lost_ways(variants: Mapping[str, Mapping[str, Any]], ours: str = "sensitivity") -> str | None:
    """Other ways to identify as many heads that led to a plan with a lower KL, on average or on one kind of prompt."""
    own = variants.get(ours)
    others = {way: found for way, found in variants.items() if own and way != ours}
    others = {way: found for way, found in others.items() if found["retrieval_heads"] == own["retrieval_heads"]}
    if not others:
        return None
    better = [way for way, found in others.items() if found["kl_mean"] <= own["kl_mean"]]
    kinds = [kind for kind in own["kl"] if any(found["kl"][kind] <= own["kl"][kind] for found in others.values())]
    if not better and not kinds:
        return ""
    return (
        f"A mean KL as low as {ours}'s have {_listed(better, len(others), 'other ways')} On "
        f"{_of(len(kinds), len(own['kl']))} kinds of prompts some other way has."
    )


def _lost_cells(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str | None:
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
        return None
    reading = "A policy that reads no more KV bytes than hybrid (up to 2%) is at least as close to full attention in"
    return f"{reading} {_listed(lost, compared, 'comparisons')}" if lost else ""


def _lost_to_full(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Tasks on which hybrid scores lower than full attention."""
    own = [(place, row) for place, row, _ in _task_places(rows) if "difference_high" in row]
    lower = [f"{row['policy']} on {place} {row['difference_value']:+.3g}" for place, row in own
             if row["difference_high"] < 0]  # fmt: skip
    if not own:
        return None
    said = "Beyond its 95% interval, hybrid scores lower than full attention in"
    return f"{said} {_listed(lower, len(own), 'comparisons')}" if lower else ""


def _lost_to_peers(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Tasks on which a peer that reads no more scores higher."""
    compared, higher = 0, []
    for place, row, others in _task_places(rows):
        for peer in PEERS:
            theirs = [other for other in others if _policy(other) == peer and _reads_no_more(other, row)]
            compared += bool(theirs)
            best = max(theirs, key=lambda other: other["score"], default=row)
            if best["score"] > row["score"]:
                higher.append(f"{best['policy']} {best['score']:.3g} on {place}, {row['policy']} {row['score']:.3g}")
    if not compared:
        return None
    said = "A policy that reads no more KV bytes than hybrid (up to 2%) scores higher in"
    return f"{said} {_listed(higher, compared, 'comparisons')}" if higher else ""


def _task_places(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Every row of hybrid: its task, length and metric, the row, and all rows of that place."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        place = ", ".join(str(row[key]) for key in ("task", "length", "metric") if key in row)
        places.setdefault(place, []).append(row)
    for place, found in places.items():
        yield from ((place, row, found) for row in found if _policy(row) == "hybrid")


def _policy(row: Mapping[str, Any]) -> str:
    return str(row["policy"]).split(",")[0].partition("+")[0]


def _listed(found: Sequence[str], total: int, what: str) -> str:
    return f"{_of(len(found), total)} {what}" + (f": {'; '.join(found)}." if found else ".")


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
