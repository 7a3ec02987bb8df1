"""A head plan as one HTML file: inline SVG and CSS, no script, nothing fetched."""

from __future__ import annotations

from html import escape

from ..plan import Head, HeadPlan
from . import Family, caption, families, flat, title

CELL, MARGIN, TOP = 30, 58, 34
_STYLE = """
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; }
body { max-width: 1240px; margin: 2.2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; } h2 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p { margin: .2rem 0; color: #505a69; } figure { margin: 1.2rem 0; overflow-x: auto; }
svg text { font: 10px system-ui, sans-serif; fill: #7a8494; text-anchor: middle; dominant-baseline: central; }
.cell { stroke: #e3e7ee; } .link { fill: none; stroke-width: 1.6; opacity: .38; pointer-events: none; }
.family text { fill: #fff; font-weight: 700; pointer-events: none; }
svg:has(.family:hover) .family:not(:hover) { opacity: .1; } .family:hover .link { opacity: 1; stroke-width: 2.2; }
.family, .cell { transition: opacity .12s; } .hit { fill: transparent; }
.legend { display: flex; gap: 1.6rem; flex-wrap: wrap; align-items: center; font-size: .86rem; color: #505a69; }
.legend svg { vertical-align: middle; } .shade { display: inline-block; width: 110px; height: 12px;
  background: linear-gradient(90deg, #fff, #5b6677); border: 1px solid #d5dae2; vertical-align: middle; }
table { border-collapse: collapse; font-size: .86rem; } td { padding: .16rem 1.4rem .16rem 0; vertical-align: top; }
td:first-child { color: #7a8494; white-space: nowrap; }
"""


def render(plan: HeadPlan, name: str = "") -> str:
    """The page's text."""
    rows = [*flat({"model": plan.model}), *flat(plan.provenance)]
    made = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title(plan, name))}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title(plan, name))}</h1>
<p>{escape(caption(plan))}.</p>
<figure>{_grid(plan)}</figure>
{_legend(plan)}
{f"<h2>How it was made</h2><table>{made}</table>" if made else ""}
</body></html>
"""


def shade(mean: float) -> str:
    """Background of a cell: white at a gate mean of 0, slate at 1."""
    low, high = (255, 255, 255), (91, 102, 119)
    return "#" + "".join(f"{round(a + (b - a) * min(max(mean, 0.0), 1.0)):02x}" for a, b in zip(low, high, strict=True))


def _grid(plan: HeadPlan) -> str:
    width, height = MARGIN + plan.num_layers * CELL + 12, TOP + plan.num_kv_heads * CELL + 12
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    parts += [f'<text x="{_x(layer)}" y="{TOP - 9}">{layer}</text>' for layer in range(plan.num_layers)]
    parts += [f'<text x="{MARGIN - 16}" y="{_y(head)}">{head}</text>' for head in range(plan.num_kv_heads)]
    parts.append(f'<text x="{MARGIN + plan.num_layers * CELL / 2}" y="9">layer</text>')
    middle = TOP + plan.num_kv_heads * CELL / 2
    parts.append(f'<text x="14" y="{middle}" transform="rotate(-90 14 {middle})">KV head</text>')
    for layer in range(plan.num_layers):
        for head in range(plan.num_kv_heads):
            fill = shade(plan.gate_means[layer][head]) if plan.gate_means else "#fff"
            parts.append(
                f'<rect class="cell" x="{_x(layer) - CELL / 2}" y="{_y(head) - CELL / 2}" width="{CELL}" '
                f'height="{CELL}" fill="{fill}"/>'
            )
    parts += [_family(plan, family) for family in families(plan)]
    return "".join(parts) + "</svg>"


def _family(plan: HeadPlan, family: Family) -> str:
    x, y = _x(family.donor[0]), _y(family.donor[1])
    links = "".join(f'<path class="link" stroke="{family.colour}" d="{_link(family.donor, f)}"/>'
                    for f in family.followers)  # fmt: skip
    dots = "".join(
        f'<g>{_title(plan, f, family)}<circle cx="{_x(f[0])}" cy="{_y(f[1])}" r="4.5" fill="{family.colour}" '
        f'stroke="#fff"/><rect class="hit" x="{_x(f[0]) - CELL / 2}" y="{_y(f[1]) - CELL / 2}" width="{CELL}" '
        f'height="{CELL}"/></g>'
        for f in family.followers
    )
    return (
        f'<g class="family">{links}{dots}<g>{_title(plan, family.donor, family)}<circle cx="{x}" cy="{y}" r="11" '
        f'fill="{family.colour}" stroke="#fff" stroke-width="2"/><text x="{x}" y="{y}">{len(family.followers)}</text>'
        f"</g></g>"
    )


def _title(plan: HeadPlan, head: Head, family: Family) -> str:
    if head == family.donor:
        role = f"retrieval head, donor of {len(family.followers)}"
    else:
        role = f"reuses the selection of layer {family.donor[0]}, head {family.donor[1]}"
    gate = f"\ngate mean {plan.gate_means[head[0]][head[1]]:.3f}" if plan.gate_means else ""
    return f"<title>layer {head[0]}, head {head[1]}\n{role}{gate}</title>"


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


def _legend(plan: HeadPlan) -> str:
    gates = '<span>gate mean 0 <span class="shade"></span> 1</span>' if plan.gate_means else ""
    return f"""<div class="legend">
<span><svg width="24" height="24"><circle cx="12" cy="12" r="11" fill="#3a7fbf"/>
<text x="12" y="12" style="fill:#fff;font-weight:700">7</text></svg> retrieval head, donor of 7</span>
<span><svg width="12" height="12"><circle cx="6" cy="6" r="4.5" fill="#3a7fbf"/></svg>
sparse head, in its donor's colour</span>{gates}<span>hover over a head to see its family</span></div>"""
