"""IdentifySettings: everything that decides which plan comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from ..checks import check_types, settings_from
from ..config import HybridConfig
from ..errors import ConfigError
from ..models.shape import ModelShape
from ..plan import MOST_FACTOR
from ..prompts.makers import Cell

Roles = Literal["sensitivity", "gates", "coverage"]
Gates = Literal["hardkuma", "hardconcrete", "direct"]
Loss = Literal["hidden", "logits"]
Donors = Literal["remapped", "same_index"]
Penalty = Literal["two_sided", "one_sided"]


@dataclass(frozen=True, kw_only=True)
class IdentifySettings:
    """How roles and donors are found. Raises `ConfigError` for a value that makes no sense.

    >>> IdentifySettings(num_retrieval_heads=24, config=HybridConfig(budget_tokens=1024)).roles
    'sensitivity'

    Attributes:
        num_retrieval_heads: how many heads retrieve, the first layer's included; None: an eighth of all.
        config: the decode settings that the plan is for; a mapping works, too.
        budget_scales: multiples of the config's budget that the plan should serve, each measured by itself. Plans for 1
            and 4 together did better at 1, too; how much of that the second measurement alone explains is not known.
        roles: how heads are chosen: by the answers' `sensitivity` to every possible donor (a search over a second-order
            model of the KL), by trained `gates` (the paper), or greedily by the `coverage` of attention mass.
        donors: `remapped` to the best donor by the measure of `roles` (for gates: coverage), or the `same_index`, as in
            the paper.
        calibrate_cells: kinds of prompts to measure heads and donors on, each a `Cell` or its text, such as
            `prose:2048:passkey:5`; None: `default_cells` of `texts`.
        texts: the texts that the default kinds continue.
        calibrate_prompts: number of prompts of each kind.
        draws: answers drawn from the model for each prompt (`sensitivity`).
        completion_factors: candidates for a head's completion factor, if `config` leaves it to the plan; first 0.
        coupling: how much products between heads count in the second-order model, in [0, 1].
        head_budgets: whether each head gets its own multiple of the budget, from a quarter to 4, at the same total; a
            second pass over the prompts, about as long as the first, finds them (`sensitivity`, `top_k`).
        same_layer: whether a retrieval head may serve heads of its own layer.
        shards: number of tensor-parallel ranks; a donor stays on its rank.
        stages: number of pipeline stages; a donor stays in its stage.
        exchange_rounds: maximum number of rounds of swapping retrieval heads at the end, judged by decoding.
        train_cells: kinds of prompts to train gates on, one drawn at each step.
        gates: the gates' distribution.
        loss: distance from the teacher: squared error of the last `hidden` states or KL of the `logits`.
        loss_weight: weight of that distance against the Lagrangian.
        penalty: how the number of open gates is held at its target, see `objective.Lagrangian`.
        multiplier: initial one-sided multiplier.
        multiplier_learning_rate: learning rate of the one-sided multiplier.
        steps: training steps of the gates.
        learning_rate: AdamW's, with warm-up and decay over a fifth of the steps each.
        batch_size: maximum number of prompts at once; fewer if memory is short.
        prefill_chunk: tokens per prefill chunk.
        seed: seed of prompts, drawn answers and gate noise.
    """

    num_retrieval_heads: int | None = None
    config: HybridConfig = field(default_factory=lambda: HybridConfig(budget_tokens=512, block_size=16))
    budget_scales: tuple[float, ...] = (1.0, 4.0)
    roles: Roles = "sensitivity"
    donors: Donors = "remapped"
    calibrate_cells: tuple[Cell, ...] | None = None
    texts: tuple[str, ...] = ("code", "prose")
    calibrate_prompts: int = 24
    draws: int = 8
    completion_factors: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    coupling: float = 0.2
    head_budgets: bool = False
    same_layer: bool = True
    shards: int = 1
    stages: int = 1
    exchange_rounds: int = 0
    train_cells: tuple[Cell, ...] = (
        Cell("prose", 1024, "passkey", 5),
        Cell("prose", 2048, "passkey", 5),
        Cell("noise", 2048, "passkey", 5),
        Cell("prose", 2048, "passkey", 1),
    )
    gates: Gates = "hardkuma"
    loss: Loss = "hidden"
    loss_weight: float = 1.0
    penalty: Penalty = "two_sided"
    multiplier: float = 2.0
    multiplier_learning_rate: float = 0.001
    steps: int = 600
    learning_rate: float = 0.03
    batch_size: int = 8
    prefill_chunk: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", settings_from(HybridConfig, self.config, "config"))
        for name in ("calibrate_cells", "train_cells"):
            if isinstance(cells := getattr(self, name), (list, tuple)):
                parsed = tuple(Cell.parse(cell) if isinstance(cell, str) else cell for cell in cells)
                object.__setattr__(self, name, parsed)
        check_types(self)
        choices = {"roles": Roles, "donors": Donors, "gates": Gates, "loss": Loss, "penalty": Penalty}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(repr(choice) for choice in get_args(kind))
                raise ConfigError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}.")
        least = {"steps": 1, "batch_size": 1, "exchange_rounds": 0, "calibrate_prompts": 1, "draws": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} must be at least {smallest}, not {getattr(self, name)}.")
        if not 0 <= self.coupling <= 1:
            raise ConfigError(f"coupling must be in [0, 1], not {self.coupling}.")
        factors = self.completion_factors
        if not factors or factors[0] or not all(0 <= factor <= MOST_FACTOR for factor in factors):
            raise ConfigError(f"completion_factors must begin with 0, and none may be negative or above {MOST_FACTOR}.")
        if not self.budget_scales or min(self.budget_scales) <= 0:
            raise ConfigError("budget_scales must be positive.")
        if self.calibrate_cells == () or not self.texts or not self.train_cells:
            raise ConfigError("Identification needs at least one kind of prompt to train on and one to calibrate on.")
        if self.exchange_rounds and self.donors == "same_index":
            raise ConfigError("The exchange of retrieval heads needs remapped donors.")
        if self.head_budgets:
            self._check_head_budgets()
        if self.config.refresh_every != 1:
            raise ConfigError("Identification selects at every token: refresh_every must be 1.")

    def _check_head_budgets(self) -> None:
        needed = {"roles": "sensitivity", "donors": "remapped"}
        of_config = {"selection": "top_k", "retrieval_attention": "selected"}
        for place, names in ((self, needed), (self.config, of_config)):
            for name, only in names.items():
                if getattr(place, name) != only:
                    raise ConfigError(f"head_budgets needs {name}={only!r}, not {getattr(place, name)!r}.")

    @property
    def forms(self) -> tuple[HybridConfig, ...]:
        """`config` at every budget of `budget_scales`; alone where it has none."""
        config, found = self.config, []
        for scale in self.budget_scales:
            if config.budget_tokens is not None:
                found.append(replace(config, budget_tokens=max(int(config.budget_tokens * scale), 1)))
            elif config.budget_ratio is not None:
                found.append(replace(config, budget_ratio=min(config.budget_ratio * scale, 1.0)))
        return tuple(dict.fromkeys(found)) or (config,)

    @property
    def factors(self) -> tuple[float, ...]:
        """The options of a head's completion under `config`."""
        fixed = {"none": (0.0,), "centroid": (1.0,)}
        return fixed.get(self.config.completion, self.completion_factors)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


PASSKEYS = (
    Cell("prose", 2048, "passkey", 1),
    Cell("prose", 2048, "passkey", 5),
    Cell("prose", 4096, "passkey", 1),
    Cell("prose", 4096, "passkey", 5),
    Cell("noise", 2048, "passkey", 1),
    Cell("noise", 4096, "passkey", 1),
    Cell("noise", 7168, "passkey", 1),
)
"""Kinds of prompts that hide something."""

_LONGEST = 12288


def default_cells(texts: Sequence[str], shape: ModelShape) -> tuple[Cell, ...]:
    """What to calibrate on: continuations of texts at up to three quarters of the model's positions, and passkeys."""
    longest = min(_LONGEST, shape.max_positions * 3 // 4) if shape.max_positions else _LONGEST
    continued = [Cell(text, length, "continuation", 64) for text in texts for length in (longest, longest // 3)]
    return (*continued, Cell("noise", longest, "passkey", 1), Cell("prose", longest // 3, "passkey", 5))


def paper_settings(**changes: Any) -> IdentifySettings:
    """The paper's identification: its optimiser, constraint, inheritance and dense retrieval heads, without a search.

    The training budget is 30% of the context; prompts of 1K-10K tokens hide ten passkeys.
    """
    lengths = (1024, 2048, 4096, 8192, 10240)
    settings = IdentifySettings(
        config=HybridConfig(budget_ratio=0.3, block_size=64, retrieval_attention="full", completion="none"),
        roles="gates",
        donors="same_index",
        same_layer=False,
        train_cells=tuple(Cell("prose", length, "passkey", 10) for length in lengths),
        penalty="one_sided",
        steps=3000,
        learning_rate=0.01,
        batch_size=1,
    )
    return replace(settings, **changes)
