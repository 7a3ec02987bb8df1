"""How stable are the roles and donors that identification finds? Over seeds, texts, tasks and numbers of heads.

    python -m experiments.stability --json docs/results/stability.json --plans build/plans

Every plan is compared with that of the first seed: how many of the retrieval heads that were chosen both have (Jaccard;
heads that must retrieve do not count), how many heads have the same donor, and the held-out KL of both. A finished plan
is written at once, and skipped when the command runs again with the same result file. `--plans` saves all of them, for
`evaluate fidelity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from experiments.identification import (
    HeldOut,
    held_out_lessons,
    make_parser,
    number_of,
    open_model,
    study_fingerprint,
    uncompleted,
)
from lycheedecode.bench.harness import show
from lycheedecode.identify import Cell, IdentifySettings, Stages
from lycheedecode.identify.donors import Reach
from lycheedecode.identify.search import Judge
from lycheedecode.identify.sensitivity import Surrogate
from lycheedecode.models.shape import ModelShape
from lycheedecode.plan import HeadPlan
from lycheedecode.results import Result, resume

HOPS = 4
COMMAND = "experiments stability"


@dataclass(frozen=True)
class StabilityVariant:
    """One identification: its name, the group of those like it, and its settings."""

    name: str
    group: str
    settings: IdentifySettings


def variants(base: IdentifySettings, seeds: int, numbers: Sequence[int]) -> list[StabilityVariant]:
    """Other seeds, one kind of text only, one kind of task only, other numbers of heads."""
    cells = base.calibrate_cells
    found = [StabilityVariant(f"seed {seed}", "seeds", replace(base, seed=seed)) for seed in range(seeds)]
    for text in sorted({cell.text for cell in cells}):
        own = tuple(cell for cell in cells if cell.text == text)
        found.append(StabilityVariant(f"{text} only", "texts", replace(base, calibrate_cells=own)))
    places = dict.fromkeys((cell.text, cell.length) for cell in cells)
    hops = tuple(Cell(text, length, "multi_hop", HOPS) for text, length in places)
    keys = tuple(cell for cell in cells if cell.task == "passkey")
    found.append(StabilityVariant("passkeys only", "tasks", replace(base, calibrate_cells=keys)))
    found.append(StabilityVariant("hops only", "tasks", replace(base, calibrate_cells=hops)))
    for number in numbers:
        settings = replace(base, num_retrieval_heads=number)
        found.append(StabilityVariant(f"{number} retrieval heads", "numbers", settings))
    return found


class Stability:
    """Finds the plans of variants, and what they have in common.

    Args:
        model, tokenizer: of the plans.
        held_out: what plans are judged on.
        path: the result file; what it holds already is kept.
        plans: folder for the plans, or None.
    """

    def __init__(
        self, model: Any, tokenizer: Any, base: IdentifySettings, held_out: HeldOut, path: Path, plans: Path | None
    ) -> None:
        base = uncompleted(base)
        self._model, self._tokenizer, self._base, self._path, self._plans = model, tokenizer, base, path, plans
        self._held_out = held_out
        shape = ModelShape.of(model)
        self._reach = Reach(shape.num_layers, shape.num_kv_heads)
        self._tables: dict[str, Tensor] = {}
        self.rows: list[Mapping[str, Any]] = []
        self.donors: dict[str, Any] = {}
        asked = {**base.to_dict(), **held_out.to_dict()}
        known = study_fingerprint(model, base, held_out)
        self._found = Result(COMMAND, asked, fingerprint=known)
        if (kept := resume(path, COMMAND, asked, known)) is not None:
            self.rows, self.donors = list(kept.rows), dict(kept.summary["donors"])

    @cached_property
    def _judge(self) -> Judge:
        lessons = held_out_lessons(self._model, self._tokenizer, self._held_out)
        return Judge(self._model, lessons, self._base.config, self._reach)

    def add(self, variant: StabilityVariant) -> None:
        """Find a plan, compare it with the first one, judge it, write it down."""
        if variant.name not in self.donors:
            plan = self._find(variant.settings)
            self.donors[variant.name] = plan.to_json()["donors"]
            kl = dict(zip(map(str, self._held_out.cells), self._judge.kl(plan), strict=True))
            first = HeadPlan.from_donors(next(iter(self.donors.values())))
            row = {
                "plan": variant.name,
                "group": variant.group,
                "retrieval_heads": len(plan.retrieval),
                "jaccard_with_first": self._jaccard(plan, first),
                "same_donors_share": _same_donors(plan, first),
                "kl_mean": fmean(kl.values()),
                **kl,
            }
            self.rows.append(row)
            show(f"{variant.name:>20}  Jaccard {row['jaccard_with_first']:.2f}  KL {row['kl_mean']:.4f}")
            self._write()
        if self._plans is not None:
            plan = HeadPlan.from_donors(self.donors[variant.name], model={"name": ModelShape.of(self._model).name})
            plan.save(self._plans / f"{variant.name.replace(' ', '-')}.json")

    def _find(self, settings: IdentifySettings) -> HeadPlan:
        settings = uncompleted(settings)
        key = str((settings.seed, settings.calibrate_cells))
        if key not in self._tables:  # the number of heads matters to the search only
            self._tables[key] = Stages(self._model, self._tokenizer, settings, self._reach).sensitivity()
        surrogate = Surrogate(self._tables[key], self._reach, settings.coupling)
        return surrogate.plan(surrogate.assign(surrogate.search(number_of(settings))))

    def _jaccard(self, one: HeadPlan, other: HeadPlan) -> float:
        free = [set(plan.retrieval) - set(self._reach.always_retrieval) for plan in (one, other)]
        return len(free[0] & free[1]) / max(len(free[0] | free[1]), 1)

    def _write(self) -> None:
        groups: dict[str, list[HeadPlan]] = {}
        for row in self.rows:
            groups.setdefault(row["group"], []).append(HeadPlan.from_donors(self.donors[row["plan"]]))
        within = {
            f"mean_jaccard_of_{group}": fmean(self._jaccard(*pair) for pair in combinations(plans, 2))
            for group, plans in groups.items()
            if len(plans) > 1 and group != "numbers"
        }
        self._found.add(self.rows, **within, donors=self.donors).save(self._path)


def _same_donors(one: HeadPlan, other: HeadPlan) -> float:
    pairs = zip(sum(one.donors, ()), sum(other.donors, ()), strict=True)
    return fmean(mine == theirs for mine, theirs in pairs)


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--plans", type=Path, help="folder for the plans")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--numbers", type=int, nargs="*", default=[6, 10, 20, 30, 45], help="of retrieval heads")
    arguments = parser.parse_args()
    model, tokenizer, base = open_model(arguments)
    held_out = HeldOut(arguments.prompts)
    stability = Stability(model, tokenizer, base, held_out, arguments.json, arguments.plans)
    for variant in variants(base, arguments.seeds, arguments.numbers):
        stability.add(variant)


if __name__ == "__main__":
    main()
