"""Pictures of speed: milliseconds a token over the context, and the operations of a step as shares of the bandwidth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report.names import colour_of
from experiments.report.picture import GRID, contexts, legend_below, lines, new_figure, save, tidy
from experiments.report.sources import Row, Source

Series = dict[str, dict[int, float]]
"""Name -> context -> ms a token."""
_SERVED = {"stock": "vLLM", "hybrid": "vLLM, hybrid"}
_OURS, _OTHERS = colour_of("hybrid"), colour_of("vLLM")
_STEPS = ("full", "hybrid", "hybrid+centroid")


def times(sources: Sequence[Source]) -> dict[tuple[str, str], dict[int, Series]]:
    """Model and machine -> batch -> series, of decode steps and of vLLM on one rank; later files count."""
    found: dict[tuple[str, str], dict[int, Series]] = {}
    for source in sorted(sources, key=lambda one: one.date):
        for row in source.rows:
            name = _name(source, row)
            if name and row["ms"]:
                series = found.setdefault((source.model, source.machine), {}).setdefault(row["batch"], {})
                series.setdefault(name, {})[row["context"]] = row["ms"]
    return {key: batches for key, by_batch in found.items() if (batches := _drawable(by_batch))}


def _name(source: Source, row: Row) -> str | None:
    if source.result.command == "bench step" and row["form"] in _STEPS:
        return row["form"]
    if source.result.command == "bench serving" and source.settings.get("tensor_parallel_size", 1) == 1:
        asked = {"kv_cache_dtype": "auto", "page_tokens": None}
        usual = not source.layout and all(source.settings.get(name, own) == own for name, own in asked.items())
        plain = usual and row.get("requests") != "mixed"
        return _SERVED.get(row["way"]) if plain else None
    return None


def _drawable(by_batch: Mapping[int, Series]) -> dict[int, Series]:
    """Batches with a line of each of two names; a point or two have a table."""
    return {
        batch: series for batch, series in sorted(by_batch.items())
        if sum(len(points) > 1 for points in series.values()) > 1
    }  # fmt: skip


def draw_times(batches: Mapping[int, Series], title: str, path: Path) -> None:
    """A panel for each batch, from 0 ms."""
    figure = new_figure(4.8 * len(batches), 3.7)
    for at, (batch, series) in enumerate(batches.items(), start=1):
        panel_of_times(figure.add_subplot(1, len(batches), at), series, f"{title}, batch {batch}")
    legend_below(figure)
    save(figure, path)


def panel_of_times(axes: Any, series: Series, title: str) -> None:
    """Milliseconds a token over the context."""
    lines(axes, {name: list(points.items()) for name, points in series.items()})
    for name, beside in (("full", (-5, 3)), ("hybrid", (12, -14))):
        for context, ms in series.get(name, {}).items():
            axes.annotate(
                f"{ms:.1f}", (context, ms), xytext=beside, textcoords="offset points", ha="right", fontsize=8,
                color=colour_of(name),
            )  # fmt: skip
    contexts(axes, [context for points in series.values() for context in points])
    axes.set(ylim=(0, None), ylabel="ms a token, decode only")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=GRID)
    tidy(axes, title)


# ---------------------------------------------------------------------- operations


def has_operations(source: Source) -> bool:
    """Whether a file measured operations against the read bandwidth."""
    return bool(source.result.summary.get("read_tb_s")) and any(
        row.get("op") and row.get("bytes") for row in source.rows
    )


def draw_operations(source: Source, path: Path) -> None:
    """Bars of the share of the bandwidth, a panel for each batch and context; the whole axis is 100%."""
    rows = [row for row in source.rows if row.get("bytes") and row.get("share")]
    blocks = sorted({row["block"] for row in rows if row.get("block")})
    rows = [row for row in rows if row.get("block") in (None, 0, *blocks[len(blocks) // 2 :][:1])]
    cases = sorted({(row["batch"], row["context"]) for row in rows})
    names = list(dict.fromkeys(_operation(row) for row in rows))
    figure = new_figure(1.8 + 3.6 * len(cases), 0.9 + 0.21 * len(names))
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for row in (row for row in rows if (row["batch"], row["context"]) == case):
            at = names.index(_operation(row))
            axes.barh(at, row["share"], 0.7, color=_OURS if _is_ours(row["op"]) else _OTHERS)
            axes.text(min(row["share"], 1.0) + 0.01, at, f"{row['share']:.0%}", va="center", fontsize=8)
        axes.set(xlim=(0, 1.16), xlabel="share of the read bandwidth")
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.grid(axis="x", color=GRID)
        tidy(axes, f"batch {case[0]}, {case[1] // 1024}K tokens")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for colour, name in ((_OURS, "ours"), (_OTHERS, "others'")):
        panels[0].barh(0, 0, color=colour, label=name)
    legend_below(figure)
    save(figure, path)


def _operation(row: Row) -> str:
    return row["op"] + (f", blocks of {row['block']}" if row.get("block") else "")


def _is_ours(op: str) -> bool:
    return not op.startswith(("read only", "full, sdpa", "full, flashinfer"))
