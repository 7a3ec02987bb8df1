"""From a model and text to a HeadPlan: measure what every possible donor costs every head, search roles and donors.

prompts -> lessons -> sensitivity | gates | coverage -> roles -> donors -> HeadPlan
"""

from __future__ import annotations

import inspect
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..checks import check_tokenizer, check_type, settings_from
from ..errors import ConfigError
from ..models.shape import ModelError, ModelShape
from ..plan import HeadPlan
from ..prompts.makers import Cell
from .donors import Reach
from .pipeline import Stages
from .progress import Progress, Report, silent
from .settings import IdentifySettings, default_cells, paper_settings

__all__ = ["Cell", "IdentifySettings", "Progress", "Stages", "identify", "paper_settings", "settle"]


def identify(
    model: nn.Module,
    tokenizer: Any,
    settings: IdentifySettings | Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    report: Report = silent,
) -> HeadPlan:
    """Find retrieval heads and donors of a model.

    Memory besides the weights: the keys and values of `batch_size` prompts, and about `40 * num_heads * T * S` bytes a
    layer for the attention weights of `T` answer tokens over `S` tokens, kept for the backward pass. That is some 25 GB
    for an 8B model at 10K tokens with batch 1, on top of 16 GB of bf16 weights. A model that `device_map` spreads over
    several devices stays where it is.

    >>> from lycheedecode import HybridConfig
    >>> quick = IdentifySettings(
    ...     config=HybridConfig(budget_tokens=64, block_size=16),
    ...     calibrate_cells=(Cell("noise", 300, "passkey", 1),),
    ...     calibrate_prompts=2,
    ...     draws=1,
    ... )
    >>> found = identify(model, tokenizer, quick)
    >>> len(found.retrieval), found.num_layers * found.num_kv_heads
    (3, 8)

    Args:
        model: Hugging Face decoder, frozen, in eval mode.
        tokenizer: its tokenizer.
        settings: an object or a mapping such as `{"draws": 4}`; the defaults suit small models, `paper_settings` are
            the paper's.
        folder: keeps partial results; after an interruption, the same call continues from there.
        report: called after every measured batch and every training step.

    Returns:
        the plan with its provenance, and with E[z] of every head if gates were trained.

    Raises:
        LycheeError: settings do not fit the model, or the text is too short.
    """
    check_tokenizer(tokenizer)
    if tokenizer is None:
        raise ConfigError("Identification needs the model's tokenizer.")
    check_type("folder", folder, str | Path | None)
    settings, reach = settle(settings_from(IdentifySettings, settings, "settings"), ModelShape.of(model))
    started = time.perf_counter()
    with _tensor_cores():
        plan, means = Stages(model, tokenizer, settings, reach, folder, report).run()
    shape = ModelShape.of(model)
    return replace(
        plan,
        model={"name": shape.name, "architecture": shape.architecture},
        gate_means=None if means is None else tuple(map(tuple, means.tolist())),
        provenance=_provenance(settings, plan, next(model.parameters()).device, time.perf_counter() - started),
    )


def settle(settings: IdentifySettings, shape: ModelShape) -> tuple[IdentifySettings, Reach]:
    """Settings with everything that depends on the model, and which heads may serve which.

    Raises `ModelError` for a model without a layer of full attention, `ConfigError` for settings that do not fit.
    """
    if not shape.global_layers:
        raise ModelError(f"{shape.architecture} has no layer with full attention, so there is nothing to make sparse.")
    reach = Reach.of(shape, same_layer=settings.same_layer, shards=settings.shards, stages=settings.stages)
    cells = default_cells(settings.texts, shape) if settings.calibrate_cells is None else settings.calibrate_cells
    trained = settings.train_cells if settings.roles == "gates" else ()
    for cell in (*trained, *cells):
        if shape.max_positions and cell.length >= shape.max_positions:
            raise ConfigError(
                f"Prompts of {cell.length} tokens do not fit the model's {shape.max_positions} positions."
            )
    budget, shortest = settings.config.budget_tokens or 0, min(cell.length for cell in cells)
    if settings.head_budgets and shortest <= budget:
        raise ConfigError(
            f"Budgets of heads show on prompts longer than the budget of {budget} tokens, not on {shortest}: calibrate "
            "on longer ones, or give a smaller budget."
        )
    return replace(settings, num_retrieval_heads=_number_of_heads(settings, reach), calibrate_cells=cells), reach


def _number_of_heads(settings: IdentifySettings, reach: Reach) -> int:
    total, always = len(reach.heads()), len(reach.always_retrieval)
    number = settings.num_retrieval_heads
    if number is None:
        return max(total // 8, always + 1)
    if not always < number <= total:
        raise ConfigError(
            f"num_retrieval_heads must be between {always + 1} (the first layer of each stage and one more) "
            f"and {total}, not {number}."
        )
    return number


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """float32 products in TF32: several times faster on a GPU, and precise enough for these measurements."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _provenance(settings: IdentifySettings, plan: HeadPlan, device: torch.device, seconds: float) -> dict[str, Any]:
    import transformers

    completion = {"chunk": settings.config.chunk_tokens}
    on_gpu = device.type == "cuda"
    return {
        "method": "identify",
        **({} if plan.completion is None else {"completion": completion}),
        **({} if plan.budgets is None else {"budgets": {"budget_tokens": settings.config.budget_tokens}}),
        "settings": settings.to_dict(),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


class _CallablePackage(ModuleType):
    """`lycheedecode.identify(...)` is `identify` of this package, whether or not somebody has imported the package."""

    def __call__(self, *arguments: Any, **options: Any) -> HeadPlan:
        return identify(*arguments, **options)


_package = sys.modules[__name__]
_package.__class__ = _CallablePackage
_package.__signature__ = inspect.signature(identify)  # type: ignore[attr-defined]
