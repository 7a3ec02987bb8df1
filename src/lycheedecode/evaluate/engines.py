"""Engines of one model for everything that is compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import policies
from ..config import HybridConfig
from ..engine.decoder import Execution
from ..engine.engine import Engine
from ..identify import IdentifySettings, Stages
from ..identify.donors import Reach
from ..models.shape import ModelShape
from ..prompts.makers import Cell
from .variants import Variant

_CALIBRATION_PROMPTS = 4


def make_engines(
    model: nn.Module,
    tokenizer: Any,
    variants: Sequence[Variant],
    execution: Execution = "auto",
    coverage: Coverage | None = None,
    match_at: int = 0,
    steps: int = policies.STEPS,
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Engines by label.

    Args:
        model, tokenizer: what decodes.
        variants: policies, plans and budgets.
        execution: as in `Engine`; policies whose steps are not fit for it are eager.
        coverage: from `coverage_for`.
        match_at: context at which every policy gets the budget whose bytes, in `steps` steps, are those of the plan;
            0: equal budgets.
        steps: see `match_at`.

    Returns:
        the engines, and why a policy was left out: its bytes cannot be matched.

    Raises:
        PolicyError, PlanError, ModelError: see `policies.make` and `Engine`.
    """
    shape, engines, left_out = ModelShape.of(model), {}, {}
    itemsize = next(model.parameters()).itemsize
    for variant in variants:
        try:
            policy = variant.make(shape, coverage, match_at, steps, itemsize)
        except policies.PolicyError as error:
            if not match_at:
                raise
            left_out[variant.label] = str(error)
            continue
        fixed = getattr(policy.attention, "graph_safe", False)
        engines[variant.label] = Engine(
            model,
            tokenizer,
            attention=policy.attention,
            config=policy.config,
            execution=execution if fixed or execution == "auto" else "eager",
        )
    return engines, left_out


class Coverage:
    """Coverage of heads by heads, on a few prompts from the text of identification: at the budget that a policy is
    judged at, measured when it is asked for, and once.

    Args:
        model, tokenizer: what is measured.
        cells: kinds of prompts; where full attention makes the answers, texts are continued.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, cells: Iterable[Any]) -> None:
        self._model, self._tokenizer = model, tokenizer
        kinds = (cell if isinstance(cell, Cell) else Cell(cell.text, cell.length, "continuation", 64) for cell in cells)
        self._cells = tuple(dict.fromkeys(kinds))
        self._found: dict[HybridConfig, Tensor] = {}

    def __call__(self, config: HybridConfig) -> Tensor:
        """float32 `[H, H]`, see `identify.donors.measure_coverage`."""
        if config not in self._found:
            settings = IdentifySettings(
                config=config, calibrate_cells=self._cells, calibrate_prompts=_CALIBRATION_PROMPTS, batch_size=1
            )
            reach = Reach.of(ModelShape.of(self._model))
            self._found[config] = Stages(self._model, self._tokenizer, settings, reach).coverage()
        return self._found[config]


def coverage_for(
    model: nn.Module, tokenizer: Any, variants: Sequence[Variant], cells: Iterable[Any]
) -> Coverage | None:
    """What Kascade is calibrated with, if a variant is Kascade's."""
    return Coverage(model, tokenizer, cells) if any(variant.is_calibrated for variant in variants) else None
