"""What a donor costs: a second-order model of KL(full || hybrid), good for any plan, from a few replays.

Let o be the attention outputs of the full model, and o + d those of a plan. At the full model the KL and its gradient
are zero, so KL = 1/2 d' F d to second order, F the Fisher information: the mean of g g' over answers drawn from the
model itself, g the gradient of their log-probability with respect to o. Hence

    KL(plan)  ~  1/2 mean_n (sum over heads h of a[n, h, option(h)])^2
    a[n, h, (d, f)]  = g_n,h . (o_h over d's blocks, completed with factor f, - o_h)

with one row n for each drawn answer. An option of a head is a donor and a factor on what its donor leaves unread. The
table a is measured once; after that every choice of heads, donors and factors is scored without running the model. No
gate is trained, and unlike coverage the table knows which heads matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import HybridConfig
from ..plan import Head, HeadPlan
from .donors import Reach
from .replay import Parts, Seen, TeacherBatch, choose_blocks, full, in_parts, replay


def measure_sensitivity(
    model: PreTrainedModel,
    lesson: TeacherBatch,
    configs: Sequence[HybridConfig],
    reach: Reach,
    draws: int,
    generator: torch.Generator,
    factors: Sequence[float] = (0.0,),
) -> Tensor:
    """The tables `a` of one lesson, float32 `[configs, draws * B, H, H, F]`, each `[n, head, donor, factor]`.

    Scaled so that half the mean square is KL per answer token; 0 where `reach` forbids the donor.
    """
    gradient = gradients(model, lesson, draws, generator)
    return torch.stack([measure_changes(model, lesson, config, reach, gradient, factors) for config in configs])


def measure_changes(
    model: PreTrainedModel,
    lesson: TeacherBatch,
    config: HybridConfig,
    reach: Reach,
    gradient: Mapping[int, Tensor],
    factors: Sequence[float],
) -> Tensor:
    """The table of one config for given `gradients`."""
    heads, chosen = reach.heads(), dict[int, Tensor]()

    def look(layer: int, seen: Seen) -> None:
        chosen[layer] = choose_blocks(seen.weights, config)

    def blocks(option: int) -> Tensor:
        layer, head = heads[option]
        return chosen[layer][:, head]

    first_layers = [layer for layer, _ in heads]
    table = measure_options(model, lesson, config, reach, gradient, factors, first_layers, look, blocks)
    return table * reach.matrix().to(table.device)[..., None]


@torch.no_grad()
def measure_options(
    model: PreTrainedModel,
    lesson: TeacherBatch,
    config: HybridConfig,
    reach: Reach,
    gradient: Mapping[int, Tensor],
    factors: Sequence[float],
    first_layers: Sequence[int],
    look: Callable[[int, Seen], None],
    blocks: Callable[[int], Tensor],
) -> Tensor:
    """A table over any options of what is read, float32 `[draws * B, H, O, F]`, scaled as that of `measure`.

    Args:
        model, lesson, config, reach, gradient, factors: as in `measure_changes`.
        first_layers: of each of the `O` options, the layer from which on heads may have it.
        look: called with every layer and what it sees, before options are looked at there.
        blocks: what an option reads, bool `[B, T, N]`.
    """
    draws, batch = next(iter(gradient.values())).shape[:2]
    width, shape = reach.num_kv_heads, (len(reach.heads()), len(first_layers), len(factors))
    table = torch.zeros(draws, batch, *shape, device=lesson.answer_ids.device)

    def attend(layer: int, seen: Seen) -> Tensor:
        output, means = full(layer, seen), seen.means(config.chunk_tokens) if any(factors) else None
        look(layer, seen)
        for i, first in enumerate(first_layers):
            if first <= layer:
                read = blocks(i).to(seen.weights.device)[:, None].expand(-1, width, -1, -1)
                parts = in_parts(seen, read, config.block_size, config.chunk_tokens, means)
                moved = along_gradient(gradient[layer], parts, output, factors)
                table[:, :, reach.rows(layer), i] = moved.to(table.device)
        return output

    replay(model, lesson, attend)
    return (table * (1 / lesson.mask.sum(-1).sqrt())[:, None, None, None]).flatten(0, 1)


def along_gradient(gradient: Tensor, parts: Parts, output: Tensor, factors: Sequence[float]) -> Tensor:
    """`g . (output of the parts - output)` for every factor, `[draws, B, Hkv, F]`."""

    def along(vectors: Tensor) -> Tensor:
        return torch.einsum("nbhgtd,bhgtd->nbhgt", gradient, vectors)

    before, read, mass = along(output), along(parts.read), parts.read_mass[..., 0]
    if parts.unread is None or parts.unread_mass is None:
        change = (read / mass - before).sum((-2, -1))
        return change[..., None].expand(*change.shape, len(factors))
    unread, more = along(parts.unread), parts.unread_mass[..., 0]
    each = [((read + factor * unread) / (mass + factor * more) - before).sum((-2, -1)) for factor in factors]
    return torch.stack(each, -1)


def gradients(
    model: PreTrainedModel, lesson: TeacherBatch, draws: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """Gradient of the log-probability of drawn answers with respect to every global layer's attention output,
    `[draws, B, Hkv, G, T, D]`."""
    probes: dict[int, Tensor] = {}

    def attend(layer: int, seen: Seen) -> Tensor:
        output = full(layer, seen)
        probes[layer] = torch.zeros_like(output, requires_grad=True)
        return output + probes[layer]

    with torch.enable_grad():
        states = replay(model, lesson, attend)[lesson.mask]
        log_probabilities = model.get_output_embeddings()(states).float().log_softmax(-1)
    found = []
    upto = log_probabilities.detach().double().exp().cumsum(-1)
    for draw in range(draws):
        uniform = torch.rand(len(upto), 1, generator=generator, dtype=torch.float64).to(upto.device)
        drawn = torch.searchsorted(upto, uniform * upto[:, -1:]).clamp(max=upto.shape[-1] - 1)
        total = log_probabilities.gather(-1, drawn).sum()
        found.append(torch.autograd.grad(total, list(probes.values()), retain_graph=draw + 1 < draws))
    return {layer: torch.stack(each) for layer, each in zip(probes, zip(*found, strict=True), strict=True)}


def in_units(table: Tensor) -> Tensor:
    """A table in units of what every head's own selection costs with the first factor, so that easy and hard kinds of
    prompts count alike."""
    return table / _own_cost(table).clamp(min=1e-8).sqrt()


def _own_cost(table: Tensor) -> Tensor:
    return 0.5 * table[..., 0].diagonal(dim1=1, dim2=2).sum(-1).square().mean()


class Surrogate:
    """Scores plans by the second-order model, and finds good ones.

    A choice is held as int64 `[H]`: for every head an option, `donor * F + factor` with indices into `reach.heads()`
    and `factors`.

    Args:
        table: `[n, H, H, F]` from `measure_sensitivity`, all kinds of prompts together.
        reach: which heads may serve which.
        coupling: share of the products between different heads that is believed. They are noisier than the squares,
            and where the model bends they are not what the second order says.
        factors: what the last dimension is about.
    """

    def __init__(self, table: Tensor, reach: Reach, coupling: float, factors: Sequence[float] = (0.0,)) -> None:
        self._factors, self._reach, self._coupling = tuple(factors), reach, coupling
        self._table = table.flatten(2)  # [n, H, options]
        self._heads = reach.heads()
        self._every = torch.arange(len(self._heads), device=table.device)
        self._alone = 0.5 * self._table.square().mean(0)  # [head, option]: the cost of every head alone
        forbidden = ~reach.matrix().to(table.device)
        self._alone[forbidden.repeat_interleave(len(self._factors), 1)] = float("inf")

    def cost(self, choice: Tensor) -> float:
        """KL of a choice, in the table's units."""
        together = 0.5 * self._total(choice).square().mean()
        alone = self._alone[self._every, choice].sum()
        return float((1 - self._coupling) * alone + self._coupling * together)

    def own(self) -> Tensor:
        """The choice in which every head retrieves for itself, with the first factor."""
        return self._every * len(self._factors)

    def assign(self, retrieval: Collection[Head], sweeps: int = 3) -> Tensor:
        """Options for retrieval heads: the best alone, then each head's best given the others, `sweeps` times."""
        inside = sorted(self._heads.index(head) for head in self._completed(retrieval))
        kept, number = set(inside), len(self._factors)
        steps = torch.arange(number, device=self._table.device)
        every = (torch.tensor(inside, device=self._table.device)[:, None] * number + steps).flatten()
        options = [head * number + steps if head in kept else every for head in range(len(self._heads))]
        choice = torch.stack([open_[self._alone[head, open_].argmin()] for head, open_ in enumerate(options)])
        total = self._total(choice)
        for _ in range(sweeps if self._coupling else 0):
            before = choice.clone()
            for head, open_ in enumerate(options):
                if len(open_) == 1:
                    continue
                others = total - self._table[:, head, choice[head]]
                coupled = others @ self._table[:, head, open_] / len(others)
                choice[head] = open_[(self._alone[head, open_] + self._coupling * coupled).argmin()]
                total = others + self._table[:, head, choice[head]]
            if torch.equal(before, choice):
                break
        return choice

    def search(self, number: int, rounds: int = 100) -> list[Head]:
        """A good set of `number` retrieval heads: grown one by one, then exchanged until nothing improves.

        Heads of the first layer may serve each other, so not all of them need to stay.
        """
        current = self._completed(())
        while len(current) < number:
            current.add(self._best_addition(current))
        best = self._score(current)
        for _ in range(rounds):
            larger = current | {self._best_addition(current)} if len(current) < len(self._heads) else current
            smaller = [larger - {head} for head in sorted(larger) if self._reach.serves_all(larger - {head})]
            score, kept = min(((self._score(heads), heads) for heads in smaller), key=lambda pair: pair[0])
            if len(larger) == len(current) or score >= best - 1e-6:
                break
            current, best = kept, score
        return sorted(current)

    def plan(self, choice: Tensor) -> HeadPlan:
        """A choice as a plan; its heads are completed where a factor other than 0 was to be had."""
        width, number = self._reach.num_kv_heads, len(self._factors)
        donors = [self._heads[option // number] for option in choice.tolist()]
        factors = [self._factors[option % number] for option in choice.tolist()]
        rows = range(0, len(donors), width)
        table = [donors[i : i + width] for i in rows]
        if not any(self._factors):
            return self._reach.plan(table)
        completion = self._reach.whole([factors[i : i + width] for i in rows], lambda head: 0.0)
        return self._reach.plan(table, completion=completion)

    def _best_addition(self, current: set[Head], tried: int = 8) -> Head:
        """The head whose addition helps most, among those that help most while no other head changes its donor."""
        choice = self.assign(current)
        taken = self._table[:, self._every, choice]  # [n, H]
        others = taken.sum(1, keepdim=True) - taken
        coupled = torch.einsum("nh,nho->ho", others, self._table) / len(others)
        cost = self._alone + self._coupling * coupled
        cost = cost - cost[self._every, choice][:, None]  # of moving each head to each option
        cost = cost.unflatten(1, (-1, len(self._factors))).amin(-1)  # [head, donor]
        gain = cost.clamp(max=0).sum(0) - cost.diagonal().clamp(max=0) + cost.diagonal()
        ranked = [self._heads[i] for i in gain.argsort().tolist()]
        outside = [head for head in ranked if head not in current]
        return min((self._score(current | {head}), head) for head in outside[:tried])[1]

    def _score(self, retrieval: Collection[Head]) -> float:
        return self.cost(self.assign(retrieval))

    def _total(self, choice: Tensor) -> Tensor:
        return self._table[:, self._every, choice].sum(1)

    def _completed(self, retrieval: Collection[Head]) -> set[Head]:
        """These heads, and those that always retrieve where somebody would have no donor."""
        heads = set(retrieval)
        return heads if heads and self._reach.serves_all(heads) else heads | set(self._reach.always_retrieval)


def join(tables: Sequence[Tensor]) -> Tensor:
    """Tables of several kinds of prompts and budgets as one, each in its own units.

    Where the budget holds nearly all that is asked for, a table says what rounding does: it is left out, unless all are
    like that.
    """
    told = [table for table in tables if float(_own_cost(table)) > _ROUNDING] or tables
    return torch.cat([in_units(table) for table in told])


def in_units_of(choice: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The same for tables `[n, H, options]`, in units of what a choice, int64 `[H]`, costs."""
    every = torch.arange(len(choice))
    costs = [0.5 * table[:, every, choice].sum(1).square().mean() for table in tables]
    pairs = list(zip(tables, costs, strict=True))
    told = [(table, cost) for table, cost in pairs if float(cost) > _ROUNDING] or pairs
    return torch.cat([table / cost.clamp(min=1e-8).sqrt() for table, cost in told])


_ROUNDING = 1e-6
"""KL in nats that 16-bit arithmetic alone causes."""
