"""From the values of items to a score with its uncertainty."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import sqrt
from numbers import Real
from statistics import fmean
from typing import Any, NamedTuple

_Z = 1.959964
"""Of a two-sided 95% interval."""
_RESAMPLES = 1000


class Score(NamedTuple):
    """A score and its 95% confidence interval, which is None where the items have no spread to tell it from."""

    value: float
    low: float | None
    high: float | None


def score(values: Sequence[Any], aggregate: Callable[[Sequence[Any]], float] = fmean, seed: int = 0) -> Score:
    """The aggregate of items and its interval: Wilson's for accuracies, else a bootstrap over the items."""
    found = float(aggregate(values))
    if len(values) < 2:
        return Score(found, None, None)
    if all(isinstance(value, Real) and value in (0, 1) for value in values) and found == fmean(values):
        return Score(found, *wilson(found, len(values)))
    return Score(found, *bootstrap(values, aggregate, seed))


def wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's interval of a share of `number` trials."""
    square = _Z * _Z
    centre = (share + square / (2 * number)) / (1 + square / number)
    half = _Z * sqrt(share * (1 - share) / number + square / (4 * number * number)) / (1 + square / number)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap(values: Sequence[Any], aggregate: Callable[[Sequence[Any]], float], seed: int) -> tuple[float, float]:
    """Percentiles of the aggregate over items drawn anew with replacement."""
    rng = random.Random(seed)
    drawn = sorted(float(aggregate(rng.choices(values, k=len(values)))) for _ in range(_RESAMPLES))
    return drawn[int(0.025 * _RESAMPLES)], drawn[int(0.975 * _RESAMPLES) - 1]


def difference(values: Sequence[float], base: Sequence[float], seed: int = 0) -> Score:
    """The mean difference between two policies on the same items."""
    paired = [one - other for one, other in zip(values, base, strict=True)]
    return Score(fmean(paired), *(bootstrap(paired, fmean, seed) if len(paired) > 1 else (None, None)))
