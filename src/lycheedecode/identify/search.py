"""Swap search: exchange retrieval heads and donors as long as the decoded answers come closer to the full model's.

Gates learn which heads must see for themselves; whom they serve as donors carries no gradient. So the last word has
the quantity that counts: KL(full || hybrid) on calibration prompts, decoded under the candidate plan.

    exchange   add the head that helps most, then drop the head that is missed least; stop when that undoes itself
    reassign   give each sparse head the donor, among the best-covering few, that lowers the KL
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from ..config import HybridConfig
from ..plan import Head, HeadPlan
from .donors import Reach, assign_donors
from .objective import token_kl
from .replay import Lesson, Planned, replay

Report = Callable[[str], None]


class Judge:
    """Scores a donor table: mean KL over the lessons, each in units of what every head's own selection gives.

    The unit keeps easy prompts (KL near 0.002) from being drowned by hard ones (KL near 0.02); a score of 1 is the
    plan in which every head retrieves for itself.
    """

    def __init__(self, model: nn.Module, lessons: Sequence[Lesson], config: HybridConfig, reach: Reach) -> None:
        self._model, self._lessons, self._config = model, lessons, config
        oracle = HeadPlan.all_retrieval(reach.num_layers, reach.num_kv_heads)
        self._units = [max(kl, 1e-4) for kl in self.kl(oracle)]

    def __call__(self, donors: Sequence[Sequence[Head]]) -> float:
        each = self.kl(HeadPlan.from_donors(donors))
        return sum(kl / unit for kl, unit in zip(each, self._units, strict=True)) / len(each)

    @torch.no_grad()
    def kl(self, plan: HeadPlan) -> list[float]:
        """Mean KL in nats of each lesson's answer tokens under `plan`."""
        head = self._model.get_output_embeddings()
        sums = []
        for lesson in self._lessons:
            student = replay(self._model, lesson, Planned(plan, self._config))
            sums.append(token_kl(student[lesson.mask], lesson.teacher[lesson.mask], head).mean())
        return torch.stack(sums).tolist()


def exchange(
    retrieval: Collection[Head], coverage: Tensor, reach: Reach, judge: Judge, rounds: int, report: Report = print
) -> list[Head]:
    """Improve a set of retrieval heads by up to `rounds` exchanges at a constant number of heads."""
    fixed = set(reach.always_retrieval)

    def score(heads: set[Head]) -> float:
        return judge(assign_donors(heads, coverage, reach))

    current = set(retrieval) | fixed
    best = score(current)
    report(f"exchange: {len(current)} retrieval heads, score {best:.3f}")
    for number in range(1, rounds + 1):
        outside = [head for head in reach.heads() if head not in current]
        _, added = min((score(current | {head}), head) for head in outside)
        larger = current | {added}
        lowest, dropped = min((score(larger - {head}), head) for head in sorted(larger - fixed))
        if dropped == added or lowest >= best:
            report(f"exchange {number}: nothing better")
            break
        current, best = larger - {dropped}, lowest
        report(f"exchange {number}: {dropped} -> {added}, score {best:.3f}")
    return sorted(current)


def reassign(
    retrieval: Collection[Head], coverage: Tensor, reach: Reach, judge: Judge, candidates: int, report: Report = print
) -> dict[Head, Head]:
    """Donors of sparse heads that lower the score, tried among each head's `candidates` best-covering donors."""
    index = {head: i for i, head in enumerate(reach.heads())}
    chosen = sorted(set(retrieval) | set(reach.always_retrieval))
    settled: dict[Head, Head] = {}
    best = judge(assign_donors(chosen, coverage, reach))
    for head in reach.heads():
        if head in chosen:
            continue
        within = [donor for donor in chosen if reach.allows(donor, head)]
        ranked = sorted(within, key=lambda donor, row=index[head]: -float(coverage[row, index[donor]]))
        for donor in ranked[1:candidates]:
            score = judge(assign_donors(chosen, coverage, reach, {**settled, head: donor}))
            if score < best:
                settled[head], best = donor, score
    report(f"reassign: {len(settled)} donors changed, score {best:.3f}")
    return settled
