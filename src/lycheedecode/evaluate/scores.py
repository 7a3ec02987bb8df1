"""What fidelity is measured by, and how it is added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

_FIRST_BUCKET = 4


@dataclass(frozen=True)
class Bucket:
    """A stretch of answers.

    Attributes:
        first, last: answer tokens that were fed before, from and to (inclusive).
        tokens: how many predictions fall into it.
        kl_mean, top1_agreement: of these.
    """

    first: int
    last: int
    tokens: int
    kl_mean: float
    top1_agreement: float


@dataclass(frozen=True)
class Score:
    """One policy on one kind of prompt.

    Attributes:
        prompts, tokens: how many were decoded.
        kl_mean, kl_p99: KL(full || policy) per answer token, in nats.
        kl_error: standard error of the mean, from the means of the prompts; None for a single one.
        acceptance: the share of drafts that full attention would accept, the sum of min(p, q) over the vocabulary, at
            the temperature of drawn answers (at 0: top-1 agreement).
        top1_agreement: share of answer tokens at which both find the same token most probable.
        first_divergence: answer tokens, on average, until what the policy generates on its own differs from what full
            attention does; the answer's length where it never differs.
        same_answer: share of prompts where it never differs.
        exact_match: share of prompts whose own answer holds everything that was hidden; None where nothing was.
        kv_bytes_per_token: mean bytes of the KV cache that a decode step reads for a sequence.
        by_position: KL and agreement along the answer, in stretches that double in length.
    """

    prompts: int
    tokens: int
    kl_mean: float
    kl_p99: float
    kl_error: float | None
    top1_agreement: float
    acceptance: float
    first_divergence: float
    same_answer: float
    exact_match: float | None
    kv_bytes_per_token: float
    by_position: tuple[Bucket, ...] = field(default=(), repr=False)


class Sums:
    """What one policy has shown so far on one kind of prompt."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._means: list[float] = []
        self._agreed: list[Tensor] = []
        self._accepted: list[Tensor] = []
        self._position: list[Tensor] = []
        self._same: list[tuple[int, bool]] = []
        self._solved: list[bool] = []
        self._bytes: list[float] = []

    def add_tokens(self, kl: Tensor, agreed: Tensor, accepted: Tensor, mask: Tensor, kv_bytes: Sequence[float]) -> None:
        """Teacher-forced answers: KL, agreement and acceptance at each token, `[B, T]`, where `mask` is True; bytes."""
        mask, kl = mask.cpu(), kl.cpu().double()
        self._kl.append(kl[mask])
        self._means += [float(each[inside].mean()) for each, inside in zip(kl, mask, strict=True)]
        self._agreed.append(agreed.cpu()[mask])
        self._accepted.append(accepted.cpu().double()[mask])
        self._position.append(mask.nonzero()[:, 1])
        self._bytes += kv_bytes

    def add_answers(self, same: Sequence[int], lengths: Sequence[int], solved: Sequence[bool] = ()) -> None:
        """Answers of its own: tokens until each differs from full attention's, of so many, and whether it is right."""
        self._same += [(number, number == length) for number, length in zip(same, lengths, strict=True)]
        self._solved += solved

    def score(self) -> Score:
        """The score of all that was added."""
        kl, agreed, position = torch.cat(self._kl), torch.cat(self._agreed).double(), torch.cat(self._position)
        return Score(
            prompts=len(self._bytes),
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_p99=_quantile(kl, 0.99),
            kl_error=stdev(self._means) / len(self._means) ** 0.5 if len(self._means) > 1 else None,
            top1_agreement=float(agreed.mean()),
            acceptance=float(torch.cat(self._accepted).mean()),
            first_divergence=_mean([number for number, _ in self._same]),
            same_answer=_mean([same for _, same in self._same]),
            exact_match=_mean(self._solved) if self._solved else None,
            kv_bytes_per_token=_mean(self._bytes),
            by_position=tuple(_buckets(kl, agreed, position)),
        )


def overall(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Means over kinds of prompts, each kind alike, for every policy that was measured on all of them."""
    names = ("kl_mean", "top1_agreement", "acceptance", "same_answer", "kv_bytes_per_token")
    cells = list(measured.values())
    labels = [label for label in cells[0] if all("kl_mean" in cell.get(label, ()) for cell in cells)] if cells else []
    return {label: {name: _mean([cell[label][name] for cell in cells]) for name in names} for label in labels}


def _buckets(kl: Tensor, agreed: Tensor, position: Tensor) -> list[Bucket]:
    found, first, size = [], 0, _FIRST_BUCKET
    while first <= int(position.max()):
        inside = (position >= first) & (position < size)
        if inside.any():
            last = int(position[inside].max())
            means = float(kl[inside].mean()), float(agreed[inside].mean())
            found.append(Bucket(first, last, int(inside.sum()), *means))
        first, size = size, 2 * size
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _quantile(values: Tensor, share: float) -> float:
    """Like `Tensor.quantile`, which takes no more than 16 million values."""
    ranked, at = values.sort().values, share * (len(values) - 1)
    below, above = ranked[int(at)], ranked[min(int(at) + 1, len(values) - 1)]
    return float(below.lerp(above, at - int(at)))
