"""Which way of finding roles and donors leads to the most faithful plan? Held-out KL of plans of the same size.

    python -m lycheedecode.evaluate.identification --json docs/results/identification.json

Every variant changes one thing. All are judged alike: fresh prompts from text that identification never saw, answers
teacher-forced, retrieval heads scanning and attending over their own selection. A finished variant is written at once,
and skipped when the command runs again with the same result file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import HybridConfig
from ..environment import describe_environment
from ..identify import Cell, IdentifySettings, identify
from ..identify.donors import Reach, measure_coverage, remap
from ..identify.prompts import makers_for
from ..identify.replay import Lesson, prepare
from ..identify.search import Judge
from ..models import DEFAULT_MODEL, ModelShape, load_model
from ..plan import HeadPlan

HELD_OUT = (
    Cell("prose", 2048, "passkey", 1),
    Cell("prose", 2048, "passkey", 5),
    Cell("prose", 4096, "passkey", 1),
    Cell("prose", 4096, "passkey", 5),
    Cell("noise", 2048, "passkey", 1),
    Cell("noise", 4096, "passkey", 1),
    Cell("noise", 7168, "passkey", 1),
    Cell("prose", 3072, "multi_hop", 4),
)


def settings_of_variants(base: IdentifySettings) -> dict[str, IdentifySettings]:
    """What is compared. Each entry below `gates` differs from it in one thing, each below `sensitivity` from that."""
    gates = replace(base, roles="gates")
    return {
        "sensitivity": base,
        "sensitivity, same index": replace(base, donors="same_index"),
        "sensitivity, earlier layers only": replace(base, same_layer=False),
        "sensitivity, no coupling": replace(base, coupling=0.0),
        "sensitivity, full coupling": replace(base, coupling=1.0),
        "sensitivity, 16 prompts": replace(base, calibrate_prompts=16),
        "gates": gates,
        "gates, same index": replace(gates, donors="same_index"),
        "gates, one-sided penalty": replace(gates, penalty="one_sided"),
        "gates, loss on logits": replace(gates, loss="logits"),
        "gates, hardconcrete": replace(gates, gates="hardconcrete"),
        "gates, direct": replace(gates, gates="direct"),
        "gates, multi-hop prompts": replace(
            gates, train_cells=(Cell("prose", 2048, "multi_hop", 4), *gates.train_cells[:1])
        ),
        "gates, exchange": replace(gates, exchange_rounds=24, calibrate_prompts=16),
        "paper": replace(gates, penalty="one_sided", donors="same_index", same_layer=False),
        "coverage": replace(base, roles="coverage"),
    }


class Comparison:
    """Runs variants one after the other and keeps their results in one JSON file."""

    def __init__(self, model: Any, tokenizer: Any, base: IdentifySettings, held_out_prompts: int, path: Path) -> None:
        self.model, self.tokenizer, self.base, self.path = model, tokenizer, base, path
        self.shape = ModelShape.of(model)
        self.reach = Reach(self.shape.num_layers, self.shape.num_kv_heads)
        self.lessons = _lessons(model, tokenizer, HELD_OUT, held_out_prompts, "evaluate")
        self.judge = Judge(model, self.lessons, base.config, self.reach)
        self.results: dict[str, Any] = {}
        if path.is_file():
            self.results = json.loads(path.read_text(encoding="utf-8"))["variants"]

    def add(self, name: str, make: Callable[[], HeadPlan]) -> None:
        """Make a plan, judge it, write it down; nothing when it is there already."""
        if name in self.results:
            return
        started = time.perf_counter()
        plan = make()
        seconds = time.perf_counter() - started
        kl = dict(zip(map(str, HELD_OUT), self.judge.kl(plan), strict=True))
        self.results[name] = {
            "retrieval_heads": len(plan.retrieval),
            "kl": kl,
            "kl_mean": sum(kl.values()) / len(kl),
            "seconds": round(seconds, 1),
            "donors": plan.to_json()["donors"],
        }
        print(f"{name:>34}  KL {self.results[name]['kl_mean']:.4f}  {seconds:6.1f} s  "
              + " ".join(f"{value:.4f}" for value in kl.values()), file=sys.stderr, flush=True)  # fmt: skip
        record = {
            "what": "mean KL(full || hybrid) in nats per answer token, by way of identification",
            "settings": self.base.to_dict(),
            "environment": describe_environment(),
            "variants": self.results,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def plan_of(self, name: str) -> HeadPlan:
        """The plan that a finished variant led to."""
        return HeadPlan.from_donors(self.results[name]["donors"])


def compare(comparison: Comparison, names: list[str], random_plans: int) -> None:
    """All named variants; the paper's roles with better donors; random roles; and every head on its own."""
    variants = settings_of_variants(comparison.base)
    for name in names:
        comparison.add(name, lambda name=name: identify(comparison.model, comparison.tokenizer, variants[name]))
    shape, reach = comparison.shape, comparison.reach
    layers, width = shape.num_layers, shape.num_kv_heads
    comparison.add("every head its own", lambda: HeadPlan.all_retrieval(layers, width))

    lessons = _lessons(comparison.model, comparison.tokenizer, comparison.base.calibrate_cells, 8, "identify")
    coverage = measure_coverage(comparison.model, lessons, comparison.base.config, reach)
    if "paper" in comparison.results:
        paper = comparison.plan_of("paper").retrieval
        earlier = Reach(layers, width, same_layer=False)
        comparison.add("paper, remapped", lambda: remap(paper, coverage, earlier))
        comparison.add("paper, remapped, same layer too", lambda: remap(paper, coverage, reach))
    for seed in range(random_plans):
        roles = _random_roles(reach, comparison.base.num_retrieval_heads, seed)
        comparison.add(f"random {seed}", lambda roles=roles: HeadPlan.same_index(roles, layers, width))
        comparison.add(f"random {seed}, remapped", lambda roles=roles: remap(roles, coverage, reach))


def _random_roles(reach: Reach, number: int, seed: int) -> list[tuple[int, int]]:
    always = list(reach.always_retrieval)
    others = [head for head in reach.heads() if head not in set(always)]
    return always + random.Random(seed).sample(others, number - len(always))


def _lessons(model: Any, tokenizer: Any, cells: tuple[Cell, ...], number: int, split: Any) -> list[Lesson]:
    makers = makers_for(tokenizer, cells, split)
    rng = random.Random(f"{split}/held-out")
    return [prepare(model, cell.make(makers, number, rng)) for cell in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=None, help="default: all")
    parser.add_argument("--retrieval-heads", type=int, default=14)
    parser.add_argument("--budget-tokens", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=IdentifySettings.steps)
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts of each kind")
    parser.add_argument("--random-plans", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    base = IdentifySettings(
        num_retrieval_heads=arguments.retrieval_heads,
        config=HybridConfig(budget_tokens=arguments.budget_tokens, block_size=arguments.block_size),
        steps=arguments.steps,
    )
    names = list(settings_of_variants(base)) if arguments.variants is None else arguments.variants
    unknown = sorted(set(names) - set(settings_of_variants(base)))
    if unknown:
        parser.error(f"unknown variant {unknown[0]!r}; there are {', '.join(settings_of_variants(base))}")
    torch.manual_seed(0)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    compare(Comparison(model, tokenizer, base, arguments.prompts, arguments.json), names, arguments.random_plans)


if __name__ == "__main__":
    main()
