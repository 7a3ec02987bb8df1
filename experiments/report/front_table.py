"""The small table of results in README.md, between two markers: how fast, how faithful, how much memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report import faithful, fast, memory
from experiments.report.sources import Source, read
from experiments.report.tables import table

BEGIN, END = "<!-- made by `make results` -->\n", "<!-- end -->"
Row = Mapping[str, Any]
_SHAPE = "Llama-3-8B's shape"
_TIMES = (
    ("prefill .*", "1 x 128K"), ("decode step", "1 x 32K"), ("decode step", "1 x 128K"), ("decode step", "4 x 128K"),
    (r"vLLM \S+, decode", "4 x 128K"),
)  # fmt: skip
"""What was timed, all of its name, and the case."""


def lines(sources: Sequence[Source]) -> Iterator[str]:
    """The table."""
    yield from table([*_times(sources), *_fidelity(sources), *_memory(sources)])


def _times(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    """Steps of a shape with random weights; texts that a real model wrote, hybrid and lossless."""
    timed = [row for row in fast.table_rows(sources) if _has_gpu(row)]
    for what, case in _TIMES:
        shaped = (row for row in timed if row["model"] == _SHAPE and row["batch x context"] == case)
        for row in (row for row in shaped if re.fullmatch(what, row["timed"])):
            hybrid = row["hybrid"] if row["timed"].startswith("prefill") else row["hybrid"].split(" (")[0]
            yield _front(f"{row['timed']}: {_SHAPE}, {case}", row["full"], hybrid, row["others"], row)
            break
    texts = [row for row in timed if " decode of texts" in row["timed"] and "8-bit" not in row["timed"]]
    for hybrid in [row for row in texts if row["timed"].startswith("hybrid")][:1]:
        lossless = [row for row in texts if row["timed"].startswith("lossless") and row["file"] == hybrid["file"]]
        for row in (hybrid, *lossless[:1]):
            where = f"{row['model']}, {row['batch x context']}"
            yield _front(f"{row['timed']}: {where}", row["full"], row["hybrid"], row["others"], row)


def _fidelity(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    """The longest continuations with competitors, a row for each form of a plan; the most tasks, and the longest
    with any."""
    found = [one for source in sources for one in faithful.closeness(source)]
    continued = list(faithful.continuations(found))
    first = next((texts for texts in continued if any(one.peers for one in texts)), next(iter(continued), []))
    yield from (_of_texts(texts) for texts in continued if first and _of_plan(texts[0]) == _of_plan(first[0]))
    tasks = list(faithful.task_rows(sources))
    compared = [row for row in tasks if row["closest that reads as much"]]
    widest = max(tasks, key=_number_of_tasks, default=None)
    yield from (_of_tasks(row) for row in tasks if row is widest or row in compared[:1])


def _of_plan(one: faithful.Close) -> tuple[str, int, str]:
    """What the forms of a plan have in common."""
    return one.source.model, one.kind.length, one.plan


def _of_texts(texts: Sequence[faithful.Close]) -> dict[str, Any]:
    """All texts of a form in a row."""
    one, names = texts[0], " / ".join(close.kind.text for close in texts)
    form = faithful.budget_and_form(texts).replace(" tokens", "", 1)
    what = f"mean KL, nats, {names}: {one.source.model}, {one.kind.length} tokens, budget {form}"
    counts = dict.fromkeys(close.prompts for close in texts)
    count = f"{len(texts)} x {one.prompts}" if len(counts) == 1 else " + ".join(str(close.prompts) for close in texts)
    where = {"machine": one.source.machine, "n": count, "file": one.source.link}
    return _front(what, *faithful.kl_cells(texts), where)


def _number_of_tasks(row: Row) -> tuple[int, int]:
    """The number of tasks that a row averages, and their tokens."""
    mean, length = re.search(r"mean of (\d+)", row["measure"]), re.search(r"(\d+) tokens", row["measured on"])
    return int(mean[1]) if mean else 1, int(length[1]) if length else 0


def _of_tasks(row: Row) -> dict[str, Any]:
    """The middle one of its budgets."""
    budgets, scores, peers = (
        str(row[name]).split(" / ") for name in ("budget", "hybrid (95% interval)", "closest that reads as much")
    )
    at = (len(budgets) - 1) // 2
    what = f"{row['measure']}: {row['measured on']}, budget {budgets[at].removesuffix(' tokens')}"
    return _front(what, row["full"], scores[at], peers[at] if len(peers) == len(scores) else "", row)


def _memory(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    """A cache in host memory, on a GPU and at the shape that was timed above, if there is a file of it."""
    kept = [row for row in memory.table_rows(sources) if row["what"].startswith("kept") and "200%" in row["what"]]
    kept.sort(key=lambda row: (_has_gpu(row), row["model"] == _SHAPE, row["batch x context"] == "1 x 128K"))
    for row in kept[-1:]:
        resident, _, host = row["ms a token, resident and host (decode)"].partition(", ")
        slower = f" ({host} ms a token instead of {resident})" if host and resident[:1].isdigit() else ""
        what = f"KV cache {row['what']}: {row['model']}, {row['batch x context']}"
        yield _front(what, row["full"], row["hybrid"] + slower, "", row)


def _has_gpu(row: Row) -> bool:
    return "CPU" not in row["machine"]


def _front(what: str, full: str, hybrid: str, other: str, row: Row) -> dict[str, Any]:
    return {
        "": what,
        "full attention": full,
        "hybrid": hybrid,
        "best alternative": other,
        "measured on": f"{row['machine']}, n = {row['n']}",
        "file": str(row["file"]).split(", ")[0].replace("](", "](docs/"),
    }


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
