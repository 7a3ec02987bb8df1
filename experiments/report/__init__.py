"""Result files of the commands, `*.json` in a folder -> one Markdown document and its pictures.

    sources           a result file: model, machine, rows
    names             the legend: names, colours, meanings, for tables and pictures alike
    faithful, fast, memory     the three tables that the page starts with
    better_elsewhere  where something else is better: above each of them
    pictures          which there are; draw_speed, draw_fidelity: how; picture: what they share
    front_table       the small table of README.md
    details           a section for each file: what it says, and folded, all its numbers
    tables            Markdown

A result is shown by its command and by what it has: `cells` (policies by kind of prompt), `rows` (flat objects, a table
row each), `variants` (ways to identify), and plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.report import better_elsewhere, details, faithful, fast, memory
from experiments.report.names import LEGEND
from experiments.report.pictures import Picture, pictures
from experiments.report.sources import Source, read
from experiments.report.tables import least_and_most, table, table_and_rest

INTRODUCTION = "<!-- Made from docs/results/*.json by `make results`; do not edit. -->\n\n# Results\n"
_FAITHFUL = (
    "KL divergence from full attention's next-token distribution, teacher-forced, and scores of tasks. What reads as "
    "much reads at most 2% more KV bytes a token."
)
_FAST = (
    "Times a token, unless a row says otherwise. Decode is what follows the prefill, which is dense and the same "
    "computation either way; where it is included, the row says so and takes the mean of both. In brackets: 10th to "
    "90th percentile of steps, or fastest to slowest of repeats. In vLLM, `full` is its own attention and `hybrid` the "
    "plugin. Of every series the case that gains least and the one that gains most."
)
_MEMORY = (
    "Hybrid attention reads less of the KV cache, but stores all of it on the GPU, unless the cache is in host "
    "memory (`--cache host`). A shape has random weights: the share of blocks that its selections fetch is replayed "
    "from a real model. Of every series the case with the least and with the most."
)
TABLES: tuple[tuple[str, str, Callable[[Sequence[Source]], list[dict[str, Any]]], str], ...] = (
    ("How faithful", "fidelity", faithful.table_rows, _FAITHFUL),
    ("How fast", "speed", fast.table_rows, _FAST),
    ("How much memory", "memory", memory.table_rows, _MEMORY),
)
KEY_ROWS: dict[str, Callable[[Sequence[dict[str, Any]]], Sequence[Any]]] = {
    "fidelity": lambda rows: rows,
    "speed": lambda rows: least_and_most(rows, fast.group, fast.gain),
    "memory": lambda rows: least_and_most(rows, memory.group, memory.share),
}
"""What each table shows before it is unfolded: of every series what gains least and what gains most."""


def render(folder: Path) -> str:
    """The document's text."""
    sources = read(folder)
    if not sources:
        return INTRODUCTION + "\nThere are no result files yet.\n"
    drawn = list(pictures(sources))
    parts = [INTRODUCTION, *_tables(sources), *_pictures(drawn, folder.name), "## Details\n"]
    return "\n".join([*parts, *(details.section(source, drawn) for source in sources)])


def draw(folder: Path) -> list[Path]:
    """The pictures that the document shows, next to their result files."""
    drawn = []
    for picture in pictures(read(folder)):
        drawn.append(folder / picture.name)
        picture.draw(drawn[-1])
    return drawn


def _tables(sources: Sequence[Source]) -> Iterator[str]:
    for title, topic, rows_of, said in TABLES:
        rows = rows_of(sources)
        if rows:
            yield "\n".join(
                [
                    f"## {title}",
                    "",
                    said,
                    "",
                    *better_elsewhere.lines(sources, topic),
                    "",
                    *table_and_rest(rows, KEY_ROWS[topic](rows)),
                    "",
                ]
            )


def _pictures(drawn: Sequence[Picture], folder: str) -> Iterator[str]:
    yield "## Names\n\nIn tables and pictures alike:\n"
    yield "\n".join(table([{"name": name, "what it is": found.meaning} for name, found in LEGEND.items()])) + "\n"
    own = [picture for picture in drawn if picture.of is None]
    if own:
        yield "## Pictures\n"
    for picture in own:
        yield f"![{picture.caption}]({folder}/{picture.name})\n"
