"""Pictures of fidelity, from the result files of `evaluate fidelity`: how close policies come, and what they read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report.better_elsewhere import PEERS
from experiments.report.picture import new_figure, save

COLOURS = dict(zip(("hybrid", *PEERS, "own-topk"), [
    "#c0392b", "#2c3e50", "#2980b9", "#27ae60", "#8e44ad", "#d68910", "#16a085", "#7f8c8d", "#bdc3c7", "#000000",
], strict=True))  # fmt: skip
Panels = dict[str, dict[str, list[tuple[float, float]]]]
"""Kind of prompt -> policy -> points `(KV bytes per token, mean KL)`."""


def panels_of(report: Mapping[str, Any]) -> Panels:
    """Of every kind of prompt on which at least two policies other than full attention were measured."""
    panels: Panels = {}
    for kind, scores in ((report.get("result") or {}).get("cells") or {}).items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for score in scores.values():
            if score.get("policy") in COLOURS and score.get("kl_mean", 0) > 0:
                lines.setdefault(score["policy"], []).append((score["kv_bytes_per_token"], score["kl_mean"]))
        if len(lines) > 1:
            panels[kind] = {policy: sorted(lines[policy]) for policy in COLOURS if policy in lines}
    return panels


def has_panels(report: Mapping[str, Any]) -> bool:
    """Whether a result file compares policies."""
    return bool(panels_of(report))


def draw_panels(report: Mapping[str, Any], path: Path) -> None:
    """A panel for each kind of prompt: mean KL over bytes, both logarithmic, a line for each policy."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    panels = panels_of(report)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(max(4.2 * columns, 6.3), 3.4 * rows + 0.5)
    names: dict[str, Any] = {}
    for at, (kind, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, at)
        for policy, points in lines.items():
            ours = policy == "hybrid"
            [names[policy]] = axes.plot(
                [size / 1e6 for size, _ in points], [kl for _, kl in points], "o-", color=COLOURS[policy],
                ms=5 if ours else 3.5, lw=2.0 if ours else 1.0, zorder=3 if ours else 2,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="KV read per token, MB", ylabel="mean KL, nats")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(kind, fontsize=9)
        axes.grid(True, which="both", color="#ecf0f1", lw=0.6)
        axes.tick_params(labelsize=8)
    named = [policy for policy in COLOURS if policy in names]
    figure.legend([names[policy] for policy in named], named, loc="outside lower center", ncols=5, fontsize=8)
    save(figure, path)
