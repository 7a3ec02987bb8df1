"""From the values of items to a score with its uncertainty."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from numbers import Real
from statistics import fmean
from typing import Any, NamedTuple

_RESAMPLES = 2000


class ScoreInterval(NamedTuple):
    """A score and its 95% confidence interval, which is None where the items have no spread to tell it from."""

    value: float
    low: float | None
    high: float | None


def score(values: Sequence[Any], aggregate: Callable[[Sequence[Any]], float] = fmean, seed: int = 0) -> ScoreInterval:
    """The aggregate of items and its interval: Wilson's for accuracies, else a bootstrap over the items."""
    found = float(aggregate(values))
    if len(values) < 2:
        return ScoreInterval(found, None, None)
    if all(isinstance(value, Real) and value in (0, 1) for value in values) and found == fmean(values):
        return ScoreInterval(found, *wilson(found, len(values)))
    return ScoreInterval(found, *bootstrap(values, aggregate, seed))


def wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's interval of a share of `number` trials."""
    from scipy.stats import binomtest

    low, high = binomtest(round(share * number), number).proportion_ci(0.95, "wilson")
    return float(low), float(high)


def bootstrap(values: Sequence[Any], aggregate: Callable[[Sequence[Any]], float], seed: int) -> tuple[float, float]:
    """A bootstrap over the items: bias-corrected and accelerated for means, percentiles for other aggregates."""
    if getattr(aggregate, "__name__", "") in ("mean", "fmean") and all(isinstance(value, Real) for value in values):
        return _of_a_mean([float(value) for value in values], seed)
    rng = random.Random(seed)
    drawn = sorted(float(aggregate(rng.choices(values, k=len(values)))) for _ in range(_RESAMPLES))
    return drawn[int(0.025 * _RESAMPLES)], drawn[int(0.975 * _RESAMPLES) - 1]


def _of_a_mean(values: Sequence[float], seed: int) -> tuple[float, float]:
    import numpy
    from scipy import stats

    if min(values) == max(values):  # no spread, of which the correction would make not-a-number
        return values[0], values[0]
    found = stats.bootstrap(
        (values,), numpy.mean, n_resamples=_RESAMPLES, vectorized=True, rng=numpy.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)


def difference(values: Sequence[float], base: Sequence[float], seed: int = 0) -> ScoreInterval:
    """The mean difference between two policies on the same items."""
    paired = [one - other for one, other in zip(values, base, strict=True)]
    return ScoreInterval(fmean(paired), *(bootstrap(paired, fmean, seed) if len(paired) > 1 else (None, None)))
