"""Engines of one model for everything that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...decoder import Execution
from ...engine import Engine
from ...identify.prompts import Cell
from ...models import ModelShape
from ...policies import PolicyError
from ..fidelity import calibrate
from ..variants import Variant

_CALIBRATION_TOKENS = 2048


def make_engines(
    model: nn.Module,
    tokenizer: Any,
    variants: Sequence[Variant],
    execution: Execution = "auto",
    match_at: int = 0,
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Engines by label.

    Args:
        model, tokenizer: what decodes.
        variants: policies, plans and budgets.
        execution: as in `Engine`; policies whose steps are not fit for it are eager.
        match_at: context at which every policy gets the budget whose bytes are those of the plan; 0: equal budgets.

    Returns:
        the engines, and why a policy was left out: its bytes cannot be matched.

    Raises:
        PolicyError, PlanError, ModelError: see `policies.make` and `Engine`.
    """
    shape, coverage = ModelShape.of(model), None
    calibrated = [variant for variant in variants if variant.policy.startswith("kascade")]
    if calibrated:
        tokens = min(_CALIBRATION_TOKENS, (shape.max_positions or 2 * _CALIBRATION_TOKENS) // 2)
        coverage = calibrate(model, tokenizer, calibrated[0].config, [Cell("prose", tokens), Cell("noise", tokens)])
    engines, left_out = {}, {}
    for variant in variants:
        try:
            policy = variant.make(shape, coverage, match_at)
        except PolicyError as error:
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
