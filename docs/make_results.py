"""docs/results/*.json -> docs/results.md and pictures: `make results`. No number in the documents is typed by hand.

A result file holds `command`, `settings`, `environment` and `result`. A result is shown by what it has: `cells`
(policies by kind of prompt), `rows` (flat objects, a table row each), and its plain values. A file with `variants`
beside `environment` compares ways to identify. The first paragraph says where something else is better.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
INTRODUCTION = "<!-- Made from docs/results/*.json by `make results`; do not edit. -->\n\n# Results\n"
PEERS = ("paper", "kascade", "tidaldecode", "quest", "duo", "streaming", "same-index", "random")
"""Policies that hybrid must beat; the oracle `own-topk` reads all keys with every head."""
COLOURS = dict(zip(("hybrid", *PEERS, "own-topk"), [
    "#c0392b", "#2c3e50", "#2980b9", "#27ae60", "#8e44ad", "#d68910", "#16a085", "#7f8c8d", "#bdc3c7", "#000000",
], strict=True))  # fmt: skip


def render(folder: Path = FOLDER) -> str:
    """The document's text."""
    reports = _reports(folder)
    sections = [_section(name, report) for name, report in reports.items()]
    if not sections:
        return INTRODUCTION + "\nThere are no result files yet.\n"
    return "\n".join([INTRODUCTION, " ".join(_where_not_better(reports)) + "\n", *sections])


def draw(folder: Path = FOLDER) -> list[Path]:
    """The pictures that the document shows."""
    drawn = []
    for name, report in _reports(folder).items():
        panels = _panels(report)
        if panels:
            drawn.append(folder / f"{name}.png")
            _draw_panels(panels, drawn[-1])
    return drawn


def _reports(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _section(name: str, report: Mapping[str, Any]) -> str:
    title = report.get("what") or report.get("command") or name
    lines = [f"## {name}: {title}", "", *_where(report.get("environment") or {}), ""]
    if _panels(report):
        lines += [f"![Mean KL over KV bytes per token; lower left is better](results/{name}.png)", ""]
    if "variants" in report:
        lines += _variants(report["variants"])
    else:
        lines += _result(report.get("result") or {})
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- where something else is better


def _where_not_better(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
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
        f"{name}: a policy that reads no more KV bytes than hybrid is at least as close to full attention in "
        f"{_of(len(lost), compared)} comparisons{listed}"
    )


def _point(score: Mapping[str, Any]) -> str:
    return f"KL {score['kl_mean']:.4g} at {_value(score['kv_bytes_per_token'], 'bytes')} a token"


def _reads_no_more(row: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    return row["kv_bytes_per_token"] <= own["kv_bytes_per_token"]


def _of(number: int, total: int) -> str:
    return f"{number or 'none'} of {total}"


def _subject(row: Mapping[str, Any]) -> str:
    named = [str(row[key]) for key in ("op", "form", "way") if isinstance(row.get(key), str)][:1]
    return ", ".join(named + [f"{key} {row[key]}" for key in ("batch", "context") if key in row])


# ---------------------------------------------------------------------- pictures

Panels = dict[str, dict[str, list[tuple[float, float]]]]
"""Kind of prompt -> policy -> points `(KV bytes per token, mean KL)`."""


def _panels(report: Mapping[str, Any]) -> Panels:
    """Of every kind of prompt on which at least two policies other than full attention were measured."""
    panels: Panels = {}
    for kind, scores in ((report.get("result") or {}).get("cells") or {}).items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for score in scores.values():
            if score.get("policy") in COLOURS and score.get("kl_mean", 0) > 0:
                lines.setdefault(score["policy"], []).append((score["kv_bytes_per_token"], score["kl_mean"]))
        if len(lines) > 1:
            panels[kind] = {policy: sorted(lines[policy]) for policy in COLOURS if policy in lines}
    return panels


def _draw_panels(panels: Panels, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 6.3), 3.4 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    names: dict[str, Any] = {}
    for at, (kind, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, at)
        for policy, points in lines.items():
            ours = policy == "hybrid"
            [names[policy]] = axes.plot(
                [size / 1e6 for size, _ in points], [kl for _, kl in points], "o-", color=COLOURS[policy],
                ms=5 if ours else 3.5, lw=2.0 if ours else 1.0, zorder=3 if ours else 2,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="KV read per token, MB", ylabel="mean KL, nats")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(kind, fontsize=9)
        axes.grid(True, which="both", color="#ecf0f1", lw=0.6)
        axes.tick_params(labelsize=8)
    named = [policy for policy in COLOURS if policy in names]
    figure.legend([names[policy] for policy in named], named, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the version of matplotlib is no result


# ---------------------------------------------------------------------- tables


def _where(environment: Mapping[str, Any]) -> Iterator[str]:
    machine, versions = environment.get("machine") or {}, environment.get("versions") or {}
    gpus = machine.get("gpus") or []
    device = (
        f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores')} cores"
    )
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "vllm") if name in versions)
    parts = [device, packages, f"commit {str(environment.get('commit'))[:10]}", str(environment.get("date", ""))[:10]]
    yield "; ".join(part for part in parts if part)


def _result(result: Mapping[str, Any]) -> Iterator[str]:
    if "cells" in result:
        for cell, scores in result["cells"].items():
            yield from (f"**{cell}**", "")
            yield from _table([{"": name, **_flat(score)} for name, score in scores.items()])
            yield ""
            yield from _along(scores)
    elif "rows" in result:
        yield from _table(result["rows"])
    plain = {name: value for name, value in result.items() if isinstance(value, (int, float, str)) and value != ""}
    if plain:
        yield from ("", *(f"- {_words(name)}: {_value(value, name)}" for name, value in plain.items()))


def _flat(score: Mapping[str, Any]) -> dict[str, Any]:
    """Of a score what fits a row: the name says which policy it is."""
    return {name: value for name, value in score.items() if name not in ("policy", "by_position")}


def _along(scores: Mapping[str, Mapping[str, Any]], long: int = 64) -> Iterator[str]:
    """Mean KL by position, of answers with at least `long` tokens."""
    rows = []
    for label, score in scores.items():
        buckets = score.get("by_position") or ()
        if buckets and buckets[-1]["last"] >= long:
            spans = {f"{bucket['first']} to {bucket['last']}": bucket["kl_mean"] for bucket in buckets}
            rows.append({"mean KL after tokens": label, **spans})
    if rows:
        yield from _table(rows)
        yield ""


def _variants(variants: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    ranked = sorted(variants.items(), key=lambda item: item[1]["kl_mean"])
    yield from _table(
        [
            {"": name, "retrieval heads": found["retrieval_heads"], "kl_mean": found["kl_mean"], **found["kl"]}
            for name, found in ranked
        ]
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    yield _row(_words(name) for name in names)
    yield _row("---" if any(isinstance(row.get(name), str) for row in rows) else "---:" for name in names)
    for row in rows:
        yield _row(_value(row.get(name), name) for name in names)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "bytes" in name:
        return f"{value / 1e6:.2f} MB"
    if name in ("top1_agreement", "same_answer", "exact_match", "share") or name.endswith("_share"):
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    target = FOLDER.with_suffix(".md")
    pictures = draw()
    target.write_text(render(), encoding="utf-8")
    print(f"{target.name}: {len(_reports(FOLDER))} result files, {len(pictures)} pictures", file=sys.stderr)
