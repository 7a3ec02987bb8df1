"""How far is hybrid attention from full attention where people use it: on plain continuations of long texts?

    python -m experiments.continuations --model DIR --json docs/results/continuations.json

    identify   plans, on continuations of one half of the texts
    choose     of several couplings the best for each number of heads, on other continuations of that half
    evaluate   policies, on the other half

The model draws answers at temperature 0.7, which are fed to every policy over one dense prefill (see `identify.replay`:
all answer tokens at once, attention weights in float32). Results are written after every batch, so that a run that is
cut short leaves what it has; plans lie beside them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from experiments.figures import Figures
from lycheedecode.bench.harness import say
from lycheedecode.config import HybridConfig
from lycheedecode.errors import InputError, LycheeError
from lycheedecode.identify import Cell, IdentifySettings, Stages, settle
from lycheedecode.identify.donors import Reach
from lycheedecode.identify.replay import Attend, Drawn, Planned, TeacherBatch, full, prepare, replay
from lycheedecode.identify.sensitivity import Surrogate, gradients, join, measure_changes
from lycheedecode.models.load import DEFAULT_MODEL, load_model
from lycheedecode.models.shape import ModelShape
from lycheedecode.models.versions import cache_argument
from lycheedecode.plan import HeadPlan
from lycheedecode.policies.plans import random_roles, same_index
from lycheedecode.prompts.makers import makers_for
from lycheedecode.prompts.text import Split
from lycheedecode.results import Result


class Attends(Protocol):
    """What is judged."""

    @property
    def label(self) -> str:
        """Its name."""

    def attend(self) -> Attend:
        """How it attends, from the first layer on."""


@dataclass(frozen=True)
class Student:
    """A policy that is a plan under a config."""

    label: str
    plan: HeadPlan
    config: HybridConfig

    def attend(self) -> Attend:
        """How it attends, from the first layer on."""
        return Planned(self.plan, self.config)


@dataclass(frozen=True)
class Form:
    """A config that plans are found for: `NAME=VALUE,...:HEADS,...`, and whether a plan for several has to serve it.
    Without heads none is found; `--plan` names some that were found before."""

    name: str
    config: HybridConfig
    heads: tuple[int, ...]
    joined: bool

    @classmethod
    def parse(cls, text: str, block_size: int) -> Form:
        """A form from the command line."""
        settings, _, heads = text.partition(":")
        try:
            changes = {key: int(value) for key, value in (part.split("=") for part in settings.split(","))}
            numbers = tuple(int(number) for number in heads.split(",") if number)
        except ValueError:
            raise InputError(f"A form is NAME=VALUE,...:HEADS,... in whole numbers, not {text!r}.") from None
        config = HybridConfig.from_dict({"block_size": block_size, **changes})
        return cls(settings, config, numbers, set(changes) == {"budget_tokens"})


@dataclass(frozen=True)
class Job:
    """A search: for so many heads in a table, with or without completion."""

    table: Tensor
    heads: int
    completed: bool = True
    coupling: float = 0.2


def search(job: Job, reach: Reach, factors: Sequence[float]) -> HeadPlan:
    """The plan that a search finds."""
    surrogate = Surrogate(job.table[..., : len(factors)], reach, job.coupling, factors)
    return surrogate.plan(surrogate.assign(surrogate.search(job.heads)))


class Study:
    """One model: its tables, plans and results."""

    def __init__(self, model: nn.Module, tokenizer: Any, options: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.shape = ModelShape.of(model)
        self.precise = deepcopy(model).float() if options.float32 else model
        self.began = time.perf_counter()
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "plans")}
        settings["model"] = Path(options.model).name
        self.result = Result("continuations", settings, summary={"seconds": {}})

    @property
    def seconds(self) -> float:
        """Since the model was loaded."""
        return time.perf_counter() - self.began

    # ------------------------------------------------------------------ plans

    def measure(self, forms: Sequence[Form]) -> dict[str, Tensor]:
        """The sensitivity table of every form, over the same prompts and the same gradients."""
        tables: dict[str, list[Tensor]] = {form.name: [] for form in forms}
        for cell in map(parse_cell, self.options.identify):
            rows: dict[str, list[Tensor]] = {form.name: [] for form in forms}
            for lesson, gradient in self.calibration(cell, forms[0].config, self.options.identify_prompts):
                for form in forms:
                    table = measure_changes(
                        self.model, lesson, form.config, self.reach, gradient, self.settings.completion_factors
                    )
                    rows[form.name].append(table.cpu())
            for name, found in rows.items():
                tables[name].append(torch.cat(found))
            self._say(f"{len(forms)} tables of {cell}")
        return {name: join(found) for name, found in tables.items()}

    def calibration(
        self, cell: Cell, config: HybridConfig, number: int
    ) -> Iterator[tuple[TeacherBatch, dict[int, Tensor]]]:
        """Prompts of the texts' half for identification, a batch at a time, and the gradients of their answers."""
        options = self.options
        settings = IdentifySettings(
            config=config, calibrate_cells=tuple(map(parse_cell, options.identify)), calibrate_prompts=number,
            batch_size=options.batch_size, prefill_chunk=options.prefill_chunk,
        )  # fmt: skip
        self.settings, self.reach = settle(settings, self.shape)
        for number, lesson in enumerate(Stages(self.model, self.tokenizer, self.settings, self.reach).lessons(cell)):
            noise = torch.Generator().manual_seed(random.Random(f"{cell}/{number}").randrange(2**31))
            yield lesson, gradients(self.model, lesson, options.draws, noise)

    def find(self, jobs: dict[str, Job]) -> dict[str, HeadPlan]:
        """The plans that the search finds, side by side: each takes a core for some seconds."""
        factors = self.settings.completion_factors
        workers = min(len(jobs), max(len(os.sched_getaffinity(0)) - 1, 1), 12)
        given = {
            name: (job, self.reach, factors if job.completed else factors[:1])
            for name, job in sorted(jobs.items(), key=lambda pair: -pair[1].heads)
        }
        if workers == 1:
            found = {name: search(*given[name]) for name in jobs}
        else:
            single = multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
            with ProcessPoolExecutor(workers, *single) as pool:
                running = {name: pool.submit(search, *each) for name, each in given.items()}
                found = {name: running[name].result() for name in jobs}
        for name, plan in found.items() if self.options.plans else ():
            replace(
                plan,
                model={"name": self.shape.name, "architecture": self.shape.architecture},
                provenance={"method": "identify", "settings": self.settings.to_dict()},
            ).save(self.options.plans / f"{name}.json")
        self._say(f"{len(jobs)} searches")
        return found

    def plans(self, forms: Sequence[Form]) -> dict[str, HeadPlan]:
        """Ours by name, for every form and for all budgets together; of several couplings the one that is chosen."""
        options, main = self.options, forms[0]
        if not any(form.heads for form in forms):
            return {}
        tables = self.measure(forms)
        joined = [form for form in forms if form.joined]
        jobs = {f"{form.name}-{heads}": Job(tables[form.name], heads) for form in forms for heads in form.heads}
        table = torch.cat([tables[form.name] for form in joined])
        for heads in main.heads:
            for coupling in options.couplings:
                jobs[f"joined-{heads}-coupling-{coupling}"] = Job(table, heads, coupling=coupling)
            if not options.few:
                jobs[f"{main.name}-{heads}-uncompleted"] = Job(tables[main.name], heads, completed=False)
        plans = self.find(jobs)
        return plans if len(options.couplings) < 2 else self.chosen(main, plans)

    def chosen(self, form: Form, plans: dict[str, HeadPlan]) -> dict[str, HeadPlan]:
        """Without the joined plans whose coupling is worse than another's on prompts that are not evaluated."""
        rivals = {name: Student(name, plan, form.config) for name, plan in plans.items() if name.startswith("joined-")}
        figures: dict[str, Figures] = {}
        for cell in map(parse_cell, self.options.identify):
            for lesson in self.lessons(cell, self.options.choose_prompts, "identify"):
                self._judge(lesson, rivals.values(), figures)
        kl = {name: figures[name].to_dict()["kl_mean"] for name in rivals}
        self.keep(chosen_by=kl)
        best: dict[str, str] = {}
        for name in sorted(rivals, key=kl.__getitem__):
            best.setdefault(name.partition("-coupling-")[0], name)
        self._say(f"{len(rivals)} plans compared")
        return {name: plan for name, plan in plans.items() if name not in rivals or name in best.values()}

    def students(self, forms: Sequence[Form], plans: dict[str, HeadPlan]) -> list[Student]:
        """What is compared: ours in every form, and policies that are plans."""
        options, main, found = self.options, forms[0], []
        own = HeadPlan.all_retrieval(self.shape.num_layers, self.shape.num_kv_heads)
        for form in forms:
            none, ones = (replace(form.config, completion=kind) for kind in ("none", "centroid"))
            found += [Student(f"{form.name}-own", own, none), Student(f"{form.name}-own-completed", own, ones)]
            for name, plan in plans.items():
                if name.startswith(f"{form.name}-") or (form.joined and name.startswith("joined-")):
                    label = name.replace("joined", f"{form.name}-joined")
                    found.append(Student(label, plan, none if name.endswith("uncompleted") else form.config))
                if form is main and name.endswith("uncompleted"):
                    found += self._compared(name, plan, none)
            for name in options.plan if form.joined else ():
                label = f"{form.name}-plan-{Path(name).name.removesuffix('.json')}"
                found.append(Student(label, HeadPlan.load(name), form.config))
        return found

    def _compared(self, name: str, plan: HeadPlan, none: HybridConfig) -> list[Student]:
        """Other people's policies with the same roles."""
        shape, roles = self.shape, plan.retrieval
        dense = replace(none, retrieval_attention="full")
        return [
            Student(f"{name}-paper", same_index(roles, shape), dense),
            Student(f"{name}-same-index", same_index(roles, shape), none),
            Student(f"{name}-random", random_roles(len(roles), shape, 0), none),
        ]

    # ------------------------------------------------------------------ evaluation

    def lessons(self, cell: Cell, number: int, split: Split = "evaluate") -> Iterator[TeacherBatch]:
        """Fresh prompts of one kind with answers that the model draws, a batch at a time."""
        options = self.options
        makers = makers_for(self.tokenizer, [cell], split)
        prompts = cell.make(makers, number, random.Random(f"evaluate/{options.seed}/{cell}"))
        random.Random(0).shuffle(prompts)  # cut short, they still come from all over the text
        for first in range(0, len(prompts), options.evaluate_batch):
            batch = prompts[first : first + options.evaluate_batch]
            drawn = (
                Drawn(cell.count, options.temperature, options.seed + first) if cell.task == "continuation" else None
            )
            yield self._precise(prepare(self.model, batch, options.prefill_chunk, drawn))

    def _precise(self, lesson: TeacherBatch) -> TeacherBatch:
        """A lesson for the model in float32, if that is wanted."""
        if self.precise is self.model:
            return lesson
        prefix = tuple((keys.float(), values.float()) for keys, values in lesson.prefix)
        lesson = replace(lesson, prefix=prefix)
        with torch.no_grad():
            return replace(lesson, teacher=replay(self.precise, lesson, full))

    def evaluate(self, students: Sequence[Attends]) -> None:
        """Every student on every kind, a batch of each kind in turn, until the time is over."""
        figures: dict[str, dict[str, Figures]] = {}
        running = {name: self.lessons(parse_cell(name), self.options.prompts) for name in self.options.evaluate}
        while running and self.seconds < 60 * self.options.minutes:
            for name in list(running):
                lesson = next(running[name], None)
                if lesson is None:
                    del running[name]
                    continue
                self._judge(lesson, students, figures.setdefault(name, {}))
                scores = {label: each.to_dict() for label, each in figures[name].items()}
                self.result = self.result.with_cells({**self.result.cells, name: scores})
                self.keep()

    @torch.no_grad()
    def _judge(self, lesson: TeacherBatch, students: Iterable[Attends], figures: dict[str, Figures]) -> None:
        head, mask = self.precise.get_output_embeddings(), lesson.mask
        expected = head(lesson.teacher).float()
        floor = head(self._by_another_kernel(lesson)).float()
        temperature = self.options.temperature
        figures.setdefault("full attention by another kernel", Figures()).add(expected, floor, mask, temperature)
        for student in students:
            states = replay(self.precise, lesson, student.attend())
            figures.setdefault(student.label, Figures()).add(expected, head(states).float(), mask, temperature)

    def _by_another_kernel(self, lesson: TeacherBatch) -> Tensor:
        """Full attention as transformers computes it: the floor that rounding sets."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(lesson.prefix):
            cache.update(keys, values, layer)
        return self.precise.base_model(input_ids=lesson.answer_ids, **cache_argument(cache)).last_hidden_state

    def keep(self, **found: Any) -> None:
        """Write what there is so far."""
        self.result = self.result.add(**found, total_seconds=round(self.seconds, 1))
        self.result.save(self.options.json)

    def show(self) -> None:
        """Print a line for every student on every kind."""
        for name, cell in self.result.cells.items():
            for label, each in cell.items():
                print(f"{name}  {label:55}  {each['kl_mean']:.5f} +- {each['kl_error']:.5f}  p99 {each['kl_p99']:.4f}")

    def _say(self, what: str) -> None:
        self.keep(seconds={**self.result.summary["seconds"], what: round(self.seconds, 1)})
        say(f"{self.seconds:7.1f} s  {what}")


def parse_cell(text: str) -> Cell:
    """A kind of prompts from the command line."""
    try:
        source, length, task, count = text.rsplit(":", 3)
        return Cell(source, int(length), task, int(count))  # type: ignore[arg-type]
    except ValueError as error:
        known = str(error) if isinstance(error, LycheeError) else "its lengths are whole numbers."
        raise InputError(f"A kind of prompts is SOURCE:TOKENS:TASK:ANSWER, not {text!r}: {known}") from None


def arguments(description: str) -> argparse.ArgumentParser:
    """What every study of continuations takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL)
    add("--dtype", default="auto", help="of its weights")
    add("--json", type=Path, required=True)
    add("--plans", type=Path, help="folder for the plans")
    add("--identify", nargs="+", default=["code:12288:continuation:64", "prose:12288:continuation:64"])
    add("--identify-prompts", type=int, default=12, help="of each kind")
    add("--evaluate", nargs="+", default=["code:30000:continuation:64", "prose:30000:continuation:64"])
    add("--prompts", type=int, default=30, help="of each kind")
    add("--block-size", type=int, default=32)
    add("--draws", type=int, default=8)
    add("--batch-size", type=int, default=4)
    add("--evaluate-batch", type=int, default=2)
    add("--prefill-chunk", type=int, default=32768)
    add("--temperature", type=float, default=0.7)
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=60)
    add("--float32", action="store_true", help="answers pass through the model in float32, over the same prefill")
    return parser


def main() -> None:
    """The command."""
    parser = arguments(__doc__)
    add = parser.add_argument
    default = ["budget_tokens=1024:28,14,7", "budget_tokens=4096:28,14,7"]
    add("--forms", nargs="+", metavar="NAME=VALUE,...:HEADS,...", default=default)
    add("--couplings", type=float, nargs="+", default=[0.2], help="of the plans that have to serve all budgets")
    add("--choose-prompts", type=int, default=12, help="of each kind of --identify, to choose between --couplings")
    add("--plan", nargs="*", default=[], help="plans that were found before")
    add("--few", action="store_true", help="without other people's policies")
    options = parser.parse_args()
    try:
        forms = [Form.parse(text, options.block_size) for text in options.forms]
        for text in options.identify + options.evaluate:
            parse_cell(text)
    except LycheeError as error:
        parser.error(str(error))
    torch.set_float32_matmul_precision("highest" if options.float32 else "high")
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    study = Study(model, tokenizer, options)
    study.evaluate(study.students(forms, study.plans(forms)))
    study.show()


if __name__ == "__main__":
    try:
        main()
    except LycheeError as error:
        print(f"continuations: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
