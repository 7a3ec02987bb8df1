"""The picture on the front page: what a decode step costs, and how close policies come at equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report.fidelity import COLOURS
from experiments.report.picture import new_figure, save

STEPS = "h200-step-llama-3-8b"
PEERS, KIND = "peers", "4096 tokens of prose, 1 passkey"
BATCHES = (1, 4)
_DARK, _OURS = COLOURS.get("full", "#34495e"), COLOURS["hybrid"]


def draw(reports: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Write the picture where both result files are there; returns whether it did."""
    if STEPS not in reports or PEERS not in reports:
        return False
    figure = new_figure(9.6, 3.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _steps(left, reports[STEPS]["result"]["rows"])
    _fidelity(right, reports[PEERS]["result"]["cells"][KIND])
    save(figure, path)
    return True


def _steps(axes: Any, rows: list[dict[str, Any]]) -> None:
    cases = [(b, c) for b in BATCHES for c in sorted({row["context"] for row in rows if row["batch"] == b})]
    times = {(row["form"], row["batch"], row["context"]): row["ms"] for row in rows}
    for at, case in enumerate(cases):
        for side, form, colour in ((-0.2, "full", _DARK), (0.2, "hybrid", _OURS)):
            ms = times[(form, *case)]
            axes.bar(at + side, ms, 0.38, color=colour, label=f"{form} attention" if at == 0 else None)
            axes.text(at + side, ms + 0.3, f"{ms:.1f}", ha="center", fontsize=8)
        speedup = times[("full", *case)] / times[("hybrid", *case)]
        axes.text(
            at, times[("full", *case)] + 1.9, f"{speedup:.1f}x", ha="center", fontsize=9, weight="bold", color=_OURS
        )
    axes.set_xticks(range(len(cases)), [f"{batch} x {context // 1024}K" for batch, context in cases], fontsize=9)
    axes.set(ylabel="ms a token", ylim=(0, max(times[("full", *case)] for case in cases) * 1.22))
    axes.set_title("Decode step, Llama-3-8B's shape, one H200", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def _fidelity(axes: Any, scores: Mapping[str, Mapping[str, Any]]) -> None:
    found = {score["policy"]: score["kl_mean"] for score in scores.values() if score["kl_mean"] > 0}
    ranked = sorted(found, key=found.__getitem__, reverse=True)
    axes.scatter(
        [found[n] for n in ranked], ranked, c=[_OURS if n == "hybrid" else "#7f8c8d" for n in ranked], zorder=2
    )
    axes.grid(axis="x", color="#ecf0f1")
    for at, name in enumerate(ranked):
        axes.text(found[name] * 1.2, at, f"{found[name]:.2g}", va="center", fontsize=8)
    axes.set(xscale="log", xlabel="mean KL to full attention, nats", xlim=(None, max(found.values()) * 4))
    axes.tick_params(labelsize=9)
    axes.set_title("Policies reading equal bytes", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
