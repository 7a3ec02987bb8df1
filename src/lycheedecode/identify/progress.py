"""What identification says while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """One step of a stage, for whoever shows it.

    Attributes:
        stage: `measure` (batches of calibration prompts), `train` (steps of the gates) or `exchange` (rounds).
        step, steps: how far the stage is.
        figures: what it has come to: loss, density and open heads of the gates; the score of an exchange.
        gate_means: E[z] of every head `[L, Hkv]`, of the stage `train`.
    """

    stage: str
    step: int
    steps: int
    figures: dict[str, float] = field(default_factory=dict)
    gate_means: Tensor | None = None


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Reports nothing."""
