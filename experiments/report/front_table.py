"""The small table of results in README.md: a few rows of the three tables, between two markers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report import faithful, fast, memory
from experiments.report.sources import Source, read
from experiments.report.tables import table

BEGIN, END = "<!-- made by `make results` -->\n", "<!-- end -->"
Row = Mapping[str, Any]
_MODEL = "Llama-3-8B's shape"
_TIMES = (
    ("prefill", "1 x 128K"), ("decode step", "1 x 32K"), ("decode step", "1 x 128K"), ("decode step", "4 x 128K"),
    ("lossless", "1 x 128K"), ("vLLM", "4 x 128K"),
)  # fmt: skip


def lines(sources: Sequence[Source]) -> Iterator[str]:
    """The table."""
    yield from table(list(_rows(sources)))


def _rows(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    timed = [row for row in fast.table_rows(sources) if row["model"] == _MODEL and "CPU" not in row["machine"]]
    for what, case in _TIMES:
        row = next((row for row in timed if _is(row, what) and row["batch x context"] == case), None)
        if row is not None:
            hybrid = row["hybrid"] if what == "prefill" else row["hybrid"].split(" (")[0]
            yield _front(f"{row['timed']}, {case}", row["full"], hybrid, row)
    close = faithful.table_rows(sources)
    for measure in ("mean KL", "task"):
        row = next((row for row in close if measure in row["measure"]), None)
        if row is not None:
            budgets, scores = (str(row[name]).split(" / ") for name in ("budget", "hybrid (95% interval)"))
            at = len(budgets) // 2
            what = f"{row['measure']}: {row['measured on']}, budget {budgets[at].removesuffix(' tokens')}"
            yield _front(what, row["full"], scores[at], row)
    kept = [row for row in memory.table_rows(sources) if row["what"].startswith("kept")]
    kept = [row for row in kept if "200%" in row["what"]] or kept
    for row in kept[-1:]:
        yield _front(
            f"KV cache {row['what']}: {row['model']}, {row['batch x context']}", row["full"], row["hybrid"], row
        )


def _is(row: Row, what: str) -> bool:
    timed = str(row["timed"])
    return timed == what if what == "decode step" else timed.startswith(what) and "ranks" not in timed


def _front(what: str, full: str, hybrid: str, row: Row) -> dict[str, Any]:
    measured = f"{row['machine']}, n = {row['n']}"
    file = str(row["file"]).split(", ")[0].replace("](", "](docs/")
    return {"": what, "full attention": full, "hybrid": hybrid, "measured on": measured, "file": file}


def write(page: Path, folder: Path) -> bool:
    """Put the table between the markers of a page; returns whether it has them."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if BEGIN not in text:
        return False
    page.write_text(with_table(text, folder), encoding="utf-8")
    return True


def with_table(text: str, folder: Path) -> str:
    """The page's text with the table of a folder of result files."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n".join([*lines(read(folder)), rest[rest.index(END) :]])
