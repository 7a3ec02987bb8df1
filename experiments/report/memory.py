"""The third table: what of the KV cache lies on the GPU, and what a token reads of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.report.sources import Row, Source, tokens

FORMS = {
    "hybrid": "",
    "hybrid+float8": ", 8-bit scan keys",
    "hybrid+int4": ", 4-bit scan keys",
    "hybrid+refresh2": ", selected every second token",
    "hybrid+refresh4": ", selected every fourth token",
}
READ_BY = {"budget": "budget", "share": "share of the context"}


def table_rows(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The rows of the table: caches in host memory, then bytes read."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for source in sorted(sources, key=lambda one: one.date):
        if source.result.command == "bench memory":
            latest |= dict(_kept(source))
        elif source.result.command == "bench step":
            latest |= dict(_read(source))
    return [row for _, row in sorted(latest.items(), key=lambda item: (item[0][0], *map(str, item[0][1:])))]


def from_host(rows: Sequence[Row]) -> Iterator[tuple[Row, Row | None]]:
    """Rows of steps over a cache in host memory, each beside that of a resident one, None where it did not fit."""
    steps = [row for row in rows if "bytes_on_gpu" in row and row.get("ahead", True)]
    resident = {_alike(row): row for row in steps if _place(row) == "resident"}
    yield from ((row, resident.get(_alike(row))) for row in steps if _place(row) == "host")


def _place(row: Row) -> str:
    return row.get("cache", "host" if row.get("store_percent") else "resident")


def _alike(row: Row) -> tuple[Any, ...]:
    return row.get("part"), row.get("budget_tokens"), row.get("form"), row.get("reading"), *_case(row)


def _kept(source: Source) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every size of the store beside the resident cache."""
    for row, base in from_host(source.rows):
        how = row.get("budget_tokens", 0), row.get("form", "hybrid"), row.get("reading", ""), row["store_percent"]
        key = (0, source.model, source.machine, *_case(row), *how)
        whole, times = row["bytes_on_host"] if base is None else base["bytes_on_gpu"], ""
        if row.get("ms"):
            times = (
                f"{base['ms']:.2f}, {row['ms']:.2f}" if base and base.get("ms") else f"does not fit, {row['ms']:.2f}"
            )
        budget = f" of {row['budget_tokens']} tokens" if "budget_tokens" in row else ""
        budget += FORMS[row["form"]] if "form" in row else ""
        budget += f", new blocks as for the same {READ_BY[row['reading']]}" if "reading" in row else ""
        yield (
            key,
            {
                "what": f"kept on the GPU, a store of {row['store_percent']}% of a selection{budget}",
                "model": source.model,
                "batch x context": f"{row['batch']} x {tokens(row['context'])}",
                "full": size(whole),
                "hybrid": size(row["bytes_on_gpu"]),
                "share": f"{row['bytes_on_gpu'] / whole:.1%}",
                "ms a token, resident and host (decode)": times,
                "fetched": f"{row['miss_rate']:.1%}" if "miss_rate" in row else "",
                "n": source.settings.get("steps") if row.get("part") == "steps"
                else f"{source.settings.get('tokens')} tokens",
                "machine": source.machine,
                "file": source.link,
            },
        )  # fmt: skip


def _read(source: Source) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What a decode step reads besides the weights."""
    weights = source.result.summary.get("weight_bytes", 0)
    full = {_case(row): row for row in source.rows if row["form"] == "full"}
    for row in source.rows:
        base = full.get(_case(row))
        if row["form"] != "hybrid" or base is None:
            continue
        read = [one["bytes"] - weights for one in (base, row)]
        yield (
            (1, source.model, source.machine, *_case(row)),
            {
                "what": "read by a decode step",
                "model": source.model,
                "batch x context": f"{row['batch']} x {tokens(row['context'])}",
                "full": size(read[0]),
                "hybrid": size(read[1]),
                "share": f"{read[1] / read[0]:.1%}",
                "n": source.settings.get("steps"),
                "machine": source.machine,
                "file": source.link,
            },
        )


def group(row: Row) -> tuple[Any, ...]:
    """What the cases of a series have in common."""
    return row["what"].partition(",")[0], row["model"], row["machine"]


def share(row: Row) -> float:
    """Percent of what full attention keeps or reads."""
    return float(row["share"].rstrip("%"))


def _case(row: Row) -> tuple[int, int]:
    return row["batch"], row["context"]


def size(count: float) -> str:
    """Bytes for people, with a thousand to a step."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
