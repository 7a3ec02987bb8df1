"""The study of what lowers the KL at the same bytes: its forms, the lowest KL first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.report.sources import PromptKind
from experiments.report.tables import table

_DRAWS = 4000
_BASES = ("{} heads", "{} heads, float8")
"""Forms by whose KL the others' is divided: the one that sets the bytes, and the same heads with 8-bit keys."""


def lines(found: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """A table of all forms."""
    bases = [base.format(settings.get("heads")) for base in _BASES]
    yield (
        "What lowers the KL at the same bytes, and what does not: mean KL in nats, and how many times that of another "
        "form it is (geometric mean over the kinds of prompts), with the 95% interval of a bootstrap over prompts, "
        "which all forms share. Intervals that contain 1 are noise."
    )
    yield ""
    yield from table(rows(found["cells"], found.get("read", {}), bases))


def rows(
    cells: Mapping[str, Mapping[str, Mapping[str, Any]]], read: Mapping[str, float], bases: list[str]
) -> list[dict[str, Any]]:
    """A row for each form that was judged on all kinds of prompts."""
    labels = [label for label in next(iter(cells.values())) if all(label in scores for scores in cells.values())]
    kl = {label: [np.array(scores[label]["kl_of_prompts"]) for scores in cells.values()] for label in labels}
    overall = {label: float(np.exp(np.mean([np.log(np.mean(one)) for one in kl[label]]))) for label in labels}
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(one), (_DRAWS, len(one))) for one in kl[labels[0]]]
    return [
        {
            "": label,
            "read, of full attention's bytes": f"{read[label]:.1%}" if label in read else "",
            **{_name(kind): float(np.mean(one)) for kind, one in zip(cells, kl[label], strict=True)},
            "geometric mean": overall[label],
            **{f"times that of {base}": _ratio(kl[label], kl[base], drawn) for base in bases if base in kl},
        }
        for label in sorted(labels, key=overall.__getitem__)
    ]


def _name(kind: str) -> str:
    parsed = PromptKind.parse(kind)
    return f"{parsed.length} tokens of {parsed.text}" if parsed.length else kind


def _ratio(own: list[np.ndarray], base: list[np.ndarray], drawn: list[np.ndarray]) -> str:
    """The geometric mean of the kinds' ratios of means, and its interval where prompts are drawn anew, in pairs."""
    if own is base:
        return "1"
    found = np.mean([np.log(one.mean() / other.mean()) for one, other in zip(own, base, strict=True)])
    spread = np.mean(
        [np.log(one[at].mean(1) / other[at].mean(1)) for one, other, at in zip(own, base, drawn, strict=True)], 0
    )
    low, high = np.exp(np.percentile(spread, [2.5, 97.5]))
    return f"{np.exp(found):.2f} ({low:.2f} to {high:.2f})"
