"""What a head plan looks like: as a table in the terminal (`table`), a PNG (`png`), a page of HTML (`page`).

facts     counts of a plan, for JSON and captions
families  a retrieval head with the heads that reuse its selection, each family with a colour of its own
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Head, HeadPlan

_GOLDEN_ANGLE = 0.381966
"""Share of the colour wheel between neighbours: any number of families stays apart."""


@dataclass(frozen=True)
class Family:
    """A retrieval head and the sparse heads whose donor it is."""

    donor: Head
    followers: tuple[Head, ...]
    colour: str
    """`#rrggbb`."""


def families(plan: HeadPlan) -> list[Family]:
    """All retrieval heads of the plan, in layer order."""
    followers: dict[Head, list[Head]] = {head: [] for head in plan.retrieval}
    for head, donor in pairs(plan):
        if head != donor:
            followers[donor].append(head)
    return [Family(donor, tuple(heads), _colour(i)) for i, (donor, heads) in enumerate(followers.items())]


def pairs(plan: HeadPlan) -> Iterator[tuple[Head, Head]]:
    """Every head with its donor, in layer order."""
    for layer, row in enumerate(plan.donors):
        for head, donor in enumerate(row):
            yield (layer, head), donor


def facts(plan: HeadPlan) -> dict[str, Any]:
    """Counts of a plan as plain JSON values."""
    sizes = [len(family.followers) for family in families(plan)]
    sparse = [(head, donor) for head, donor in pairs(plan) if head != donor]
    total = plan.num_layers * plan.num_kv_heads
    return {
        "layers": plan.num_layers,
        "kv_heads": plan.num_kv_heads,
        "retrieval_heads": len(plan.retrieval),
        "sparse_heads": total - len(plan.retrieval),
        "retrieval_share": round(len(plan.retrieval) / total, 4),
        "scanning_layers": len({layer for layer, _ in plan.retrieval}),
        "donors_of_same_layer": sum(head[0] == donor[0] for head, donor in sparse),
        "mean_layers_to_donor": round(sum(head[0] - donor[0] for head, donor in sparse) / max(len(sparse), 1), 2),
        "largest_family": max(sizes),
        "retrieval_heads_without_followers": sizes.count(0),
        **({} if plan.budgets is None else {"heads_by_budget": _by_budget(plan)}),
    }


def _by_budget(plan: HeadPlan) -> dict[str, int]:
    """How many heads have each factor on the budget."""
    counts = Counter(factor for layer in range(plan.num_layers) for factor in plan.budget_factors(layer))
    return {f"{factor:g}": counts[factor] for factor in sorted(counts)}


def title(plan: HeadPlan, name: str = "") -> str:
    """What the plan is for, in a few words."""
    model = plan.model.get("name") or "unnamed model"
    return f"{name}: head plan for {model}" if name else f"Head plan for {model}"


def caption(plan: HeadPlan) -> str:
    """The counts in one line."""
    f = facts(plan)
    return (
        f"{f['retrieval_heads']} of {f['layers']} x {f['kv_heads']} KV heads retrieve ({f['retrieval_share']:.1%}), "
        f"in {f['scanning_layers']} layers; {f['sparse_heads']} reuse their selections, "
        f"{f['donors_of_same_layer']} of them within a layer"
        + ("" if plan.budgets is None else f"; budgets of heads: {_budgets_in_words(plan)}")
    )


def _budgets_in_words(plan: HeadPlan) -> str:
    return ", ".join(f"{number} x {factor}" for factor, number in _by_budget(plan).items())


_OF_GATES = (
    "train_cells", "gates", "loss", "loss_weight", "penalty", "multiplier", "multiplier_learning_rate", "steps",
    "learning_rate",
)  # fmt: skip
"""Settings that only training gates reads; plans record all settings."""


def how_it_was_made(plan: HeadPlan) -> list[tuple[str, str]]:
    """Model and provenance of a plan as lines `a.b: text`, without the training of gates where there was none."""
    made = dict(plan.provenance)
    settings = made.get("settings")
    if isinstance(settings, Mapping) and settings.get("roles", "gates") != "gates":
        made["settings"] = {name: value for name, value in settings.items() if name not in _OF_GATES}
    return [*_flat({"model": plan.model}), *_flat(made)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values; what is None is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", "; ".join(_one_line(item) for item in value)
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def _one_line(item: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in item.items()) if isinstance(item, Mapping) else str(item)


def _colour(index: int) -> str:
    # Two alternating lightnesses tell neighbours on the wheel apart once there are many.
    lightness = 0.42 if index % 2 else 0.52
    rgb = colorsys.hls_to_rgb(index * _GOLDEN_ANGLE % 1.0, lightness, 0.72)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
