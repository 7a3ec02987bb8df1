"""Where something else is better than hybrid attention: said first, and computed from the result files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.report.faithful import reads_no_more
from experiments.report.memory import from_host
from experiments.report.names import OURS, PEERS, name_of
from experiments.report.sources import BUSY, Row, Source, tokens

Finder = Callable[[Source], "str | None"]
"""Says what is better in a file, says nothing where nothing is, and returns None where nothing is compared."""
_STUDENT = re.compile(r"(?:budget_tokens=)?(\d+)(?: tokens: |-)(.*)")


def lines(sources: Sequence[Source], topic: str) -> Iterator[str]:
    """A sentence on the files that compare, and an item for each that finds something better."""
    compared, lost = 0, []
    for source in sources:
        said = [sentence for finder in FINDERS[topic] if (sentence := finder(source)) is not None]
        compared += bool(said)
        if any(said):
            lost.append(f"- {source.link}: {' '.join(filter(None, said))}")
    if not compared:
        yield "There is nothing to compare yet."
        return
    yield f"**Where something else is better**: in {_of(len(lost), compared)} result files that compare."
    if lost:
        yield from ("", *lost)


# ---------------------------------------------------------------------- fidelity


def _closer_peers(source: Source) -> str | None:
    """Peers that were at least as close to full attention as hybrid and read no more, wherever both were measured."""
    compared, lost = 0, []
    for kind, scores in source.cells.items():
        rows = [score for score in scores.values() if "kl_mean" in score and "kv_bytes_per_token" in score]
        for own in (row for row in rows if row.get("policy") in OURS):
            for peer in PEERS:
                theirs = [row for row in rows if name_of(row["policy"]) == peer and reads_no_more(row, own)]
                compared += bool(theirs)
                best = min(theirs, key=lambda row: row["kl_mean"], default=None)
                if best is not None and best["kl_mean"] <= own["kl_mean"]:
                    lost.append(f"{peer} on {kind}, {_point(best)} ({own['policy']}: {_point(own)})")
    if not compared:
        return None
    said = "a policy that reads no more (up to 2%) is at least as close to full attention"
    return f"In {_of(len(lost), compared)} comparisons {said}: {_listed(lost)}." if lost else ""


def _closer_for_more(source: Source) -> str | None:
    """The paper's form in the study of continuations: its retrieval heads read everything, which costs more bytes."""
    if source.result.command != "continuations":
        return None
    compared, closer = 0, []
    for kind, scores in source.cells.items():
        ours = dict(_students(scores, "hybrid, {} heads", "{}"))
        for key, score in _students(scores, "paper, {} heads", "{}-uncompleted-paper"):
            compared += key in ours
            if key in ours and score["kl_mean"] < ours[key]["kl_mean"]:
                budget, heads = key
                pair = f"{score['kl_mean']:.2g} (hybrid: {ours[key]['kl_mean']:.2g})"
                closer.append(f"{heads} heads, {budget} tokens on {kind}, KL {pair}")
    if not compared:
        return None
    said = "the paper's form with as many retrieval heads, which reads more, is closer"
    return f"In {_of(len(closer), compared)} comparisons {said}: {_listed(closer)}." if closer else ""


def _students(scores: Mapping[str, Row], *forms: str) -> Iterator[tuple[tuple[str, str], Row]]:
    """Budget and heads, and the score, of students whose labels have one of these forms."""
    patterns = [re.compile(form.replace("{}", r"(\d+)")) for form in forms]
    for label, score in scores.items():
        if outer := _STUDENT.fullmatch(label):
            for pattern in patterns:
                if inner := pattern.fullmatch(outer[2]):
                    yield (outer[1], inner[1]), score


def _better_ways(source: Source, ours: str = "sensitivity") -> str | None:
    """Other ways to identify as many heads that led to a plan with a lower KL, on average or on one kind of prompt."""
    variants = source.result.summary.get("variants", {})
    own = variants.get(ours)
    others = {way: found for way, found in variants.items() if own and way != ours}
    others = {way: found for way, found in others.items() if found["retrieval_heads"] == own["retrieval_heads"]}
    if not others:
        return None
    better = [way for way, found in others.items() if found["kl_mean"] <= own["kl_mean"]]
    kinds = [kind for kind in own["kl"] if any(found["kl"][kind] <= own["kl"][kind] for found in others.values())]
    if not better and not kinds:
        return ""
    average = f"{_of(len(better), len(others))} other ways to identify a plan do" + (
        f": {', '.join(better)}" if better else ""
    )
    return (
        f"On {_of(len(kinds), len(own['kl']))} kinds of prompts some other way to identify a plan does better than "
        f"{ours}; on average {average}."
    )


def _lower_than_full(source: Source) -> str | None:
    """Tasks on which hybrid scores lower than full attention."""
    own = [(place, row) for place, row, _ in _task_places(source) if "difference_high" in row]
    lower = [
        f"{row['policy']} on {place}, {row['difference_value'] * 100:+.0f} points" for place, row in own
        if row["difference_high"] < 0
    ]  # fmt: skip
    if not own:
        return None
    said = "hybrid scores lower than full attention, beyond the 95% interval"
    return f"In {_of(len(lower), len(own))} comparisons {said}: {_listed(lower)}." if lower else ""


def _higher_peers(source: Source) -> str | None:
    """Tasks on which a peer that reads no more scores higher."""
    compared, higher = 0, []
    for place, row, others in _task_places(source):
        for peer in PEERS:
            theirs = [other for other in others if name_of(other["policy"]) == peer and reads_no_more(other, row)]
            compared += bool(theirs)
            best = max(theirs, key=lambda other: other["score"], default=row)
            if best["score"] > row["score"]:
                higher.append(f"{best['policy']} on {place}, {best['score']:.0%} ({row['policy']}: {row['score']:.0%})")
    if not compared:
        return None
    said = "a policy that reads no more (up to 2%) scores higher"
    return f"In {_of(len(higher), compared)} comparisons {said}: {_listed(higher)}." if higher else ""


def _task_places(source: Source) -> Iterator[tuple[str, Row, list[Row]]]:
    """Every row of hybrid: its task, length and metric, the row, and all rows of that place."""
    if source.result.command != "evaluate tasks":
        return
    places: dict[str, list[Row]] = {}
    for row in source.rows:
        place = row["task"] + (f" ({row['length']} tokens)" if "length" in row else "")
        places.setdefault(f"{place}, {row['metric']}", []).append(row)
    for place, found in places.items():
        yield from ((place, row, found) for row in found if name_of(row["policy"]) in OURS)


# ---------------------------------------------------------------------- speed and memory


def _slower(source: Source) -> str | None:
    """Rows of a benchmark that took longer than what they are compared with."""
    timed = [row for row in source.rows if row.get("speedup") is not None and source.name not in BUSY]
    slower = [f"{_subject(row)}, {row['speedup']:.2f}x" for row in timed if row["speedup"] < 1]
    if not timed:
        return None
    return (
        f"{_of(len(slower), len(timed))} rows took longer than what they are compared with: {'; '.join(slower)}."
        if slower
        else ""
    )


def _slower_from_host(source: Source) -> str | None:
    """Decoding from host memory against a resident cache, where both were timed."""
    if source.result.command != "bench memory":
        return None
    timed = [(row, own) for row, own in from_host(source.rows) if own and row.get("ms") and own.get("ms")]
    slower = [
        f"{_subject(row)}, a store of {row['store_percent']}%, {row['ms']:.2f} ms (resident: {own['ms']:.2f})"
        for row, own in timed if row["ms"] > own["ms"]
    ]  # fmt: skip
    if not timed:
        return None
    return (
        f"{_of(len(slower), len(timed))} rows took longer than a resident cache: {'; '.join(slower)}." if slower else ""
    )


FINDERS: dict[str, tuple[Finder, ...]] = {
    "fidelity": (_closer_peers, _closer_for_more, _better_ways, _lower_than_full, _higher_peers),
    "speed": (_slower,),
    "memory": (_slower_from_host,),
}


def _listed(found: Sequence[str], most: int = 4) -> str:
    """The first few; the details have all."""
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")


def _of(number: int, total: int) -> str:
    return f"{number or 'none'} of {total}"


def _point(row: Row) -> str:
    return f"KL {row['kl_mean']:.3g} at {row['kv_bytes_per_token'] / 1e6:.2f} MB a token"


def _subject(row: Mapping[str, Any]) -> str:
    named = [str(row[key]) for key in ("op", "form", "way") if isinstance(row.get(key), str)][:1]
    case = [f"{row['batch']} x {tokens(row['context'])}"] if "batch" in row and "context" in row else []
    return ", ".join(named + case)
