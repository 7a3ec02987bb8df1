"""From a model and text to a HeadPlan: learn the gates, measure the donors, exchange what can be improved."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import ModelShape
from ..plan import Head, HeadPlan
from .donors import Reach, assign_donors, measure_coverage
from .prompts import Cell, makers_for
from .replay import Lesson, prepare
from .search import Judge, exchange, reassign
from .settings import IdentifySettings, paper_settings
from .train import Progress, Trainer, top_heads

__all__ = ["Cell", "IdentifySettings", "Progress", "identify", "paper_settings"]


def identify(
    model: nn.Module,
    tokenizer: Any,
    settings: IdentifySettings | None = None,
    *,
    folder: str | Path | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda message: None,
) -> HeadPlan:
    """Find retrieval heads and donors of a model.

    Memory beyond the weights: the keys and values of `batch_size` prompts (calibration: of all its prompts), and about
    `40 * num_heads * T * S` bytes a layer for the attention weights of `T` answer tokens over `S` tokens that the
    backward pass keeps: some 25 GB for an 8B model at 10K tokens with batch 1, beside 16 GB of bf16 weights. A model
    spread over several devices by `device_map` is trained where it lies.

    Args:
        model: Hugging Face decoder, frozen, in eval mode.
        tokenizer: its tokenizer.
        settings: defaults suit a small model; see `paper_settings` for the paper's.
        folder: keeps the state of the training here; an interrupted call resumes from it when called again.
        on_step: called after every training step.
        on_stage: called with one line for each stage after training.

    Returns:
        the plan, with E[z] of every head and its provenance.

    Raises:
        ValueError: settings that do not fit the model; text that is too short.
    """
    settings = settings or IdentifySettings()
    shape = ModelShape.of(model)
    reach = Reach(shape.num_layers, shape.num_kv_heads, settings.same_layer, settings.shards, settings.stages)
    settings = replace(settings, num_retrieval_heads=_number_of_heads(settings, reach))
    _check(settings, shape)
    started = time.perf_counter()

    lessons = _calibration_lessons(model, tokenizer, settings)
    coverage = measure_coverage(model, lessons, settings.config, reach)
    on_stage(f"measured donors on {len(lessons) * settings.calibrate_prompts} prompts")

    means = None
    if settings.steps:
        makers = makers_for(tokenizer, settings.train_cells, "identify")
        trainer = Trainer(model, makers, settings, reach, coverage, None if folder is None else Path(folder))
        means = trainer.run(on_step)
        retrieval = top_heads(means, settings.num_retrieval_heads, reach.always_retrieval)
    else:
        retrieval = _by_coverage(coverage, reach, settings.num_retrieval_heads)

    details = {
        "model": {"name": shape.name, "architecture": shape.architecture},
        "gate_means": None if means is None else means.tolist(),
    }
    if settings.donors == "same_index":
        plan = HeadPlan.same_index(retrieval, shape.num_layers, shape.num_kv_heads, **details)
    else:
        judge = Judge(model, lessons, settings.config, reach)
        if settings.exchange_rounds:
            retrieval = exchange(retrieval, coverage, reach, judge, settings.exchange_rounds, on_stage)
        settled: dict[Head, Head] = {}
        if settings.donor_candidates > 1:
            settled = reassign(retrieval, coverage, reach, judge, settings.donor_candidates, on_stage)
        plan = HeadPlan.from_donors(assign_donors(retrieval, coverage, reach, settled), **details)
    return replace(plan, provenance=_provenance(settings, time.perf_counter() - started))


def _number_of_heads(settings: IdentifySettings, reach: Reach) -> int:
    total, always = reach.num_layers * reach.num_kv_heads, len(reach.always_retrieval)
    number = settings.num_retrieval_heads
    if number is None:
        return max(total // 8, always + 1)
    if not always < number <= total:
        raise ValueError(
            f"num_retrieval_heads must lie between {always + 1} (the first layer of each stage and one more) "
            f"and {total}, not {number}."
        )
    return number


def _check(settings: IdentifySettings, shape: ModelShape) -> None:
    if len(shape.global_layers) != shape.num_layers:
        raise ValueError(f"{shape.architecture} has layers without full attention; identification needs it in all.")
    for cell in (*settings.train_cells, *settings.calibrate_cells):
        if shape.max_positions and cell.length >= shape.max_positions:
            raise ValueError(f"Prompts of {cell.length} tokens do not fit the model's {shape.max_positions} positions.")


def _calibration_lessons(model: nn.Module, tokenizer: Any, settings: IdentifySettings) -> list[Lesson]:
    makers = makers_for(tokenizer, settings.calibrate_cells, "identify")
    rng = random.Random(f"{settings.seed}/calibrate")
    return [
        prepare(model, cell.make(makers, settings.calibrate_prompts, rng), settings.prefill_chunk)
        for cell in settings.calibrate_cells
    ]


def _by_coverage(coverage: Tensor, reach: Reach, number: int) -> list[Head]:
    """Greedy choice without training: each time the head that raises the mean coverage of all heads most."""
    heads, allowed = reach.heads(), reach.matrix()
    served = torch.where(allowed, coverage, 0.0)
    chosen = [heads.index(head) for head in reach.always_retrieval]
    while len(chosen) < number:
        best = served[:, chosen].amax(1, keepdim=True)
        gain = torch.maximum(served, best).sum(0)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
    return sorted(heads[i] for i in chosen)


def _provenance(settings: IdentifySettings, seconds: float) -> dict[str, Any]:
    import transformers

    return {
        "method": "identify",
        "settings": settings.to_dict(),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
