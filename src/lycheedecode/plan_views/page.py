"""A head plan as one HTML file: inline SVG and CSS, no script, nothing fetched. The page is `plan.html`."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from ..plan import Head, HeadPlan
from . import Family, caption, families, how_it_was_made, title

CELL, MARGIN, TOP = 30, 58, 34


def render(plan: HeadPlan, name: str = "") -> str:
    """The page's text."""
    template = files(__package__).joinpath("plan.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
    return page.render(
        plan=plan,
        title=title(plan, name),
        caption=caption(plan),
        families=families(plan),
        made=how_it_was_made(plan),
        width=MARGIN + plan.num_layers * CELL + 12,
        height=TOP + plan.num_kv_heads * CELL + 12,
        middle=TOP + plan.num_kv_heads * CELL / 2,
        cell=CELL,
        margin=MARGIN,
        top=TOP,
        x=_x,
        y=_y,
        shade=shade,
        link=_link,
        about=lambda head, family: _about(plan, head, family),
    )


def shade(mean: float) -> str:
    """Background of a cell: white at a gate mean of 0, slate at 1."""
    low, high = (255, 255, 255), (91, 102, 119)
    return "#" + "".join(f"{round(a + (b - a) * min(max(mean, 0.0), 1.0)):02x}" for a, b in zip(low, high, strict=True))


def _about(plan: HeadPlan, head: Head, family: Family) -> str:
    """What is said of a head when the mouse is over it."""
    if head == family.donor:
        role = f"retrieval head, donor of {len(family.followers)}"
    else:
        role = f"reuses the selection of layer {family.donor[0]}, head {family.donor[1]}"
    gate = f"\ngate mean {plan.gate_means[head[0]][head[1]]:.3f}" if plan.gate_means else ""
    budget = f"\n{plan.budgets[head[0]][head[1]]:g} times the budget" if plan.budgets else ""
    return f"layer {head[0]}, head {head[1]}\n{role}{gate}{budget}"


def curve(donor: Head, follower: Head) -> list[tuple[float, float]]:
    """Control points of a cubic from donor to follower, in cells: links along one row bow away from its marks."""
    (x0, y0), (x1, y1) = donor, follower
    if x0 == x1:
        bow = 0.34 + 0.05 * abs(y1 - y0)
        return [(x0, y0), (x0 + bow, y0), (x0 + bow, y1), (x1, y1)]
    lift = -min(0.18 + 0.045 * (x1 - x0), 0.7) if y0 == y1 else 0.0
    reach = (x1 - x0) * 0.5
    return [(x0, y0), (x0 + reach, y0 + lift), (x1 - reach, y1 + lift), (x1, y1)]


def _link(donor: Head, follower: Head) -> str:
    points = [f"{_x(x):.1f},{_y(y):.1f}" for x, y in curve(donor, follower)]
    return f"M{points[0]} C{' '.join(points[1:])}"


def _x(layer: float) -> float:
    return MARGIN + (layer + 0.5) * CELL


def _y(head: float) -> float:
    return TOP + (head + 0.5) * CELL
