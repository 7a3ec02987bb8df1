"""Pictures of speed, from the result files of `bench ops` and `bench step`.

roofline   bytes a second of every operation over the bytes that it must read; the memory's own speed is the roof
speed-up   of a decode step over the one with full attention, by context, beside what the bytes allow
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report.picture import new_figure, save

Row = Mapping[str, Any]
_KINDS = {
    "full, ours": ("full attention, ours", "#7f8c8d", "s"),
    "full, ": ("full attention, others", "#bdc3c7", "s"),
    "scan + select": ("scan and select", "#2980b9", "^"),
    "scan": ("scan", "#8e44ad", "v"),
    "attend": ("attend", "#c0392b", "o"),
    "all of a step": ("all attention of a step", "#2c3e50", "D"),
    "the same, 8-bit scan": ("the same, 8-bit scan", "#16a085", "D"),
}
"""Beginning of an operation's name -> label, colour, marker."""
_BATCHES = ("#c0392b", "#2980b9", "#27ae60", "#8e44ad", "#d68910")


def has_roofline(report: Mapping[str, Any]) -> bool:
    """Whether a result file measured operations against a read bandwidth."""
    result = report.get("result") or {}
    return bool(result.get("read_tb_s")) and any("op" in row and row["bytes"] for row in result.get("rows", ()))


def draw_roofline(report: Mapping[str, Any], path: Path) -> None:
    """Achieved bandwidth over bytes, under the measured one; bytes that come out of the L2 may pass it."""
    result = report["result"]
    rows = [row for row in result["rows"] if row["bytes"]]
    figure = new_figure(6.6, 4.2)
    axes = figure.add_subplot()
    axes.axhline(result["read_tb_s"], color="k", lw=1, label=f"read bandwidth, {result['read_tb_s']:.2f} TB/s")
    for start, (label, colour, marker) in _KINDS.items():
        mine = [row for row in rows if _kind(row["op"]) == start]
        if mine:
            axes.plot(
                [row["bytes"] / 1e6 for row in mine], [row["bytes"] / row["ms"] / 1e9 for row in mine],
                marker, color=colour, ms=4.5, alpha=0.8, label=label,
            )  # fmt: skip
    axes.set(xscale="log", ylim=(0, None), xlabel="bytes that must be read, MB", ylabel="read, TB/s")
    axes.grid(True, color="#ecf0f1", lw=0.6)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    save(figure, path)


def _kind(op: str) -> str | None:
    return next((start for start in _KINDS if op.startswith(start)), None)


def has_speedup(report: Mapping[str, Any]) -> bool:
    """Whether a result file measured decode steps of another form beside full attention."""
    rows = (report.get("result") or {}).get("rows", ())
    return any(row.get("form") not in (None, "full") and row.get("speedup") for row in rows)


def draw_speedup(report: Mapping[str, Any], path: Path) -> None:
    """Speed-up over context, a line for each batch, a panel for each form; what the bytes allow is dashed."""
    rows = report["result"]["rows"]
    full = {(row["batch"], row["context"]): row for row in rows if row["form"] == "full"}
    rows = [row for row in rows if row["form"] != "full" and row["speedup"]]
    forms = list(dict.fromkeys(row["form"] for row in rows))
    figure = new_figure(4.6 * len(forms), 3.9)
    axes = None
    for at, form in enumerate(forms, start=1):
        axes = figure.add_subplot(1, len(forms), at, sharey=axes)
        for batch, colour in zip(sorted({row["batch"] for row in rows}), _BATCHES, strict=False):
            mine = sorted((row for row in rows if (row["form"], row["batch"]) == (form, batch)), key=_context)
            contexts = [row["context"] / 1024 for row in mine]
            axes.plot(contexts, [row["speedup"] for row in mine], "o-", color=colour, ms=4.5, label=f"batch {batch}")
            axes.plot(contexts, _bounds(mine, full), "--", color=colour, lw=1)
        axes.axhline(1, color="#7f8c8d", lw=0.8)
        axes.set(xscale="log", xlabel="context, K tokens", title=form)
        axes.set_xticks(sorted({row["context"] / 1024 for row in rows}), minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(True, color="#ecf0f1", lw=0.6)
    figure.axes[0].set_ylabel("speed-up of a decode step over full attention")
    figure.axes[0].legend(fontsize=8, title="dashed: bytes allow", title_fontsize=8)
    save(figure, path)


def _context(row: Row) -> int:
    return row["context"]


def _bounds(rows: Sequence[Row], full: Mapping[tuple[int, int], Row]) -> list[float]:
    """How many times more bytes full attention reads, weights and all."""
    return [full[row["batch"], row["context"]]["bytes"] / row["bytes"] for row in rows]
