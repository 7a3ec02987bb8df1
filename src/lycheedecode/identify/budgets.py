"""Budgets of heads: what share of the budget each head should read, by the second-order model of `sensitivity` again.

The search gives every head a donor, and all of them one budget. Now its options are the plan's retrieval heads x
`LEVELS` of the budget x factors of completion, and the table `a` is measured over these. Each head gets the option that
is worth most, under one price for tokens: the lowest at which all heads together read no more than with one budget.

    Options   of heads under a plan: what they read, and the plan of a choice among them
    Menu      scores choices among any options, and finds the best that read no more than a given one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import HybridConfig
from ..plan import Head, HeadPlan
from ..roles import shares_of
from .donors import Reach
from .replay import Seen, TeacherBatch, choose_blocks
from .sensitivity import in_units_of, measure_options

LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the budget that a head may read."""


class Menu:
    """Scores choices by the second-order model, and finds the best that read no more than a given one.

    A choice is int64 `[H]`: an option for every head.

    Args:
        table: `[n, H, options]`, in any unit.
        allowed: bool `[H, options]`.
        tokens: float32 `[options]`, what a head with this option reads at a step.
        base: the choice that is the measure of what others cost and read.
        coupling: as in `sensitivity.Surrogate`.
    """

    def __init__(self, table: Tensor, allowed: Tensor, tokens: Tensor, base: Tensor, coupling: float) -> None:
        self.base, self._coupling, self._every = base, coupling, torch.arange(len(base))
        self._tokens = tokens / tokens[base].sum()
        unit = 0.5 * table[:, self._every, base].sum(1).square().mean()
        self._table = table / unit.clamp(min=1e-12).sqrt()
        self._alone = 0.5 * self._table.square().mean(0)
        self._alone[~allowed] = torch.inf

    def cost(self, choice: Tensor) -> float:
        """KL of a choice, where the base costs about 1."""
        together = 0.5 * self._table[:, self._every, choice].sum(1).square().mean()
        alone = self._alone[self._every, choice].sum()
        return float((1 - self._coupling) * alone + self._coupling * together)

    def tokens(self, choice: Tensor) -> float:
        """What a choice reads, where the base reads 1."""
        return float(self._tokens[choice].sum())

    def best(self, open_: Tensor) -> Tensor:
        """The best choice among the options `open_`, bool `[options]`, that reads no more than the base."""
        return self.within(lambda price: self.descend(price, open_))

    def within(self, at: Callable[[float], Tensor], rounds: int = 20) -> Tensor:
        """The choice at the lowest price of tokens at which no more are read than there are."""
        low, high, best = -6.0, 4.0, self.base
        for _ in range(rounds):
            middle = (low + high) / 2
            choice = at(10**middle)
            if self.tokens(choice) <= 1.001:
                high = middle
                best = min(best, choice, key=self.cost)
            else:
                low = middle
        return best

    def descend(self, price: float, open_: Tensor, sweeps: int = 3) -> Tensor:
        """Each head's best option given the others', `sweeps` times."""
        alone = (self._alone + price * self._tokens).masked_fill(~open_, torch.inf)
        choice = alone.argmin(1)
        total = self._table[:, self._every, choice].sum(1)
        for _ in range(sweeps if self._coupling else 0):
            before = choice.clone()
            for head in range(len(choice)):
                others = total - self._table[:, head, choice[head]]
                coupled = others @ self._table[:, head] / len(others)
                choice[head] = (alone[head] + self._coupling * coupled).argmin()
                total = others + self._table[:, head, choice[head]]
            if torch.equal(before, choice):
                break
        return choice


@dataclass(frozen=True)
class Options:
    """What heads of a plan may read: a retrieval head's selection with a multiple of the budget, completed or not.

    Attributes:
        plan: with one budget for all heads.
        config: with the strategy `top_k`.
        reach: which heads may serve which.
        factors: of completion, the plan's among them.
        context: tokens of the shortest prompts; larger budgets are no options.
        coupling: as in `sensitivity.Surrogate`.
    """

    plan: HeadPlan
    config: HybridConfig
    reach: Reach
    factors: tuple[float, ...]
    context: int
    coupling: float

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Multiples of the budget that there are tokens for, 1 among them."""
        budget = self.config.budget_tokens or 0
        return tuple(level for level in LEVELS if level == 1 or level * budget <= self.context)

    @cached_property
    def pairs(self) -> list[tuple[Head, float]]:
        """Donors and levels, layer by layer."""
        inside = set(self.reach.heads())
        return [(head, level) for head in self.plan.retrieval if head in inside for level in self.levels]

    def measure(
        self, model: PreTrainedModel, lesson: TeacherBatch, gradient: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The table of one batch, `[n, H, pairs, F]`, and the tokens that each pair read in all of its steps."""
        chosen: list[Tensor] = []

        def look(layer: int, seen: Seen) -> None:
            heads = self.plan.retrieval_heads(layer)
            if heads:
                rows = [(head, level) for head in heads for level in self.levels]
                shares = shares_of(rows, heads, self.config)
                chosen.extend(choose_blocks(seen.weights[:, list(heads)], self.config, shares).unbind(1))

        first = [donor[0] for donor, _ in self.pairs]
        more = self.reach, gradient, self.factors, first, look, chosen.__getitem__
        table = measure_options(model, lesson, self.config, *more)
        return table, torch.stack([blocks.sum() for blocks in chosen]) * self.config.block_size

    def best(self, tables: Sequence[Tensor], tokens: Tensor) -> HeadPlan:
        """The plan with the best budgets.

        Args:
            tables: a table for each kind of prompts.
            tokens: float32 `[pairs]`, what each of them reads at a step.
        """
        number, means = len(self.factors), self.context // self.config.chunk_tokens
        tokens = (tokens[:, None] + torch.tensor([means * (factor > 0) for factor in self.factors])).flatten()
        table = in_units_of(self._base, [each.flatten(2) for each in tables])
        allowed = self._allowed().repeat_interleave(number, 1)
        menu = Menu(table, allowed, tokens, self._base, self.coupling)
        return self._plan(menu.best(torch.ones_like(tokens, dtype=torch.bool)))

    @property
    def _base(self) -> Tensor:
        """The choice that is the plan: option `pair * F + factor` of every head."""
        plan, number = self.plan, len(self.factors)
        return torch.tensor(
            [
                self.pairs.index((plan.donors[layer][head], 1.0)) * number
                + self.factors.index(plan.completion_factors(layer)[head])
                for layer, head in self.reach.heads()
            ]
        )

    def _allowed(self) -> Tensor:
        """bool `[H, pairs]`; retrieval heads read what they select themselves."""
        own = set(self.plan.retrieval)
        return torch.tensor(
            [
                [donor == head if head in own else self.reach.allows(donor, head) for donor, _ in self.pairs]
                for head in self.reach.heads()
            ]
        )

    def _plan(self, choice: Tensor) -> HeadPlan:
        width, number = self.reach.num_kv_heads, len(self.factors)
        pairs = [self.pairs[option // number] for option in choice.tolist()]
        factors = [self.factors[option % number] for option in choice.tolist()]
        rows = [slice(i, i + width) for i in range(0, len(pairs), width)]
        donors = [[donor for donor, _ in pairs[row]] for row in rows]
        budgets = self.reach.whole([[level for _, level in pairs[row]] for row in rows], lambda head: 1.0)
        completed = self.reach.whole([factors[row] for row in rows], lambda head: 0.0) if any(self.factors) else None
        return self.reach.plan(donors, budgets=budgets, completion=completed)
