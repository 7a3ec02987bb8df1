"""The stages of an identification, from prompts to a plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.shape import ModelShape
from ..plan import Head, HeadPlan
from ..policies.plans import same_index
from ..prompts.makers import Cell, PromptMaker, makers_for
from ..prompts.text import load_text
from ..results import fingerprint
from .budgets import Options
from .checkpoint import Checkpoint
from .donors import Reach, choose_by_coverage, covered_mass, remap
from .progress import Progress, Report, silent
from .replay import TeacherBatch, prepare
from .search import Judge, exchange
from .sensitivity import Surrogate, gradients, join, measure_sensitivity
from .settings import IdentifySettings
from .train import Trainer, top_heads


class Stages:
    """The stages of one identification; arguments as in `identify`, with settings that `settle` has settled."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: IdentifySettings,
        reach: Reach,
        folder: str | Path | None = None,
        report: Report = silent,
    ) -> None:
        self._model, self._tokenizer, self._settings, self._reach = model, tokenizer, settings, reach
        self._shape = ModelShape.of(model)
        self._checkpoint = Checkpoint(None, settings)
        if folder is not None:
            sources = {cell.text for cell in (*settings.train_cells, *self._cells)}
            known = fingerprint(model, texts={source: load_text(source) for source in sorted(sources)})
            self._checkpoint = Checkpoint(Path(folder), settings, known)
        self._report = report
        self._makers: dict[str, PromptMaker] = {}
        self._batches = 0

    @property
    def _cells(self) -> tuple[Cell, ...]:
        assert self._settings.calibrate_cells is not None, "settle(settings) comes first"
        return self._settings.calibrate_cells

    def run(self) -> tuple[HeadPlan, Tensor | None]:
        """The plan, and E[z] `[L, Hkv]` where gates were trained."""
        settings, reach, means = self._settings, self._reach, None
        number = settings.num_retrieval_heads
        assert number is not None, "settle(settings) comes first"
        plan_of: Callable[[Collection[Head]], HeadPlan]
        if settings.roles == "sensitivity":
            surrogate = self.surrogate()
            retrieval = surrogate.search(number)

            def plan_of(heads: Collection[Head]) -> HeadPlan:
                return surrogate.plan(surrogate.assign(heads))
        else:
            coverage = None
            if settings.roles == "coverage" or settings.donors == "remapped":
                coverage = self.coverage()
                plan_of = partial(remap, coverage=coverage, reach=reach)
            if settings.roles == "gates":
                means = self.train(coverage)
                retrieval = top_heads(means, number, reach)
            else:
                assert coverage is not None
                retrieval = choose_by_coverage(coverage, reach, number)
        if settings.donors == "same_index":
            return same_index(retrieval, self._shape), means
        if settings.exchange_rounds:
            judge = Judge(self._model, self.all_lessons(), settings.config, reach)
            retrieval = self._exchange(retrieval, judge, plan_of)
        plan = plan_of(retrieval)
        return (self.with_budgets(plan) if settings.head_budgets else plan), means

    def surrogate(self) -> Surrogate:
        """The second-order model of all kinds of calibration prompts."""
        settings = self._settings
        return Surrogate(self.sensitivity(), self._reach, settings.coupling, settings.factors)

    def sensitivity(self) -> Tensor:
        """The table that `Surrogate` takes."""
        settings, tables = self._settings, list[Tensor]()

        def measure(lesson: TeacherBatch, noise: torch.Generator) -> dict[str, Tensor]:
            more = settings.forms, self._reach, settings.draws, noise, settings.factors
            return {"tables": measure_sensitivity(self._model, lesson, *more)}

        for batches in self._measured("sensitivity", measure):
            tables += torch.cat([batch["tables"] for batch in batches], 1).unbind(0)
        return join(tables)

    def with_budgets(self, plan: HeadPlan) -> HeadPlan:
        """The plan with budgets of heads: another pass over the calibration prompts, at the config's own budget."""
        settings, model = self._settings, self._model
        shortest = min(cell.length for cell in self._cells)
        options = Options(plan, settings.config, self._reach, settings.factors, shortest, settings.coupling)

        def measure(lesson: TeacherBatch, noise: torch.Generator) -> dict[str, Tensor]:
            table, tokens = options.measure(model, lesson, gradients(model, lesson, settings.draws, noise))
            return {"table": table, "tokens": tokens, "steps": torch.tensor(lesson.answer_ids.numel())}

        kinds = list(self._measured("budgets", measure))
        tokens, steps = (
            torch.stack([batch[name] for batches in kinds for batch in batches]).sum(0) for name in ("tokens", "steps")
        )
        return options.best([torch.cat([batch["table"] for batch in batches]) for batches in kinds], tokens / steps)

    def _measured(
        self, stage: str, measure: Callable[[TeacherBatch, torch.Generator], dict[str, Tensor]]
    ) -> Iterator[list[dict[str, Tensor]]]:
        """What is found in the batches of each kind of prompts; goes on from the last that was kept."""
        for number, cell in enumerate(self._cells):
            seed = random.Random(f"{self._settings.seed}/draws/{cell}").randrange(2**31)
            noise, name = torch.Generator().manual_seed(seed), f"{stage}-{number}"
            batches = self._checkpoint.load_all(name)
            if batches:
                noise.set_state(batches[-1]["noise"])
            for lesson in self.lessons(cell, sum(int(batch["prompts"]) for batch in batches)):
                found = measure(lesson, noise)
                found |= {"prompts": torch.tensor(len(lesson.answer_ids)), "noise": noise.get_state()}
                # The search takes many small steps, for which a GPU is slow.
                batches.append({name: tensor.cpu() for name, tensor in found.items()})
                self._checkpoint.save(f"{name}-{len(batches) - 1}", batches[-1])
            yield batches

    def coverage(self) -> Tensor:
        """See `donors.measure_coverage`."""
        parts: list[dict[str, Tensor]] = []
        for index, cell in enumerate(self._cells):
            kept = self._checkpoint.load_all(f"coverage-{index}")
            parts += kept
            done = sum(int(part["prompts"]) for part in kept)
            for batch, lesson in enumerate(self.lessons(cell, done), start=len(kept)):
                mass, tokens = covered_mass(self._model, lesson, self._settings.config, self._reach)
                prompts = torch.tensor(len(lesson.answer_ids))
                parts.append({"mass": mass, "tokens": torch.tensor(tokens), "prompts": prompts})
                self._checkpoint.save(f"coverage-{index}-{batch}", parts[-1])
        total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in ("mass", "tokens")}
        return (total["mass"] / total["tokens"]).float()

    def train(self, coverage: Tensor | None) -> Tensor:
        """E[z] `[L, Hkv]` of trained gates; `coverage` finds the donors of a step, None inherits by index."""
        makers = makers_for(self._tokenizer, self._settings.train_cells, "identify")
        return Trainer(self._model, makers, self._settings, self._reach, coverage, self._checkpoint).run(self._report)

    def _exchange(
        self, retrieval: Sequence[Head], judge: Judge, plan_of: Callable[[Collection[Head]], HeadPlan]
    ) -> list[Head]:
        """Exchanged retrieval heads; goes on from the last round that was finished."""
        kept = self._checkpoint.load("exchange")
        done = 0
        if kept is not None:
            retrieval, done = [(layer, head) for layer, head in kept["heads"].tolist()], int(kept["rounds"])

        def on_round(number: int, heads: Collection[Head]) -> None:
            found = {"heads": torch.tensor(sorted(heads)), "rounds": torch.tensor(number)}
            self._checkpoint.save("exchange", found)

        rounds = range(done + 1, self._settings.exchange_rounds + 1)
        return exchange(retrieval, self._reach, judge, plan_of, rounds, self._report, on_round)

    def all_lessons(self) -> list[TeacherBatch]:
        """All calibration prompts, kept together."""
        return [lesson for cell in self._cells for lesson in self.lessons(cell)]

    def lessons(self, cell: Cell, done: int = 0) -> Iterator[TeacherBatch]:
        """The calibration prompts of one kind, a batch at a time, without the first `done` prompts."""
        settings = self._settings
        if cell.text not in self._makers:
            self._makers |= makers_for(self._tokenizer, (cell,), "identify")
        prompts = cell.make(
            self._makers, settings.calibrate_prompts, random.Random(f"{settings.seed}/calibrate/{cell}")
        )
        size, total = self._batch_size(cell), sum(len(self._firsts(each)) for each in self._cells)
        total *= 1 + self._settings.head_budgets
        self._batches += ceil(done / size)
        for first in range(done, settings.calibrate_prompts, size):
            yield prepare(self._model, prompts[first : first + size], settings.prefill_chunk)
            self._batches += 1
            self._report(Progress("measure", (self._batches - 1) % total + 1, total))

    def _firsts(self, cell: Cell) -> range:
        return range(0, self._settings.calibrate_prompts, self._batch_size(cell))

    def _batch_size(self, cell: Cell) -> int:
        """Prompts of a kind that pass together: as many as were asked for, or as the device's memory holds."""
        weight, shape = next(self._model.parameters()), self._shape
        tokens = cell.count if cell.task == "continuation" else _ANSWER
        memory = torch.cuda.get_device_properties(weight.device).total_memory if weight.is_cuda else _CPU_BYTES
        kept = _COPIES * 4 * shape.num_heads * tokens * len(shape.global_layers)  # attention weights
        kept += 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * weight.element_size()  # the cache
        return max(1, min(self._settings.batch_size, int(_SHARE * memory) // (kept * cell.length)))


_ANSWER = 64
"""Most tokens of an answer to a hidden question."""
_COPIES, _SHARE, _CPU_BYTES = 4, 0.4, 8 * 2**30
"""Copies of the attention weights that a backward pass keeps; the share of a GPU's memory that they may take; memory to
assume without a GPU."""
