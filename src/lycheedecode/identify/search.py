"""The exchange: swap retrieval heads as long as the decoded answers come closer to the full model's.

No model of the error stands between: every candidate plan decodes the calibration prompts. Each round adds the head
that helps most, then drops the head that is missed least; the exchange ends when that undoes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedModel

from ..config import HybridConfig
from ..plan import Head, HeadPlan
from .donors import Reach
from .objective import token_kl
from .progress import Progress, Report, silent
from .replay import Planned, TeacherBatch, replay


class Judge:
    """Scores a plan: mean KL over the lessons, each in units of what every head's own selection gives.

    The unit keeps easy prompts (KL near 0.002) from being drowned by hard ones (KL near 0.02); a score of 1 is the
    plan in which every head retrieves for itself.
    """

    def __init__(
        self, model: PreTrainedModel, lessons: Sequence[TeacherBatch], config: HybridConfig, reach: Reach
    ) -> None:
        self._model, self._lessons, self._config = model, lessons, config
        oracle = HeadPlan.all_retrieval(reach.num_layers, reach.num_kv_heads)
        self._units = [max(kl, 1e-4) for kl in self.kl(oracle)]

    def __call__(self, plan: HeadPlan) -> float:
        each = self.kl(plan)
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
    retrieval: Collection[Head],
    reach: Reach,
    judge: Judge,
    plan_of: Callable[[Collection[Head]], HeadPlan],
    rounds: int | range,
    report: Report = silent,
    on_round: Callable[[int, Collection[Head]], None] = lambda number, heads: None,
) -> list[Head]:
    """Improve a set of retrieval heads by up to `rounds` exchanges at a constant number of heads.

    Args:
        retrieval: where to start; heads that always retrieve are added.
        reach: which heads there are.
        judge: scores a plan; lower is better.
        plan_of: the plan that a set of retrieval heads would get.
        rounds: most exchanges, or the numbers of those that are left.
        report: called after each.
        on_round: called after each with its number and the heads that it left.
    """
    fixed = set(reach.always_retrieval)

    def score(heads: set[Head]) -> float:
        return judge(plan_of(heads))

    numbers = range(1, rounds + 1) if isinstance(rounds, int) else rounds
    current = set(retrieval) | fixed
    best = score(current)
    for number in numbers:
        outside = [head for head in reach.heads() if head not in current]
        if not outside:
            break
        _, added = min((score(current | {head}), head) for head in outside)
        larger = current | {added}
        lowest, dropped = min((score(larger - {head}), head) for head in sorted(larger - fixed))
        if dropped == added or lowest >= best:
            break
        current, best = larger - {dropped}, lowest
        on_round(number, current)
        report(Progress("exchange", number, numbers.stop - 1, {"score": best}))
    return sorted(current)
