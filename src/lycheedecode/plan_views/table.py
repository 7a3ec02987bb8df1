"""A head plan in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..plan import HeadPlan
from . import caption, families, how_it_was_made, title


def render(plan: HeadPlan, name: str = "", gates: bool = False) -> RenderableType:
    """Layers x heads: `R` for a retrieval head, else its donor as `layer.head`; with `gates` their means instead."""
    colour = {head: family.colour for family in families(plan) for head in (family.donor, *family.followers)}
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("layer", justify="right", style="dim")
    for head in range(plan.num_kv_heads):
        table.add_column(str(head), justify="right", no_wrap=True)
    table.add_column("retrieves", justify="right", style="dim")
    for layer in range(plan.num_layers):
        cells = [
            Text(_cell(plan, layer, head, gates), Style(color=colour[layer, head], bold=is_own, reverse=is_own))
            for head in range(plan.num_kv_heads)
            for is_own in [plan.donors[layer][head] == (layer, head)]
        ]
        table.add_row(str(layer), *cells, str(len(plan.retrieval_heads(layer)) or ""))
    legend = "numbers: mean of the gate" if gates else "R: retrieval head; 3.1: reuses the selection of layer 3, head 1"
    return Group(
        Text(title(plan, name), "bold"), Text(caption(plan)), Text(), table, Text(), Text(legend, "dim"), *_how(plan)
    )


def _cell(plan: HeadPlan, layer: int, head: int, gates: bool) -> str:
    if gates and plan.gate_means is not None:
        return f"{plan.gate_means[layer][head]:.2f}"
    donor = plan.donors[layer][head]
    return " R " if donor == (layer, head) else f"{donor[0]}.{donor[1]}"


def _how(plan: HeadPlan) -> list[RenderableType]:
    lines = how_it_was_made(plan)
    if not lines:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in lines:
        table.add_row(key, value)
    return [Text(), Text("How it was made", "bold"), table]
