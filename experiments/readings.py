"""What every head reads, more freely than a head plan says: its own budget, two donors, other keys to scan.

Allotment  a reading for every head, which `Reader` follows in `replay`
Readings   the second-order model of `identify.sensitivity` over the readings that a head might have
Choices    finds good ones that read no more tokens than a form does
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lycheedecode.config import HybridConfig
from lycheedecode.identify.budgets import LEVELS, Menu
from lycheedecode.identify.donors import Reach
from lycheedecode.identify.replay import Seen, TeacherBatch, choose_blocks, in_parts
from lycheedecode.identify.sensitivity import measure_options
from lycheedecode.plan import Head, HeadPlan

# ---------------------------------------------------------------------- keys that retrieval heads scan

GROUP = 32
"""Numbers that share a scale of 16 bits."""


def _float8(keys: Tensor) -> Tensor:
    return keys.to(torch.float8_e4m3fn).to(keys.dtype)


def _int4(keys: Tensor) -> Tensor:
    """Groups of the last dimension: whole numbers from -7 to 7, times a scale."""
    groups = keys.float().unflatten(-1, (-1, min(GROUP, keys.shape[-1])))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float().clamp(min=1e-7)
    return ((groups / scale).round().clamp(-7, 7) * scale).flatten(-2).to(keys.dtype)


def _int4_of_channels(keys: Tensor) -> Tensor:
    """The same over tokens that follow each other; the newest, which fill no group, stay as they are."""
    whole = keys.shape[2] // GROUP * GROUP
    return torch.cat([_int4(keys[:, :, :whole].mT).mT, keys[:, :, whole:]], 2)


KEYS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "cache": (16, lambda keys: keys),
    "float8": (8, _float8),
    "int4": (4 + 16 / GROUP, _int4),
    "int4 of channels": (4 + 16 / GROUP, _int4_of_channels),
}
"""Bits of a number, and what is left of keys `[B, Hkv, S, D]`."""

Part = tuple[Head, int]
"""A donor, and how many tokens of its selection."""
Blocks = dict[Part, Tensor]
"""Selected blocks, bool `[B, T, N]`."""


@dataclass(frozen=True)
class Reading:
    """What one head reads: the union of selections, and what they leave, completed with a factor."""

    parts: tuple[Part, ...]
    factor: float = 0.0

    def blocks(self, chosen: Blocks) -> Tensor:
        """The blocks that are read, bool `[B, T, N]`."""
        return torch.stack([chosen[part] for part in self.parts]).any(0)


@dataclass(frozen=True)
class Allotment:
    """A reading for every head, `L x Hkv`.

    Attributes:
        label: its name in results.
        readings: see above.
        config: what readings do not say; its budget means nothing.
        keys: which of `KEYS` are scanned.
    """

    label: str
    readings: tuple[tuple[Reading, ...], ...]
    config: HybridConfig
    keys: str = "cache"

    @classmethod
    def of(cls, label: str, plan: HeadPlan, config: HybridConfig, keys: str = "cache") -> Allotment:
        """Every head as the plan says, with the config's budget."""
        budget, completed = config.budget_tokens, config.completion == "plan"
        assert budget is not None
        rows = [
            tuple(
                Reading(((donor, budget),), completed * factor)
                for donor, factor in zip(donors, plan.completion_factors(layer), strict=True)
            )
            for layer, donors in enumerate(plan.donors)
        ]
        return cls(label, tuple(rows), config, keys)

    @property
    def every(self) -> list[Reading]:
        """The readings of all heads, layer by layer."""
        return [reading for row in self.readings for reading in row]

    @property
    def retrieval(self) -> list[Head]:
        """Heads whose selections are read."""
        return sorted({donor for reading in self.every for donor, _ in reading.parts})

    def bytes(self, context: int, tokens: float | None = None) -> float:
        """What a step reads, in bytes of one key of one head; `tokens`: by all heads, None: as much as they may."""
        if tokens is None:
            tokens = sum(budget for reading in self.every for _, budget in reading.parts)
        completed = sum(reading.factor > 0 for reading in self.every) * (context // self.config.chunk_tokens)
        return len(self.retrieval) * context * KEYS[self.keys][0] / 16 + 2 * completed + 2 * tokens


@dataclass
class Reader:
    """A form in `replay`; `tokens` counts what all heads have read, `steps` the answer tokens."""

    form: Allotment
    tokens: int = 0
    steps: int = 0
    _chosen: Blocks = field(default_factory=dict)

    def __call__(self, layer: int, seen: Seen) -> Tensor:
        config, row = self.form.config, self.form.readings[layer]
        asked = {part for reading in self.form.every for part in reading.parts if part[0][0] == layer}
        self._chosen.update(select(layer, seen, asked, config, self.form.keys))
        read = torch.stack([reading.blocks(self._chosen) for reading in row], 1)
        self.tokens += int(read.sum()) * config.block_size
        self.steps += read.shape[0] * read.shape[2] * (layer == 0)
        factors = torch.tensor([reading.factor for reading in row], device=read.device)
        means = seen.means(config.chunk_tokens) if factors.any() else None
        parts = in_parts(seen, read, config.block_size, config.chunk_tokens, means)
        return parts.output(factors[:, None, None, None])


def select(layer: int, seen: Seen, asked: Iterable[Part], config: HybridConfig, keys: str) -> Blocks:
    """Selections that heads of this layer make, by their scan of `keys`."""
    asked = sorted(asked)
    heads = sorted({donor[1] for donor, _ in asked})
    if not heads:
        return {}
    scored = seen.heads(heads)
    weights = scored.weights
    if keys != "cache":
        logits = (scored.query @ KEYS[keys][1](scored.keys).mT).float().unflatten(2, weights.shape[2:4])
        weights = logits.masked_fill(weights == 0, -torch.inf).softmax(-1)
    found: Blocks = {}
    for budget in sorted({budget for _, budget in asked}):
        chosen = choose_blocks(weights, replace(config, budget_tokens=budget))
        found |= {(donor, budget): chosen[:, heads.index(donor[1])] for donor, size in asked if size == budget}
    return found


# ---------------------------------------------------------------------- budgets and second donors


class Readings:
    """What each head might read, measured.

    Args:
        form: one donor for every head, one budget for all. Its selections with a budget multiplied by `LEVELS` are the
            options, and every two of them with half the budget each.
        factors: of completion, the form's among them.
        longest: tokens of the calibration prompts; larger budgets are left out.
    """

    def __init__(self, form: Allotment, factors: Sequence[float], longest: int) -> None:
        self.form, self.factors, self.longest = form, tuple(factors), longest
        self.width = len(form.readings[0])
        block, least = form.config.block_size, form.config.forced_blocks * form.config.block_size
        [self.base] = {budget for reading in form.every for _, budget in reading.parts}

        def times(level: float) -> int:
            return max(int(level * self.base) // block * block, least)

        self.levels = sorted({times(level) for level in LEVELS if times(level) <= longest} | {self.base})
        self.parts: list[tuple[Part, ...]] = [((head, size),) for head in form.retrieval for size in self.levels]
        half = times(0.5)
        self.parts += [((one, half), (two, half)) for one, two in combinations(form.retrieval, 2)]
        self._rows: list[Tensor] = []
        self._read = torch.zeros(len(self.parts), dtype=torch.float64)
        self._steps = 0

    @torch.no_grad()
    def measure(self, model: Any, lesson: TeacherBatch, gradient: dict[int, Tensor]) -> None:
        """Add a batch of prompts, of whose answers these are the gradients."""
        form, config = self.form, self.form.config
        asked = {each for part in self.parts for each in part}
        chosen: Blocks = {}

        def look(layer: int, seen: Seen) -> None:
            chosen.update(select(layer, seen, {part for part in asked if part[0][0] == layer}, config, form.keys))

        def blocks(i: int) -> Tensor:
            return Reading(self.parts[i]).blocks(chosen)

        reach = Reach(len(form.readings), self.width)
        first = [max(donor[0] for donor, _ in parts) for parts in self.parts]
        table = measure_options(model, lesson, config, reach, gradient, self.factors, first, look, blocks)
        self._read += torch.stack([blocks(i).sum() for i in range(len(self.parts))]).double().cpu() * config.block_size
        self._steps += lesson.answer_ids.numel()
        self._rows.append(table.cpu())

    @staticmethod
    def _reaches(parts: tuple[Part, ...], layer: int) -> bool:
        return all(donor[0] <= layer for donor, _ in parts)

    def choices(self, coupling: float) -> Choices:
        """The second-order model of what was measured."""
        allowed = torch.tensor(
            [[self._reaches(parts, head // self.width) for parts in self.parts] for head in range(len(self.form.every))]
        )
        for layer, head in self.form.retrieval:  # these read what they select, at least in part
            own = torch.tensor([(layer, head) in (donor for donor, _ in parts) for parts in self.parts])
            allowed[layer * self.width + head] &= own
        return Choices(self, torch.cat(self._rows), allowed, (self._read / self._steps).float(), coupling)


class Choices(Menu):
    """Readings as options of heads; a choice is for every head `parts * F + factor`.

    Args:
        source: what was measured.
        table: `[n, H, parts, F]`, in any unit.
        allowed: bool `[H, parts]`.
        tokens: float32 `[parts]`, read a step.
        coupling: as in `identify.sensitivity.Surrogate`.
    """

    def __init__(self, source: Readings, table: Tensor, allowed: Tensor, tokens: Tensor, coupling: float) -> None:
        self._source, number = source, len(source.factors)
        index = {parts: i for i, parts in enumerate(source.parts)}
        base = torch.tensor(
            [index[each.parts] * number + source.factors.index(each.factor) for each in source.form.every]
        )
        means = torch.tensor([source.longest // source.form.config.chunk_tokens * (f > 0) for f in source.factors])
        tokens = (tokens[:, None] + means).flatten()
        super().__init__(table.flatten(2), allowed.repeat_interleave(number, 1), tokens, base, coupling)
        self._donor = [parts[0][0] for parts in source.parts for _ in range(number)]
        self._single = torch.tensor([len(parts) == 1 for parts in source.parts]).repeat_interleave(number)
        self._budget = torch.tensor([sum(size for _, size in parts) for parts in source.parts])
        self._budget = self._budget.repeat_interleave(number)

    def factors(self) -> Tensor:
        """What is read stays, but for the factors of completion."""
        number = len(self._source.factors)
        same = torch.arange(len(self._tokens)) // number == (self.base // number)[:, None]
        return self.best(same)

    def budgets_of_selections(self) -> Tensor:
        """One donor for every head, and a budget for every donor."""
        return self.within(self._tied)

    def budgets_of_heads(self) -> Tensor:
        """One donor and a budget for every head."""
        return self.best(self._single)

    def two_donors(self) -> Tensor:
        """One donor and the budget of all, or two and half of it each, for every head."""
        open_ = self._budget <= self._source.base
        open_ &= ~self._single | (self._budget == self._source.base)
        return self.best(open_)

    def anything(self) -> Tensor:
        """All options for every head."""
        return self.best(torch.ones_like(self._single))

    def form(self, label: str, choice: Tensor) -> Allotment:
        """A choice as a form."""
        source, number = self._source, len(self._source.factors)
        every = [Reading(source.parts[i // number], source.factors[i % number]) for i in choice.tolist()]
        rows = tuple(tuple(every[i : i + source.width]) for i in range(0, len(every), source.width))
        return replace(source.form, label=label, readings=rows)

    def _tied(self, price: float, sweeps: int = 2) -> Tensor:
        """The readers of a selection share its budget: options given budgets, and budgets given readers, in turn."""
        donors = self._source.form.retrieval
        of_donor = {donor: torch.tensor([each == donor for each in self._donor]) & self._single for donor in donors}
        budget = dict.fromkeys(donors, self._source.base)
        for _ in range(sweeps):
            open_ = torch.stack([of_donor[each] & (self._budget == budget[each]) for each in donors]).any(0)
            choice = self.descend(price, open_, 1)
            for donor in donors:
                readers = of_donor[donor][choice].nonzero()[:, 0]
                rivals = []
                for size in self._source.levels:
                    closed = ~(of_donor[donor] & (self._budget == size))
                    moved = choice.clone()
                    moved[readers] = self._alone[readers].masked_fill(closed, torch.inf).argmin(1)
                    rivals.append((self.cost(moved) + price * self.tokens(moved), size, moved))
                _, budget[donor], choice = min(rivals, key=lambda rival: rival[:2])
        return choice
