"""From a model and text to a HeadPlan: measure what every possible donor costs every head, search roles and donors.

prompts -> lessons -> sensitivity | gates | coverage -> roles -> donors -> HeadPlan
"""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.shape import ModelError, ModelShape
from ..plan import Head, HeadPlan
from ..prompts.makers import Cell, makers_for
from ..prompts.text import load_text
from ..results import fingerprint
from .checkpoint import Checkpoint
from .donors import Reach, assign_donors, choose_by_coverage, covered_mass
from .progress import Progress, Report, silent
from .replay import Lesson, prepare
from .search import DonorTable, Judge, exchange
from .sensitivity import Surrogate, join, measure_sensitivity
from .settings import IdentifySettings, paper_settings
from .train import Trainer, top_heads

__all__ = ["Cell", "IdentifySettings", "Progress", "identify", "paper_settings"]


def identify(
    model: nn.Module,
    tokenizer: Any,
    settings: IdentifySettings | None = None,
    *,
    folder: str | Path | None = None,
    report: Report = silent,
) -> HeadPlan:
    """Find retrieval heads and donors of a model.

    Memory beyond the weights: the keys and values of `batch_size` prompts, and about `40 * num_heads * T * S` bytes a
    layer for the attention weights of `T` answer tokens over `S` tokens that a backward pass keeps: some 25 GB for an
    8B model at 10K tokens with batch 1, beside 16 GB of bf16 weights. A model spread over several devices by
    `device_map` is measured and trained where it lies.

    Args:
        model: Hugging Face decoder, frozen, in eval mode.
        tokenizer: its tokenizer.
        settings: defaults suit a small model; see `paper_settings` for the paper's.
        folder: keeps what was found so far, a batch at a time; an interrupted call resumes from it when called again.
        report: called after every batch that was measured and every training step.

    Returns:
        the plan, with its provenance, and E[z] of every head where gates were trained.

    Raises:
        ValueError: settings that do not fit the model; text that is too short.
    """
    settings = settings or IdentifySettings()
    shape = ModelShape.of(model)
    reach = Reach(shape.num_layers, shape.num_kv_heads, settings.same_layer, settings.shards, settings.stages)
    settings = replace(settings, num_retrieval_heads=_number_of_heads(settings, reach))
    _check(settings, shape)
    started = time.perf_counter()
    with _tensor_cores():
        retrieval, donors, means = Stages(model, tokenizer, settings, reach, folder, report).run()
    details = {
        "model": {"name": shape.name, "architecture": shape.architecture},
        "gate_means": None if means is None else means.tolist(),
    }
    if donors is None:
        plan = HeadPlan.same_index(retrieval, shape.num_layers, shape.num_kv_heads, **details)
    else:
        plan = HeadPlan.from_donors(donors, **details)
    return replace(plan, provenance=_provenance(settings, time.perf_counter() - started))


class Stages:
    """The stages of one identification; arguments as in `identify`, with `num_retrieval_heads` settled."""

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
        self._checkpoint = Checkpoint(None, settings)
        if folder is not None:
            sources = {cell.text for cell in (*settings.train_cells, *settings.calibrate_cells)}
            known = fingerprint(model, texts={source: load_text(source) for source in sorted(sources)})
            self._checkpoint = Checkpoint(Path(folder), settings, known)
        self._report = report
        self._batches = 0

    def run(self) -> tuple[list[Head], DonorTable | None, Tensor | None]:
        """Retrieval heads, their donor table (None: same index), and E[z] where gates were trained."""
        settings, reach, means = self._settings, self._reach, None
        donors_of: Callable[[Collection[Head]], DonorTable] | None = None
        if settings.roles == "sensitivity":
            surrogate = Surrogate(self.sensitivity(), reach, settings.coupling)
            retrieval = surrogate.search(settings.num_retrieval_heads)

            def donors_of(heads: Collection[Head]) -> DonorTable:
                return surrogate.as_heads(surrogate.assign(heads))
        else:
            coverage = None
            if settings.roles == "coverage" or settings.donors == "remapped":
                coverage = self.coverage()

                def donors_of(heads: Collection[Head]) -> DonorTable:
                    return assign_donors(heads, coverage, reach)

            if settings.roles == "gates":
                means = self.train(coverage)
                retrieval = top_heads(means, settings.num_retrieval_heads, reach.always_retrieval)
            else:
                retrieval = choose_by_coverage(coverage, reach, settings.num_retrieval_heads)
        if settings.donors == "same_index":
            return retrieval, None, means
        if settings.exchange_rounds:
            judge = Judge(self._model, self.all_lessons(), settings.config, reach)
            retrieval = self._exchange(retrieval, judge, donors_of)
        return retrieval, donors_of(retrieval), means

    def sensitivity(self) -> Tensor:
        """The table that `Surrogate` takes, measured on all kinds of calibration prompts."""
        settings, tables = self._settings, []
        device = self._model.get_input_embeddings().weight.device
        for cell in settings.calibrate_cells:
            noise = torch.Generator().manual_seed(random.Random(f"{settings.seed}/draws/{cell}").randrange(2**31))
            name = f"sensitivity-{len(tables)}"
            kept = self._checkpoint.load_all(name)
            if kept:
                noise.set_state(kept[-1]["noise"])
            rows = [batch["table"].to(device) for batch in kept]
            for lesson in self.lessons(cell, skip=len(kept)):
                rows.append(
                    measure_sensitivity(self._model, lesson, settings.config, self._reach, settings.draws, noise)
                )
                self._checkpoint.save(f"{name}-{len(rows) - 1}", {"table": rows[-1], "noise": noise.get_state()})
            tables.append(torch.cat(rows))
        return join(tables)

    def coverage(self) -> Tensor:
        """See `donors.measure_coverage`."""
        parts: list[dict[str, Tensor]] = []
        for index, cell in enumerate(self._settings.calibrate_cells):
            kept = self._checkpoint.load_all(f"coverage-{index}")
            parts += kept
            for batch, lesson in enumerate(self.lessons(cell, skip=len(kept)), start=len(kept)):
                mass, tokens = covered_mass(self._model, lesson, self._settings.config, self._reach)
                parts.append({"mass": mass, "tokens": torch.tensor(tokens)})
                self._checkpoint.save(f"coverage-{index}-{batch}", parts[-1])
        mass, tokens = (torch.stack([part[name] for part in parts]).sum(0) for name in ("mass", "tokens"))
        return (mass / tokens).float()

    def train(self, coverage: Tensor | None) -> Tensor:
        """E[z] `[L, Hkv]` of trained gates; `coverage` finds the donors of a step, None inherits by index."""
        makers = makers_for(self._tokenizer, self._settings.train_cells, "identify")
        return Trainer(self._model, makers, self._settings, self._reach, coverage, self._checkpoint).run(self._report)

    def _exchange(
        self, retrieval: Sequence[Head], judge: Judge, donors_of: Callable[[Collection[Head]], DonorTable]
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
        return exchange(retrieval, self._reach, judge, donors_of, rounds, self._report, on_round)

    def all_lessons(self) -> list[Lesson]:
        """All calibration prompts, kept together."""
        return [lesson for cell in self._settings.calibrate_cells for lesson in self.lessons(cell)]

    def lessons(self, cell: Cell, skip: int = 0) -> Iterator[Lesson]:
        """The calibration prompts of one kind, a batch at a time, without the first `skip` batches."""
        settings = self._settings
        makers = makers_for(self._tokenizer, (cell,), "identify")
        prompts = cell.make(makers, settings.calibrate_prompts, random.Random(f"{settings.seed}/calibrate/{cell}"))
        self._batches += skip
        for first in self._firsts()[skip:]:
            yield prepare(self._model, prompts[first : first + settings.batch_size], settings.prefill_chunk)
            self._batches += 1
            total = len(settings.calibrate_cells) * len(self._firsts())
            self._report(Progress("measure", (self._batches - 1) % total + 1, total))

    def _firsts(self) -> range:
        return range(0, self._settings.calibrate_prompts, self._settings.batch_size)


def _number_of_heads(settings: IdentifySettings, reach: Reach) -> int:
    total, always = reach.num_layers * reach.num_kv_heads, len(reach.always_retrieval)
    number = settings.num_retrieval_heads
    if number is None:
        return max(total // 8, always + 1)
    if not always < number <= total:
        raise ConfigError(
            f"num_retrieval_heads must lie between {always + 1} (the first layer of each stage and one more) "
            f"and {total}, not {number}."
        )
    return number


def _check(settings: IdentifySettings, shape: ModelShape) -> None:
    if len(shape.global_layers) != shape.num_layers:
        raise ModelError(f"{shape.architecture} has layers without full attention; identification needs it in all.")
    trained = settings.train_cells if settings.roles == "gates" else ()
    for cell in (*trained, *settings.calibrate_cells):
        if shape.max_positions and cell.length >= shape.max_positions:
            raise ConfigError(
                f"Prompts of {cell.length} tokens do not fit the model's {shape.max_positions} positions."
            )


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """float32 products in TF32: several times faster on a GPU, and what is measured here is far coarser."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _provenance(settings: IdentifySettings, seconds: float) -> dict[str, Any]:
    import transformers

    return {
        "method": "identify",
        "settings": settings.to_dict(),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
