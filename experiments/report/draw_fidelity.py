"""Pictures of fidelity: KL or scores over the bytes that a token reads, and bars where all read the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import floor, log10
from pathlib import Path
from typing import Any

from experiments.report.faithful import SOLVED
from experiments.report.names import LEGEND, PEERS, name_of
from experiments.report.picture import GRID, bars, legend_below, lines, new_figure, save, tidy
from experiments.report.sources import PromptKind, Row, Source

Panels = dict[str, dict[str, list[tuple[float, ...]]]]
"""Kind of prompt or task -> policy -> points `(MB a token, KL or score, half of the 95% interval)`."""
_DRAWN = ("hybrid", "own-topk", *PEERS)
_MOST_PANELS = 9


def over_bytes(source: Source) -> Panels:
    """Where several policies, one of them at several budgets, were measured."""
    panels: Panels = {}
    for label, scores in source.cells.items():
        for score in scores.values():
            if name_of(score.get("policy", "")) in _DRAWN and score.get("kl_mean") and "kv_bytes_per_token" in score:
                point = score["kv_bytes_per_token"] / 1e6, score["kl_mean"], 1.96 * (score.get("kl_error") or 0)
                panels.setdefault(label, {}).setdefault(_series(source, score), []).append(point)
    return _lines_only(panels)


def _series(source: Source, score: Row) -> str:
    """The policy; of files that compare plans, the number of retrieval heads."""
    several = len(source.settings.get("plan") or ()) > 1 and score["policy"] == "hybrid"
    return f"hybrid, {score['retrieval_heads']:2} heads" if several else score["policy"]


def _shades(panels: Panels) -> dict[str, str]:
    """Colours of plans with few to many heads, light to dark; other names have the legend's."""
    names = sorted({name for found in panels.values() for name in found if name.endswith(" heads")})
    return dict(zip(names, ("#f5b7b1", "#f1948a", "#ec7063", "#cb4335", "#943126", "#641e16", "#000000"), strict=False))


def scores_over_bytes(source: Source) -> Panels:
    """Scores over bytes read, for tasks that full attention solves."""
    if source.result.command != "evaluate tasks":
        return {}
    panels: Panels = {}
    full: dict[str, float] = {}
    for row in source.rows:
        place = ", ".join(str(row[key]) for key in ("task", "length") if key in row)
        name = name_of(row["policy"])
        if name == "full":
            full[place] = row["score"]
        if name in (*_DRAWN, "full") and "kv_bytes_per_token" in row:
            half = (row.get("high", row["score"]) - row.get("low", row["score"])) / 2
            panels.setdefault(place, {}).setdefault(name, []).append(
                (row["kv_bytes_per_token"] / 1e6, row["score"], half)
            )
    return _lines_only({place: found for place, found in panels.items() if full.get(place, 0) >= SOLVED})


def _lines_only(panels: Panels) -> Panels:
    kept = {
        kind: found for kind, found in panels.items()
        if len(found) > 1 and any(max(points)[0] > 1.1 * min(points)[0] for points in found.values())
    }  # fmt: skip
    return dict(list(kept.items())[:_MOST_PANELS])


def draw_over_bytes(panels: Panels, path: Path, score: bool = False) -> None:
    """A panel for each kind; KL on a logarithmic axis, scores from 0 to 100%."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(max(4.2 * columns, 6.3), 3.3 * rows + 0.5)
    for at, (kind, found) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, at)
        lines(axes, found, _shades(panels))
        axes.set(xscale="log", xlabel="KV read a token, MB")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        if score:
            axes.set(ylim=(0, 1.05), ylabel="score")
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        else:
            axes.set(yscale="log", ylabel="mean KL, nats")
        axes.grid(True, color=GRID, lw=0.6)
        tidy(axes, kind)
    legend_below(figure)
    save(figure, path)


# ---------------------------------------------------------------------- equal bytes


def side_by_side(source: Source) -> dict[str, dict[str, Row]]:
    """Kind -> policy -> score, where hybrid and others were measured once each; the closest first."""
    panels = {}
    for kind, scores in source.cells.items():
        found = {
            label: score for label, score in scores.items()
            if name_of(score.get("policy", "")) in {*LEGEND} - {"full"}
            and score.get("kl_mean") and "kv_bytes_per_token" in score
        }  # fmt: skip
        short = _shortest(found)
        if len(short) > 1 and any(score["policy"] == "hybrid" for score in short.values()):
            panels[kind] = dict(sorted(short.items(), key=lambda item: item[1]["kl_mean"]))
    return dict(sorted(panels.items(), key=lambda item: -PromptKind.parse(item[0]).continues)[:_MOST_PANELS])


def _shortest(scores: Mapping[str, Row]) -> dict[str, Row]:
    """Each by its policy; where that has several plans, by their numbers of heads; where those are equal, by label."""
    named = [(score["policy"], f"{score['policy']}, {score.get('retrieval_heads')} heads", label)
             for label, score in scores.items()]  # fmt: skip
    often = Counter(name for names in named for name in set(names))
    shortest = (next((name for name in names if often[name] == 1), names[-1]) for names in named)
    return dict(zip(shortest, scores.values(), strict=True))


def draw_side_by_side(panels: Mapping[str, Mapping[str, Row]], path: Path) -> None:
    """Bars of KL, a panel for each kind."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure = new_figure(4.4 * columns, (0.27 * most + 1.0) * rows)
    every = [panel_of_bars(figure.add_subplot(rows, columns, at), scores, PromptKind.parse(kind).title)
             for at, (kind, scores) in enumerate(panels.items(), start=1)]  # fmt: skip
    for axes in figure.axes:  # so that bars can be compared from panel to panel
        axes.set_xlim(min(low for low, _ in every), max(high for _, high in every))
    save(figure, path)


def panel_of_bars(axes: Any, scores: Mapping[str, Row], title: str) -> tuple[float, float]:
    """KL as bars on a logarithmic axis from a power of ten; bytes beside them where they differ. Returns its limits."""
    values = {name: score["kl_mean"] for name, score in scores.items()}
    halves = {name: 1.96 * score["kl_error"] for name, score in scores.items() if score.get("kl_error")}
    sizes = [score["kv_bytes_per_token"] for score in scores.values()]
    alike = max(sizes) <= 1.05 * min(sizes)
    labels = {
        name: f"{score['kl_mean']:.2g}" + ("" if alike else f"  ({score['kv_bytes_per_token'] / 1e6:.0f} MB)")
        for name, score in scores.items()
    }
    bars(axes, values, halves, labels)
    low, high = 10.0 ** floor(log10(min(values.values()) / 2)), max(values.values()) * (8 if alike else 30)
    axes.set(xscale="log", xlim=(low, high), xlabel="mean KL, nats")
    tidy(axes, title)
    return low, high
