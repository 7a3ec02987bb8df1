"""IdentifySettings: everything that decides which plan comes out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from ..config import HybridConfig
from .prompts import Cell

Gates = Literal["hardkuma", "hardconcrete", "direct"]
Loss = Literal["hidden", "logits"]
Donors = Literal["remapped", "same_index"]
Penalty = Literal["two_sided", "one_sided"]


@dataclass(frozen=True, kw_only=True)
class IdentifySettings:
    """How roles and donors are found. Raises `ValueError` with one sentence when a value makes no sense.

    Attributes:
        num_retrieval_heads: retrieval heads of the plan, the first layer's included; None: an eighth of all.
        config: the decode form that the plan is made for.
        train_cells: kinds of prompts that the gates learn from, one drawn at each step.
        calibrate_cells: kinds of prompts that donors are measured and the swap search is judged on.
        calibrate_prompts: prompts of each calibration cell.
        gates: distribution of the gates.
        loss: distance from the teacher: squared error of the last `hidden` states or KL of the `logits`.
        loss_weight: factor on that distance, against the Lagrangian.
        penalty: how the number of open gates is held, see `objective.Lagrangian`.
        multiplier, multiplier_learning_rate: start and rate of the one-sided multiplier.
        donors: `remapped` to the best-covering retrieval head, or of the `same_index` as in the paper.
        same_layer: whether a retrieval head may serve heads of its own layer.
        shards, stages: tensor-parallel ranks and pipeline stages that donors must stay inside.
        steps: training steps; 0 ranks heads by how well they cover others instead.
        batch_size: prompts of a step.
        learning_rate: of AdamW, with warm-up and decay over a fifth of the steps each.
        exchange_rounds: most rounds of the final exchange of retrieval heads; 0 for none.
        donor_candidates: donors that the final reassignment tries for each head; 1 for none.
        prefill_chunk: tokens of a prefill chunk.
        seed: of prompts and gate noise.
    """

    num_retrieval_heads: int | None = None
    config: HybridConfig = field(default_factory=lambda: HybridConfig(budget_tokens=512, block_size=16))
    train_cells: tuple[Cell, ...] = (
        Cell("prose", 1024, "passkey", 5),
        Cell("prose", 2048, "passkey", 5),
        Cell("noise", 2048, "passkey", 5),
        Cell("prose", 2048, "passkey", 1),
    )
    calibrate_cells: tuple[Cell, ...] = (
        Cell("prose", 2048, "passkey", 5),
        Cell("prose", 4096, "passkey", 5),
        Cell("prose", 4096, "passkey", 1),
        Cell("noise", 4096, "passkey", 1),
    )
    calibrate_prompts: int = 16
    gates: Gates = "hardkuma"
    loss: Loss = "hidden"
    loss_weight: float = 1.0
    penalty: Penalty = "two_sided"
    multiplier: float = 2.0
    multiplier_learning_rate: float = 0.001
    donors: Donors = "remapped"
    same_layer: bool = True
    shards: int = 1
    stages: int = 1
    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 0.03
    exchange_rounds: int = 24
    donor_candidates: int = 4
    prefill_chunk: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("gates", Gates), ("loss", Loss), ("donors", Donors), ("penalty", Penalty)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(repr(choice) for choice in get_args(kind))
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}.")
        least = {"steps": 0, "batch_size": 1, "exchange_rounds": 0, "donor_candidates": 1, "calibrate_prompts": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, not {getattr(self, name)}.")
        if not self.calibrate_cells or (self.steps and not self.train_cells):
            raise ValueError("Identification needs at least one kind of prompt to train on and one to calibrate on.")
        if self.donors == "same_index" and self.config.refresh_every != 1:
            raise ValueError("Identification selects at every token: refresh_every must be 1.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def paper_settings(**changes: Any) -> IdentifySettings:
    """The paper's identification: its optimiser, constraint, inheritance and dense retrieval heads, without a search.

    The training budget is 30% of the context; prompts of 1K-10K tokens hide ten passkeys.
    """
    lengths = (1024, 2048, 4096, 8192, 10240)
    settings = IdentifySettings(
        config=HybridConfig(budget_ratio=0.3, block_size=64, retrieval_attention="full"),
        train_cells=tuple(Cell("prose", length, "passkey", 10) for length in lengths),
        penalty="one_sided",
        donors="same_index",
        same_layer=False,
        steps=3000,
        batch_size=1,
        learning_rate=0.01,
        exchange_rounds=0,
        donor_candidates=1,
    )
    return replace(settings, **changes)
