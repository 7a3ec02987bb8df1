"""Result files of the commands, `*.json` in a folder -> one Markdown document and its pictures.

    better_elsewhere  where something else is better: the first paragraph
    summaries         of long files: what they say, in one table
    tables            of every file: what it was measured on, and its numbers
    fidelity          pictures: KL over bytes
    front             the front page's picture
    speed             pictures: bytes a second, speed-up over the context

Files are read by `lycheedecode.results`. A result is shown by what it has: `cells` (policies by kind of prompt), `rows`
(flat objects, a table row each), `variants` (ways to identify), and its plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.report import better_elsewhere, fidelity, front, speed, summaries, tables
from lycheedecode.results import Result

INTRODUCTION = "<!-- Made from docs/results/*.json by `make results`; do not edit. -->\n\n# Results\n"


class Picture(NamedTuple):
    """What can be drawn of a result file: its caption, whether the file has it, and how."""

    caption: str
    fits: Callable[[Mapping[str, Any]], bool]
    draw: Callable[[Mapping[str, Any], Path], None]


PICTURES = (
    Picture("Mean KL over KV bytes per token; lower left is better", fidelity.has_panels, fidelity.draw_panels),
    Picture("What operations read a second, over what they must read", speed.has_roofline, speed.draw_roofline),
    Picture("Speed-up of a decode step over full attention", speed.has_speedup, speed.draw_speedup),
)


def render(folder: Path) -> str:
    """The document's text."""
    reports = _reports(folder)
    sections = [_section(name, report, folder.name) for name, report in reports.items()]
    if not sections:
        return INTRODUCTION + "\nThere are no result files yet.\n"
    return "\n".join([INTRODUCTION, "\n".join(better_elsewhere.lines(reports)) + "\n", *sections])


def draw(folder: Path) -> list[Path]:
    """The pictures that the document shows, next to their result files."""
    drawn, reports = [], _reports(folder)
    if front.draw(reports, folder / "front.png"):
        drawn.append(folder / "front.png")
    for name, report in reports.items():
        picture = _picture(report)
        if picture is not None:
            drawn.append(folder / f"{name}.png")
            picture.draw(report, drawn[-1])
    return drawn


def _reports(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: Result.load(path).to_json() for path in sorted(folder.glob("*.json"))}


def _picture(report: Mapping[str, Any]) -> Picture | None:
    return next((picture for picture in PICTURES if picture.fits(report)), None)


def _section(name: str, report: Mapping[str, Any], folder: str) -> str:
    title = report["command"]
    lines = [f"## {name}: {title}", "", *tables.machine_line(report.get("environment") or {}), ""]
    picture = _picture(report)
    if picture is not None:
        lines += [f"![{picture.caption}]({folder}/{name}.png)", ""]
    result = report["result"]
    if "variants" in result:
        lines += tables.variant_lines(result["variants"])
    else:
        numbers, summary = list(tables.result_lines(result)), list(summaries.lines(result))
        lines += _folded(summary, numbers) if summary else numbers
    return "\n".join(lines) + "\n"


def _folded(summary: list[str], numbers: list[str]) -> list[str]:
    return [*summary, "", "<details><summary>All numbers</summary>", "", *numbers, "", "</details>"]
