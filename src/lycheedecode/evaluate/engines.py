"""Engines of one model for everything that is compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import policies
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
    coverage: Tensor | None = None,
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
    for variant in variants:
        try:
            policy = variant.make(shape, coverage, match_at, steps)
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


def coverage_for(model: nn.Module, tokenizer: Any, variants: Sequence[Variant], cells: Iterable[Cell]) -> Tensor | None:
    """Coverage of heads by heads, if a variant is Kascade's: on a few prompts from the text of identification.

    Args:
        model, tokenizer: what is measured.
        variants: everything that is compared.
        cells: texts and lengths of the prompts.
    """
    calibrated = [variant for variant in variants if variant.policy.startswith("kascade")]
    if not calibrated:
        return None
    shape = ModelShape.of(model)
    kinds = tuple(dict.fromkeys(Cell(cell.text, cell.length) for cell in cells))
    settings = IdentifySettings(
        config=calibrated[0].config, calibrate_cells=kinds, calibrate_prompts=_CALIBRATION_PROMPTS, batch_size=1
    )
    return Stages(model, tokenizer, settings, Reach(shape.num_layers, shape.num_kv_heads)).coverage()
