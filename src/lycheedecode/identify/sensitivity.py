"""What a donor costs: a second-order model of KL(full || hybrid), good for any plan, from a few replays.

Let o be the attention outputs of the full model, and o + d those of a plan. At the full model the KL and its gradient
are zero, so KL = 1/2 d' F d to second order, F the Fisher information: the mean of g g' over answers drawn from the
model itself, g the gradient of their log-probability with respect to o. Hence

    KL(plan)  ~  1/2 mean_n (sum over heads h of a[n, h, donor(h)])^2
    a[n, h, d]  = g_n,h . (o_h over d's blocks - o_h)

with one row n for each drawn answer. The table a is measured once; after that every choice of heads and donors
is scored without running the model. No gate is trained, and unlike coverage the table knows which heads matter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..config import HybridConfig
from ..plan import Head
from .donors import Reach
from .replay import Lesson, choose_blocks, full, over_blocks, replay


def measure_sensitivity(
    model: nn.Module, lesson: Lesson, config: HybridConfig, reach: Reach, draws: int, generator: torch.Generator
) -> Tensor:
    """The table `a` of one lesson, float32 `[draws * B, L * Hkv, L * Hkv]`, `[n, head, donor]`.

    Scaled so that half the mean square is KL per answer token; 0 where `reach` forbids the donor.
    """
    gradients = _gradients(model, lesson, draws, generator)  # a layer each, [draws, B, Hkv, G, T, D]
    width, size = reach.num_kv_heads, reach.num_layers * reach.num_kv_heads
    batch = lesson.answer_ids.shape[0]
    table = torch.zeros(draws, batch, size, size, device=lesson.answer_ids.device)
    chosen: list[Tensor] = []

    def attend(layer: int, weights: Tensor, values: Tensor) -> Tensor:
        output = full(layer, weights, values)
        chosen.append(choose_blocks(weights, config))
        rows = slice(layer * width, (layer + 1) * width)
        for earlier, blocks in enumerate(chosen):
            for head in range(width):
                borrowed = blocks[:, head, None].to(weights.device).expand(-1, width, -1, -1)
                change = over_blocks(weights, values, borrowed, config.block_size) - output
                moved = torch.einsum("nbhgtd,bhgtd->nbh", gradients[layer], change)
                table[:, :, rows, earlier * width + head] = moved.to(table.device)
        return output

    with torch.no_grad():
        replay(model, lesson, attend)
    tokens = lesson.mask.sum(-1)
    table *= reach.matrix().to(table.device) / tokens[:, None, None].sqrt()
    return table.flatten(0, 1)


def _gradients(model: nn.Module, lesson: Lesson, draws: int, generator: torch.Generator) -> list[Tensor]:
    """Gradient of the log-probability of drawn answers with respect to every layer's attention output."""
    probes: list[Tensor] = []

    def attend(layer: int, weights: Tensor, values: Tensor) -> Tensor:
        output = full(layer, weights, values)
        probes.append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1]

    with torch.enable_grad():
        states = replay(model, lesson, attend)[lesson.mask]
        log_probabilities = model.get_output_embeddings()(states).float().log_softmax(-1)
    found = []
    for draw in range(draws):
        uniform = torch.rand(log_probabilities.shape, generator=generator).to(log_probabilities.device)
        drawn = (log_probabilities.detach() - (-uniform.log()).log()).argmax(-1)  # the Gumbel trick
        total = log_probabilities.gather(-1, drawn[:, None]).sum()
        found.append(torch.autograd.grad(total, probes, retain_graph=draw + 1 < draws))
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


def in_units(table: Tensor) -> Tensor:
    """A table in units of what every head's own selection costs, so that easy and hard kinds of prompts count alike."""
    own = 0.5 * table.diagonal(dim1=1, dim2=2).sum(-1).square().mean()
    return table / own.clamp(min=1e-8).sqrt()


class Surrogate:
    """Scores donor tables by the second-order model, and finds good ones.

    A donor table is held as int64 `[H]`, an index into `reach.heads()` for each of the `H = L * Hkv` heads.

    Args:
        table: `[n, H, H]` from `measure_sensitivity`, all kinds of prompts together.
        reach: which heads may serve which.
        coupling: share of the products between different heads that is believed. They are noisier than the squares,
            and where the model bends they are not what the second order says.
    """

    def __init__(self, table: Tensor, reach: Reach, coupling: float) -> None:
        self._table, self._reach, self._coupling = table, reach, coupling
        self._heads = reach.heads()
        self._every = torch.arange(len(self._heads), device=table.device)
        self._alone = 0.5 * table.square().mean(0)  # [head, donor]: the cost of every head alone
        self._alone[~reach.matrix().to(table.device)] = float("inf")

    def cost(self, donor: Tensor) -> float:
        """KL of a donor table, in the table's units."""
        together = 0.5 * self._total(donor).square().mean()
        alone = self._alone[self._every, donor].sum()
        return float((1 - self._coupling) * alone + self._coupling * together)

    def assign(self, retrieval: Collection[Head], sweeps: int = 3) -> Tensor:
        """Donors for retrieval heads: the best alone, then each head's best given the others, `sweeps` times."""
        inside = sorted(self._heads.index(head) for head in self._with_always(retrieval))
        kept = set(inside)
        choices = torch.tensor(inside, device=self._table.device)
        donor = choices[self._alone[:, choices].argmin(1)]
        donor[choices] = choices
        total = self._total(donor)
        for _ in range(sweeps if self._coupling else 0):
            before = donor.clone()
            for head in (h for h in range(len(donor)) if h not in kept):
                others = total - self._table[:, head, donor[head]]
                options = self._table[:, head, choices]  # [n, R]
                coupled = others @ options / len(options)
                donor[head] = choices[(self._alone[head, choices] + self._coupling * coupled).argmin()]
                total = others + self._table[:, head, donor[head]]
            if torch.equal(before, donor):
                break
        return donor

    def search(self, number: int, rounds: int = 100) -> list[Head]:
        """A good set of `number` retrieval heads: grown one by one, then exchanged until nothing improves."""
        current = self._with_always(())
        while len(current) < number:
            current.add(self._best_addition(current))
        best = self._score(current)
        for _ in range(rounds):
            larger = current | {self._best_addition(current)}
            score, dropped = min(
                (self._score(larger - {head}), head) for head in sorted(larger - self._with_always(()))
            )
            if score >= best - 1e-6:
                break
            current, best = larger - {dropped}, score
        return sorted(current)

    def as_heads(self, donor: Tensor) -> list[list[Head]]:
        """A donor table as `HeadPlan.from_donors` takes it."""
        flat, width = [self._heads[i] for i in donor.tolist()], self._reach.num_kv_heads
        return [flat[i : i + width] for i in range(0, len(flat), width)]

    def _best_addition(self, current: set[Head], tried: int = 8) -> Head:
        """The head whose addition helps most, among those that help most while nobody else reacts to it."""
        donor = self.assign(current)
        taken = self._table[:, self._every, donor]  # [n, H]
        others = taken.sum(1, keepdim=True) - taken
        coupled = torch.einsum("nh,nhd->hd", others, self._table) / len(others)
        cost = self._alone + self._coupling * coupled
        cost = cost - cost[self._every, donor][:, None]  # of moving each head to each donor
        gain = cost.clamp(max=0).sum(0) - cost.diagonal().clamp(max=0) + cost.diagonal()
        ranked = [self._heads[i] for i in gain.argsort().tolist()]
        outside = [head for head in ranked if head not in current]
        return min((self._score(current | {head}), head) for head in outside[:tried])[1]

    def _score(self, retrieval: Collection[Head]) -> float:
        return self.cost(self.assign(retrieval))

    def _total(self, donor: Tensor) -> Tensor:
        return self._table[:, self._every, donor].sum(1)

    def _with_always(self, retrieval: Collection[Head]) -> set[Head]:
        return set(retrieval) | set(self._reach.always_retrieval)


def join(tables: Sequence[Tensor]) -> Tensor:
    """Tables of several kinds of prompts as one, each in its own units."""
    return torch.cat([in_units(table) for table in tables])
