"""Figures that come out the same every time, without a display; names and colours are the legend's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from experiments.report.names import colour_of, order_of
from experiments.report.sources import tokens

GRID = "#ecf0f1"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a PNG; which matplotlib drew it is no result."""
    figure.savefig(path, dpi=110, metadata={"Software": None})


def tidy(axes: Any, title: str) -> None:
    """What all axes have in common."""
    short = "\n".join(fill(line, 42) for line in title.splitlines())
    axes.set_title(short, fontsize=10 if len(title) < 38 else 9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.set_axisbelow(True)


def lines(
    axes: Any, series: Mapping[str, Sequence[tuple[float, ...]]], colours: Mapping[str, Any] | None = None
) -> None:
    """A line for each name over points `(x, y)` or `(x, y, half of an interval)`, ours on top; the legend's colours."""
    for name in sorted(series, key=lambda name: (order_of(name), name)):
        points = sorted(series[name])
        x, y = [point[0] for point in points], [point[1] for point in points]
        halves = [point[2] if len(point) > 2 else 0 for point in points]
        ours = name.startswith("hybrid")
        colour = (colours or {}).get(name) or colour_of(name)
        style = {"color": colour, "ms": 5 if ours else 4, "lw": 2.0 if ours else 1.3, "zorder": 3 if ours else 2}
        error = halves if any(halves) else None
        axes.errorbar(x, y, yerr=error, fmt="o-" if len(points) > 1 else "D", capsize=3, label=name, **style)


def bars(axes: Any, values: Mapping[str, float], halves: Mapping[str, float], labels: Mapping[str, str]) -> None:
    """Horizontal bars from the left edge, the first on top, with their numbers."""
    names = list(values)
    at = range(len(names))
    error = [[halves.get(name, 0.0) for name in names]] * 2 if halves else None
    axes.barh(
        at, [values[name] for name in names], 0.7, color=[colour_of(name) for name in names], xerr=error,
        error_kw={"capsize": 2, "lw": 1},
    )  # fmt: skip
    axes.set_yticks(at, names)
    axes.invert_yaxis()
    for place, name in enumerate(names):
        end = values[name] + halves.get(name, 0.0)
        axes.annotate(
            labels[name], (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.grid(axis="x", color=GRID)


def contexts(axes: Any, found: Sequence[float]) -> None:
    """A logarithmic axis of contexts, marked where something was measured."""
    axes.set(xscale="log", xlabel="context, tokens")
    axes.set_xticks(sorted(set(found)), [tokens(int(context)) for context in sorted(set(found))])
    axes.minorticks_off()


def legend_below(figure: Any) -> None:
    """One legend for all panels, in the order of the page's."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    names = sorted(found, key=lambda name: (order_of(name), name))
    columns = int(100 / (6 + max(map(len, names), default=1)))
    figure.legend(
        [found[name] for name in names], names, loc="outside lower center", ncols=min(columns, max(len(names), 1)),
        fontsize=9, frameon=False,
    )  # fmt: skip
