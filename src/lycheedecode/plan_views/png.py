"""A head plan as a picture, with matplotlib (extra `plot`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import LycheeError
from ..plan import HeadPlan
from . import caption, families, title
from .page import curve, shade


class PlotError(LycheeError):
    """A picture that cannot be made; the message is one sentence."""


def require_matplotlib() -> None:
    """Raise `PlotError` when matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("A PNG needs matplotlib: pip install 'lycheedecode[plot]'.")


def save(plan: HeadPlan, path: Path, name: str = "") -> None:
    """Write the picture: layers from left to right, heads from top to bottom, links from donors to their followers."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Curve

    layers, heads = plan.num_layers, plan.num_kv_heads
    figure = Figure(figsize=(max(0.34 * layers, 6.0), 0.34 * heads + 1.0))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for layer in range(layers):
        for head in range(heads):
            fill = shade(plan.gate_means[layer][head]) if plan.gate_means else "#ffffff"
            axes.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, facecolor=fill, edgecolor="#e3e7ee", lw=0.7))
    for family in families(plan):
        for follower in family.followers:
            codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
            path_of = Curve(curve(family.donor, follower), codes)
            axes.add_patch(PathPatch(path_of, facecolor="none", edgecolor=family.colour, lw=1.1, alpha=0.4))
            axes.plot(*follower, "o", ms=5, color=family.colour, mec="white", mew=0.6, zorder=3)
        axes.plot(*family.donor, "o", ms=14, color=family.colour, mec="white", mew=1.4, zorder=4)
        axes.annotate(str(len(family.followers)), family.donor, color="white", fontsize=7, weight="bold",
                      ha="center", va="center", zorder=5)  # fmt: skip
    axes.set(xlim=(-0.6, layers - 0.4), ylim=(heads - 0.4, -0.8), aspect="equal", xticks=range(layers),
             yticks=range(heads))  # fmt: skip
    axes.tick_params(length=0, labelsize=7, colors="#7a8494")
    axes.spines[:].set_visible(False)
    gates = "; shade: gate mean" if plan.gate_means else ""
    key = f"large: retrieval head with its number of followers; small: sparse head in its donor's colour{gates}"
    axes.set_title(f"{caption(plan)}\n{key}", fontsize=7.5, loc="left", color="#505a69")
    axes.annotate(title(plan, name), (0, 1), (0, 30), xycoords="axes fraction", textcoords="offset points",
                  fontsize=11, weight="bold")  # fmt: skip
    _write(figure, path)


def save_gates(steps: Sequence[int], means: Sequence[Tensor], path: Path) -> None:
    """Write the picture of gates that polarise.

    Args:
        steps: training steps, ascending.
        means: E[z] of every head at each of them, `[L, Hkv]`.
        path: of the picture.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for gate in zip(*(mean.flatten().tolist() for mean in means), strict=True):
        axes.plot(steps, gate, lw=0.8, color="#b03a2e" if gate[-1] > 0.5 else "#b8c0cc", alpha=0.8)
    opened = [float((mean > 0.5).float().mean()) for mean in means]
    axes.plot(steps, opened, lw=1.6, ls="--", color="#20242c", label="share of heads with E[z] > 0.5")
    axes.set(xlabel="training step", ylabel="E[z]", ylim=(-0.03, 1.03))
    axes.legend(fontsize=7, frameon=False)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.15)
