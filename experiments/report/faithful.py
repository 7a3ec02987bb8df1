"""The first table: how close hybrid attention comes to full attention, the best evidence of every model.

continuations of texts    all lengths and budgets; what reads as much beside it
tasks                     those that full attention solves, by family and length
other prompts             where no more than that: the hardest kind of the widest comparison at equal bytes
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from experiments.report.names import OURS, PEERS, name_of
from experiments.report.sources import PromptKind, Row, Source
from lycheedecode.evaluate.tasks.catalogue import FAMILIES

SOLVED = 0.5
"""Score from which on full attention counts as solving a task."""
LIKE = 1.02
"""What reads up to so many times hybrid's bytes reads as much: answers differ in length, and last blocks in how full
they are."""
_NORMAL = 1.96
_OF_STUDY = "of the study"
_OLD_STUDENT = re.compile(r"(\d+) tokens: hybrid, (\d+) heads(, one plan for all budgets)?")
_NEW_STUDENT = re.compile(r"budget_tokens=(\d+)-(?:(joined)-)?(\d+)(?:-coupling-[\d.]+)?")


@dataclass(frozen=True)
class Close:
    """Hybrid's KL on one kind of prompt: the mean, the half width of its 95% interval, and the peers; `form` says what
    its scan reads where that is not the cache."""

    kind: PromptKind
    budget: int
    heads: int | None
    plan: str
    kl: float
    error: float | None
    prompts: int
    source: Source
    peers: Mapping[str, float] = field(default_factory=dict)
    floor: float | None = None
    form: str = ""


def table_rows(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The rows of the table."""
    found = [one for source in sources for one in closeness(source)]
    continued = (
        _kl_row(f"{texts[0].source.model}, {texts[0].kind.length} tokens continued", texts)
        for texts in continuations(found)
    )
    return [*continued, *task_rows(sources), *_hardest(found)]


# ---------------------------------------------------------------------- KL


def closeness(source: Source) -> Iterator[Close]:
    """What a file says of hybrid's KL."""
    for label, scores in source.cells.items():
        kind = PromptKind.parse(label)
        if source.result.command == "continuations":
            yield from _students(kind, scores, source)
            continue
        floor = next((score["kl_mean"] for score in scores.values() if score.get("policy") == "rounding"), None)
        for own in scores.values():
            if own.get("policy") in OURS and own.get("kl_mean"):
                yield Close(
                    kind, own["budget_tokens"], own.get("retrieval_heads"), str(own.get("plan", "")), own["kl_mean"],
                    _half(own), own["prompts"], source, closest_peers(own, scores.values()), floor,
                    OURS[own["policy"]],
                )  # fmt: skip


def closest_peers(own: Row, scores: Iterable[Row]) -> dict[str, float]:
    """The KL of every peer that reads as much as `own` or less; the oracle, which reads more, is no peer."""
    found: dict[str, float] = {}
    for score in scores:
        peer = name_of(score.get("policy", ""))
        if peer in PEERS and "kl_mean" in score and reads_no_more(score, own):
            found[peer] = min(score["kl_mean"], found.get(peer, score["kl_mean"]))
    return found


def reads_no_more(score: Row, own: Row) -> bool:
    """Whether a policy reads as much as another or less."""
    return score.get("kv_bytes_per_token", 0) <= LIKE * own.get("kv_bytes_per_token", 0)


def _students(kind: PromptKind, scores: Mapping[str, Row], source: Source) -> Iterator[Close]:
    """The study of continuations: one plan at every budget, that for all budgets where there is one."""
    floor = scores.get("full attention by another kernel", {}).get("kl_mean")
    found: dict[int, list[tuple[bool, int, Row]]] = {}
    for label, score in scores.items():
        if match := _OLD_STUDENT.fullmatch(label):
            found.setdefault(int(match[1]), []).append((bool(match[3]), int(match[2]), score))
        elif match := _NEW_STUDENT.fullmatch(label):
            found.setdefault(int(match[1]), []).append((bool(match[2]), int(match[3]), score))
    for budget, students in found.items():
        shared = [(heads, score) for joined, heads, score in students if joined] or [one[1:] for one in students]
        heads, score = sorted(shared, key=lambda one: one[0])[len(shared) // 2]
        yield Close(
            kind, budget, heads, _OF_STUDY, score["kl_mean"], _half(score), score["prompts"], source, floor=floor
        )  # fmt: skip


def _half(score: Row) -> float | None:
    return _NORMAL * score["kl_error"] if score.get("kl_error") else None


def continuations(found: Sequence[Close]) -> Iterator[list[Close]]:
    """The texts of each model, length, budget and plan; the study's where there are no others."""
    best: dict[tuple[str, int, int], dict[str, dict[str, Close]]] = {}
    for one in sorted(found, key=lambda one: one.source.date):
        if one.kind.continues:
            plans = best.setdefault((one.source.model, one.kind.length, one.budget), {})
            plans.setdefault(f"{one.plan} {one.heads} {one.form}", {})[one.kind.text] = one
    longest = {model: max(length for name, length, _ in best if name == model) for model, *_ in best}
    for _, plans in sorted(best.items(), key=lambda item: _rank(item[0], longest)):
        own = {plan: texts for plan, texts in plans.items() if not plan.startswith(_OF_STUDY)} or plans
        yield from (list(texts.values()) for texts in own.values())


def _rank(texts: tuple[str, int, int], longest: Mapping[str, int]) -> tuple[int, str, int, int]:
    """Models by their longest texts; of each, the longest first, the smallest budget first."""
    model, length, budget = texts
    return -longest[model], model, -length, budget


def _hardest(found: Sequence[Close]) -> Iterator[dict[str, Any]]:
    """Among other prompts, for every model, the kind with the highest KL in the file with most comparisons."""
    files: dict[str, dict[str, list[Close]]] = {}
    for one in found:
        if not one.kind.continues and one.peers and not one.form:
            files.setdefault(one.source.model, {}).setdefault(one.source.name, []).append(one)
    for model, by_name in files.items():
        widest = max(
            by_name.values(), key=lambda many: (len({one.kind for one in many}), sum(len(c.peers) for c in many))
        )
        hardest = max(widest, key=lambda one: one.kl)
        kinds = len({one.kind for one in widest})
        what = f"{model}, {hardest.kind.length} tokens of {hardest.kind.text}, {hardest.kind.asked}"
        yield _kl_row(f"{what} (hardest of {kinds} kinds)" if kinds > 1 else what, [hardest])


def kl_cells(texts: Sequence[Close]) -> tuple[str, str, str]:
    """Full attention's KL, hybrid's, and that of the closest peer that reads as much, of every text."""
    closest = [_closest(one, several=False) if one.peers else "" for one in texts]
    own = " / ".join(_spread(one.kl, one.error, "") for one in texts)
    return _rounding(texts), own, " / ".join(closest) if any(closest) else ""


def budget_and_form(texts: Sequence[Close]) -> str:
    """`1024 tokens, 14 retrieval heads, 8-bit scan keys`."""
    heads = {one.heads for one in texts if one.heads}
    parts = [f"{texts[0].budget} tokens", f"{heads.pop()} retrieval heads" if len(heads) == 1 else "", texts[0].form]
    return ", ".join(filter(None, parts))


def _rounding(texts: Sequence[Close]) -> str:
    floors = [f"{one.floor:.2g}" for one in texts if one.floor and one.floor > 1e-4]
    return "0" + (f" (rounding {' / '.join(floors)})" if floors else "")


def _kl_row(what: str, texts: Sequence[Close]) -> dict[str, Any]:
    several = len(texts) > 1
    return {
        "measured on": what,
        "measure": "mean KL, nats",
        "full": _rounding(texts),
        "hybrid (95% interval)": "; ".join(
            _spread(one.kl, one.error, one.kind.text if several else "") for one in texts
        ),
        "budget": budget_and_form(texts),
        "closest that reads as much": "; ".join(_closest(one, several) for one in texts if one.peers),
        "n": " + ".join(str(one.prompts) for one in texts) if several else texts[0].prompts,
        "machine": texts[0].source.machine,
        "file": ", ".join(dict.fromkeys(one.source.link for one in texts)),
    }


def _spread(value: float, half: float | None, text: str) -> str:
    return f"{text} {value:.3g}".strip() + (f" ± {half:.2g}" if half else "")


def _closest(one: Close, several: bool) -> str:
    name, kl = min(one.peers.items(), key=lambda item: item[1])
    return f"{one.kind.text + ': ' if several else ''}{name} {kl:.3g}"


# ---------------------------------------------------------------------- tasks


def task_rows(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    """A row for each model, family of tasks, length and form: means over the tasks that full attention solves."""
    found: dict[tuple[str, str, int, str], list[tuple[int, bool, dict[str, Any]]]] = {}
    for source in sources:
        if source.result.command == "evaluate tasks":
            for (family, length), tasks in _families(source.rows).items():
                row = _task_row(source, family, length, tasks)
                if row is not None:
                    matched = bool(row["closest that reads as much"])
                    key = source.model, family, length, _forms(_own(tasks))
                    found.setdefault(key, []).append((len(tasks), matched, row))
    for _, many in sorted(found.items(), key=lambda item: (*item[0][:2], -item[0][2], item[0][3])):
        yield max(many, key=lambda one: one[:2])[2]


def _families(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, dict[str, Row]]]:
    """Family and length -> task -> policy -> its row, of tasks that full attention solves."""
    tasks: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        tasks.setdefault((row["task"], row.get("length", 0), row["metric"]), {})[row["policy"]] = row
    found: dict[tuple[str, int], dict[str, dict[str, Row]]] = {}
    for (task, length, _), policies in tasks.items():
        family = next((name for name, members in FAMILIES.items() if task in members), task)
        if policies.get("full", {}).get("score", 0) >= SOLVED:
            found.setdefault((family, length), {}).setdefault(task, policies)
    return found


def _task_row(
    source: Source, family: str, length: int, tasks: Mapping[str, Mapping[str, Row]]
) -> dict[str, Any] | None:
    own = _own(tasks)
    if not own:
        return None
    which = (
        f"mean of {len(tasks)} tasks that full attention solves"
        if len(tasks) > 1
        else f"{next(iter(tasks))}, the one task that full attention solves"
    )
    family = {"ruler": "RULER", "longbench": "LongBench"}.get(family, family)
    place = f", {length} tokens" if length else ""
    items = {found["full"]["items"] for found in tasks.values()}
    return {
        "measured on": f"{source.model}, {family}{place}",
        "measure": which,
        "full": f"{_mean(tasks, 'full'):.1%}",
        "hybrid (95% interval)": " / ".join(_score(tasks, label) for label in own),
        "budget": " / ".join(_budget(source, label) for label in own).replace(" tokens /", " /"),
        "closest that reads as much": " / ".join(filter(None, (_best_peer(tasks, label) for label in own))),
        "n": f"{len(tasks)} x {items.pop()}" if len(items) == 1 else sum(f["full"]["items"] for f in tasks.values()),
        "machine": source.machine,
        "file": source.link,
    }


def _shared(tasks: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """Labels of the policies that answered all tasks."""
    return [label for label in next(iter(tasks.values())) if all(label in found for found in tasks.values())]


def _own(tasks: Mapping[str, Mapping[str, Row]]) -> list[str]:
    return [label for label in _shared(tasks) if name_of(label) in OURS and "difference_value" in _first(tasks, label)]


def _forms(labels: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(OURS[name_of(label)] for label in labels))


def _budget(source: Source, label: str) -> str:
    """The budget that a policy's label or its settings name, and what else it does."""
    settings = (source.settings.get("policy") or {}).get(label) or {}
    budget = label.partition(", ")[2] or (
        f"{settings['budget_tokens']} tokens" if settings.get("budget_tokens") else ""
    )
    return f"{budget} {label.partition(',')[0].removeprefix('hybrid').split('@')[0]}".strip()


def _first(tasks: Mapping[str, Mapping[str, Row]], label: str) -> Row:
    return next(iter(tasks.values()))[label]


def _mean(tasks: Mapping[str, Mapping[str, Row]], label: str) -> float:
    return fmean(found[label]["score"] for found in tasks.values())


def _score(tasks: Mapping[str, Mapping[str, Row]], label: str) -> str:
    """The mean, and the 95% interval of what it differs from full attention's: of items that both answered."""
    rows = [found[label] for found in tasks.values()]
    change = fmean(row["difference_value"] for row in rows)
    widths = [(row["difference_high"] - row["difference_low"]) / 2 for row in rows if "difference_high" in row]
    half = sum(width**2 for width in widths) ** 0.5 / len(rows)
    return f"{_mean(tasks, label):.1%} ({change * 100:+.1f} ± {half * 100:.1f} points)"


def _best_peer(tasks: Mapping[str, Mapping[str, Row]], own: str) -> str:
    """The peer that reads as much as hybrid under a budget and scores highest."""
    peers = [
        label for label in _shared(tasks)
        if name_of(label) in PEERS and all(reads_no_more(found[label], found[own]) for found in tasks.values())
    ]  # fmt: skip
    best = max(peers, key=lambda label: _mean(tasks, label), default=None)
    return f"{name_of(best)} {_mean(tasks, best):.1%}" if best else ""
