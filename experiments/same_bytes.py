"""Where do a step's bytes of the KV cache lower the KL most?

    python -m experiments.same_bytes --model DIR --json docs/results/same-bytes.json

Every form reads as many bytes a token as HEADS retrieval heads with a budget of BUDGET tokens:

    heads         fewer or more of them; the budget is what their scan leaves
    scanned keys  of 8 or 4 bits, so that more heads scan, or more is left for the budget
    completion    chunks of other sizes, or none
    calibration   plans found on half and a quarter of the prompts
    budgets       for each selection, or for each head that reads one
    factors       of completion, above 1.5, too
    two donors    a head reads the union of two selections, with half of the budget each

Plans come from the search of `identify`, budgets and second donors from the same second-order model over readings
(`experiments.readings`), measured on longer prompts of the same texts. Judged as in `experiments.continuations`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments.continuations import Form, Job, Study, arguments, parse_cell
from experiments.readings import KEYS, Allotment, Reader, Readings
from lycheedecode.config import HybridConfig
from lycheedecode.errors import InputError, LycheeError
from lycheedecode.identify.sensitivity import Surrogate
from lycheedecode.models.load import load_model
from lycheedecode.plan import HeadPlan

COUPLING = 0.2


class Judged(NamedTuple):
    """A form, and what has read by it so far."""

    label: str
    reader: Reader

    def attend(self) -> Reader:
        """How it attends, from the first layer on."""
        return self.reader


class SameBytes(Study):
    """One model: plans, forms of as many bytes as the first, results."""

    def __init__(self, model: nn.Module, tokenizer: Any, options: argparse.Namespace) -> None:
        super().__init__(model, tokenizer, options)
        self.result = replace(self.result, command="same bytes")
        self.config = HybridConfig(budget_tokens=options.budget_tokens, block_size=options.block_size)
        self.context = max(parse_cell(cell).length for cell in options.evaluate)
        self.total = self.shape.num_layers * self.shape.num_kv_heads
        self.judged: list[Judged] = []

    def run(self) -> None:
        """Run the study, from the first table to the last figure."""
        plans, heads = self.find_plans(), self.options.heads
        first = Allotment.of(f"{heads} heads", plans[str(heads)], self.config)
        self.allowed = first.bytes(self.context)
        # The best that the engine reads today, by a guess: half as many heads, whose keys have 8 bits.
        few = self.filled(f"{heads // 2} heads, float8", plans[str(heads // 2)], "float8")
        forms = [first, *self.of_plans(plans), *self.of_readings([first, *few])]
        self.judged = [Judged(form.label, Reader(form)) for form in forms]
        self.evaluate(self.judged)

    def find_plans(self) -> dict[str, HeadPlan]:
        """Plans by number of heads; for the number asked for, also from a part of the calibration."""
        options, heads = self.options, self.options.heads
        sizes = (options.budget_tokens, 4 * options.budget_tokens)
        searched = [Form(str(size), replace(self.config, budget_tokens=size), (), True) for size in sizes]
        tables = self.measure(searched).values()
        jobs = {str(number): Job(torch.cat([*tables]), number, coupling=COUPLING) for number in (heads // 2, heads)}
        if 2 * heads < self.total:
            jobs[str(2 * heads)] = Job(torch.cat([*tables]), 2 * heads, coupling=COUPLING)
        for share in (2, 4):
            part = torch.cat([table[::share] for table in tables])
            jobs[f"{heads} heads, 1/{share} of the calibration"] = Job(part, heads, coupling=COUPLING)
        plans = self.find(jobs)
        surrogate = Surrogate(torch.cat([*tables]), self.reach, COUPLING, self.settings.completion_factors)
        return plans | {str(self.total): surrogate.plan(surrogate.assign(self.reach.heads()))}

    def of_plans(self, plans: dict[str, HeadPlan]) -> Iterator[Allotment]:
        """What a head plan and a config say, and keys of 4 bits."""
        heads = self.options.heads
        for name, plan in plans.items():
            if not name.isdigit():
                yield Allotment.of(name, plan, self.config)
                continue
            for keys in KEYS:
                if (name, keys) != (str(heads), "cache"):
                    yield from self.filled(f"{name} heads, {keys}", plan, keys)
        for chunk in (32, 64, 256, 512):
            if chunk >= self.config.block_size:
                yield from self.filled(f"{heads} heads, chunks of {chunk}", plans[str(heads)], completion_chunk=chunk)
        yield from self.filled(f"{heads} heads, no completion", plans[str(heads)], completion="none")

    def filled(self, label: str, plan: HeadPlan, keys: str = "cache", **changes: Any) -> list[Allotment]:
        """A form with the largest budget, in whole blocks, at which it reads no more than is allowed, if any."""
        config, block = replace(self.config, **changes), self.config.block_size
        rest = self.allowed - Allotment.of(label, plan, config, keys).bytes(self.context, tokens=0)
        budget = int(rest / (2 * self.total)) // block * block
        if budget < config.forced_blocks * block:
            return []
        return [Allotment.of(label, plan, replace(config, budget_tokens=budget), keys)]

    def of_readings(self, forms: list[Allotment]) -> Iterator[Allotment]:
        """Budgets of their own, and two donors, for these forms."""
        options, factors = self.options, (*self.settings.completion_factors, 2.0, 3.0, 4.0)
        cells = [parse_cell(cell) for cell in options.calibrate]
        every = [Readings(form, factors, min(cell.length for cell in cells)) for form in forms]
        for cell in cells:
            for lesson, gradient in self.calibration(cell, self.config, options.calibrate_prompts):
                for readings in every:
                    readings.measure(self.model, lesson, gradient)
            self._say(f"readings of {cell}")
        expected: dict[str, float] = {}
        for readings in every:
            choices = readings.choices(COUPLING)
            for what in ("factors", "budgets_of_selections", "budgets_of_heads", "two_donors", "anything"):
                choice = getattr(choices, what)()
                label = f"{readings.form.label}, {what.replace('_', ' ')}"
                expected[label] = round(choices.cost(choice) / choices.cost(choices.base), 4)
                yield choices.form(label, choice)
        self.keep(expected=expected)
        self._say("choices")

    def keep(self, **found: Any) -> None:
        """Write what there is so far, and what each form has read: a share of what full attention reads."""
        whole = 2 * self.total * self.context
        read = {
            label: round(reader.form.bytes(self.context, reader.tokens / reader.steps) / whole, 5)
            for label, reader in self.judged
            if reader.steps
        }
        super().keep(**({"read": read} if read else {}), **found)


def main() -> None:
    """The command."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--heads", type=int, default=14, help="of the form whose bytes are the measure")
    add("--budget-tokens", type=int, default=1024, help="of that form")
    add("--calibrate", nargs="+", default=["code:24000:continuation:64", "prose:24000:continuation:64"])
    add("--calibrate-prompts", type=int, default=6, help="of each kind of --calibrate, for budgets and second donors")
    options = parser.parse_args()
    try:
        for text in options.identify + options.evaluate + options.calibrate:
            parse_cell(text)
        HybridConfig(budget_tokens=options.budget_tokens, block_size=options.block_size)
        if options.heads < 4:
            raise InputError(f"--heads must be at least 4, not {options.heads}: half of them are tried, too.")
    except LycheeError as error:
        parser.error(str(error))
    torch.set_float32_matmul_precision("highest" if options.float32 else "high")
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    study = SameBytes(model, tokenizer, options)
    study.run()
    study.show()


if __name__ == "__main__":
    try:
        main()
    except LycheeError as error:
        print(f"same_bytes: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
