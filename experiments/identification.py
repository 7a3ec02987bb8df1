"""Which way of finding roles and donors leads to the most faithful plan? Held-out KL of plans of the same size.

    python -m experiments.identification --json docs/results/identification.json

Variants change one thing each and share what they can: one sensitivity table, one coverage matrix. All are judged
alike: fresh prompts from text that identification never saw, answers teacher-forced, retrieval heads scanning and
attending over their own selection. A finished variant is written at once, and skipped when the command runs again with
the same result file.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from lycheedecode.bench.harness import show
from lycheedecode.config import BlockScore, HybridConfig
from lycheedecode.identify import Cell, IdentifySettings, Stages
from lycheedecode.identify.donors import Reach, choose_by_coverage, remap
from lycheedecode.identify.replay import TeacherBatch, prepare
from lycheedecode.identify.search import Judge, exchange
from lycheedecode.identify.sensitivity import Surrogate
from lycheedecode.identify.settings import PASSKEYS
from lycheedecode.identify.train import top_heads
from lycheedecode.models.load import DEFAULT_MODEL, load_model
from lycheedecode.models.shape import ModelShape
from lycheedecode.plan import Head, HeadPlan
from lycheedecode.prompts.makers import makers_for
from lycheedecode.prompts.text import load_text
from lycheedecode.results import Result, fingerprint, resume


class HeldOut(NamedTuple):
    """What variants are judged on."""

    prompts: int
    """Number of prompts of each kind."""
    cells: tuple[Cell, ...] = (*PASSKEYS, Cell("prose", 3072, "multi_hop", 4))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {"held_out_prompts": self.prompts, "held_out_cells": list(map(str, self.cells))}


COMMAND = "experiments identification"

GATES: dict[str, dict[str, Any]] = {
    "gates": {},
    "gates, one-sided penalty": {"penalty": "one_sided"},
    "gates, hardconcrete": {"gates": "hardconcrete"},
    "gates, direct": {"gates": "direct"},
    "paper": {"penalty": "one_sided", "donors": "same_index", "same_layer": False},
}
"""What each training changes; the paper's form trains and decodes with donors of the same index."""


class WaysStudy:
    """Runs variants one after the other and keeps their results in one JSON file."""

    def __init__(self, model: Any, tokenizer: Any, base: IdentifySettings, held_out: HeldOut, path: Path) -> None:
        base = uncompleted(base)
        self.model, self.tokenizer, self.base, self.path = model, tokenizer, base, path
        self.held_out = held_out
        shape = ModelShape.of(model)
        self.layers, self.width = shape.num_layers, shape.num_kv_heads
        self.reach = Reach(self.layers, self.width)
        lessons = held_out_lessons(model, tokenizer, held_out)
        scores = get_args(BlockScore)
        self.judges = {s: Judge(model, lessons, replace(base.config, block_score=s), self.reach) for s in scores}
        asked = {**base.to_dict(), **held_out.to_dict()}
        known = study_fingerprint(model, base, held_out)
        found = resume(path, COMMAND, asked, known)
        self.found = found or Result(COMMAND, asked, summary={"variants": {}}, fingerprint=known)
        self.results: dict[str, Any] = dict(self.found.summary["variants"])

    def stages(self, **changes: Any) -> Stages:
        """The stages of an identification with other settings."""
        return Stages(self.model, self.tokenizer, replace(self.base, **changes), self.reach)

    @cached_property
    def table(self) -> Tensor:
        """The sensitivity table."""
        return self.stages().sensitivity()

    @cached_property
    def coverage(self) -> Tensor:
        """The coverage matrix."""
        return self.stages().coverage()

    def remapped(self, roles: Collection[Head], reach: Reach | None = None) -> HeadPlan:
        """Roles with the donors that cover best."""
        return remap(roles, self.coverage, reach or self.reach)

    def same_index(self, roles: Collection[Head]) -> HeadPlan:
        """Roles with the paper's inheritance."""
        return HeadPlan.same_index(roles, self.layers, self.width)

    def searched(self, table: Tensor | None = None, reach: Reach | None = None, **changes: Any) -> HeadPlan:
        """The plan that the second-order search finds."""
        reach, settings = reach or self.reach, replace(self.base, **changes)
        table = self.table if table is None else table
        surrogate = Surrogate(table * reach.matrix().to(table.device)[..., None], reach, settings.coupling)
        return surrogate.plan(surrogate.assign(surrogate.search(number_of(settings))))

    def trained(self, **changes: Any) -> HeadPlan:
        """The plan of trained gates."""
        settings = replace(self.base, roles="gates", **changes)
        inherits = settings.donors == "same_index"
        means = self.stages(roles="gates", **changes).train(None if inherits else self.coverage)
        roles = top_heads(means, number_of(settings), self.reach)
        return self.same_index(roles) if inherits else self.remapped(roles)

    def exchanged(self, roles: Collection[Head]) -> HeadPlan:
        """Roles after exchanges judged by decoding, 8 prompts of each kind."""
        stages = self.stages(calibrate_prompts=8, batch_size=8)
        judge = Judge(self.model, stages.all_lessons(), self.base.config, self.reach)
        return self.remapped(exchange(roles, self.reach, judge, self.remapped, rounds=6))

    def add(self, name: str, make: Callable[[], HeadPlan], score: BlockScore = "mass") -> None:
        """Make a plan, judge it by decoding with that block score, write it down; nothing when it is there already."""
        if name in self.results:
            return
        started = time.perf_counter()
        plan = make()
        seconds = time.perf_counter() - started
        kl = dict(zip(map(str, self.held_out.cells), self.judges[score].kl(plan), strict=True))
        self.results[name] = {
            "retrieval_heads": len(plan.retrieval),
            "block_score": score,
            "kl": kl,
            "kl_mean": sum(kl.values()) / len(kl),
            "seconds": round(seconds, 1),
            "donors": plan.to_json()["donors"],
        }
        show(f"{name:>34}  KL {self.results[name]['kl_mean']:.4f}  {seconds:6.1f} s  "
             + " ".join(f"{value:.4f}" for value in kl.values()))  # fmt: skip
        self.found.add(variants=self.results).save(self.path)

    def plan_of(self, name: str) -> HeadPlan:
        """The plan that a finished variant led to."""
        return HeadPlan.from_donors(self.results[name]["donors"])


def compare(comparison: WaysStudy, random_plans: int) -> None:
    """All variants, in the order of the table that is made of them."""
    add, earlier = comparison.add, Reach(comparison.layers, comparison.width, same_layer=False)
    own = HeadPlan.all_retrieval(comparison.layers, comparison.width)
    add("every head its own", lambda: own)
    add("every head its own, block score max", lambda: own, "max")
    add("sensitivity", comparison.searched)
    searched = comparison.plan_of("sensitivity").retrieval
    add("sensitivity, donors by coverage", lambda: comparison.remapped(searched))
    add("sensitivity, same index", lambda: comparison.same_index(searched))
    add("sensitivity, earlier layers only", lambda: comparison.searched(reach=earlier))
    add("sensitivity, no coupling", lambda: comparison.searched(coupling=0.0))
    add("sensitivity, full coupling", lambda: comparison.searched(coupling=1.0))
    add("sensitivity, 8 prompts", lambda: comparison.searched(comparison.stages(calibrate_prompts=8).sensitivity()))
    largest = comparison.stages(config=replace(comparison.base.config, block_score="max"))
    add("sensitivity, block score max", lambda: comparison.searched(largest.sensitivity()), "max")
    for name, changes in GATES.items():
        add(name, lambda changes=changes: comparison.trained(**changes))
    gates, paper = (comparison.plan_of(name).retrieval for name in ("gates", "paper"))
    add("gates, same index", lambda: comparison.same_index(gates))
    add("gates, exchange", lambda: comparison.exchanged(gates))
    add("paper, remapped", lambda: comparison.remapped(paper, earlier))
    add("paper, remapped, same layer too", lambda: comparison.remapped(paper))
    number = number_of(comparison.base)
    add("coverage", lambda: comparison.remapped(choose_by_coverage(comparison.coverage, comparison.reach, number)))
    for seed in range(random_plans):
        roles = _random_roles(comparison.reach, number, seed)
        add(f"random {seed}", lambda roles=roles: comparison.same_index(roles))
        add(f"random {seed}, remapped", lambda roles=roles: comparison.remapped(roles))


def _random_roles(reach: Reach, number: int, seed: int) -> list[tuple[int, int]]:
    always = list(reach.always_retrieval)
    others = [head for head in reach.heads() if head not in set(always)]
    return always + random.Random(seed).sample(others, number - len(always))


def number_of(settings: IdentifySettings) -> int:
    """Retrieval heads, which a study's settings must say."""
    assert settings.num_retrieval_heads is not None
    return settings.num_retrieval_heads


def uncompleted(settings: IdentifySettings) -> IdentifySettings:
    """What is compared here are roles and donors at one budget, so nothing is completed."""
    return replace(settings, config=replace(settings.config, completion="none"), budget_scales=(1.0,))


def held_out_lessons(model: Any, tokenizer: Any, held_out: HeldOut) -> list[TeacherBatch]:
    """The prompts that plans are judged on, prefilled."""
    makers, rng = makers_for(tokenizer, held_out.cells, "evaluate"), random.Random("evaluate/held-out")
    return [prepare(model, cell.make(makers, held_out.prompts, rng)) for cell in held_out.cells]


def study_fingerprint(model: Any, base: IdentifySettings, held_out: HeldOut) -> dict[str, Any]:
    """A fingerprint of the model and of all texts that a study identifies and judges on."""
    cells = (*base.train_cells, *base.calibrate_cells, *held_out.cells)
    return fingerprint(model, texts={source: load_text(source) for source in sorted({cell.text for cell in cells})})


def make_parser(description: str) -> argparse.ArgumentParser:
    """A command line with what comparisons of plans share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--retrieval-heads", type=int, default=14)
    parser.add_argument("--budget-tokens", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--calibrate-prompts", type=int, default=32, help="of each kind")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts of each kind")
    parser.add_argument("--dtype", default="float32")
    return parser


def open_model(arguments: argparse.Namespace) -> tuple[Any, Any, IdentifySettings]:
    """Model, tokenizer and the settings that comparisons start from, for the options of `make_parser`."""
    base = IdentifySettings(
        num_retrieval_heads=arguments.retrieval_heads,
        config=HybridConfig(budget_tokens=arguments.budget_tokens, block_size=arguments.block_size),
        calibrate_cells=PASSKEYS,
        draws=4,
        calibrate_prompts=arguments.calibrate_prompts,
    )
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    return *load_model(arguments.model, dtype=arguments.dtype), base


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts of a training step")
    parser.add_argument("--random-plans", type=int, default=3)
    arguments = parser.parse_args()
    model, tokenizer, base = open_model(arguments)
    base = replace(base, steps=arguments.steps, batch_size=arguments.batch_size)
    comparison = WaysStudy(model, tokenizer, base, HeldOut(arguments.prompts), arguments.json)
    compare(comparison, arguments.random_plans)


if __name__ == "__main__":
    main()
