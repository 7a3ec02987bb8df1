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
    table = torch.zeros(draws, batch, size, size)
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
                table[:, :, rows, earlier * width + head] = moved.cpu()
        return output

    with torch.no_grad():
        replay(model, lesson, attend)
    tokens = lesson.mask.sum(-1).cpu()
    table *= reach.matrix() / tokens[:, None, None].sqrt()
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
        uniform = torch.rand(log_probabilities.shape, generator=generator).to(states.device)
        drawn = (log_probabilities.detach() - (-uniform.log()).log()).argmax(-1)  # the Gumbel trick
        total = log_probabilities.gather(-1, drawn[:, None]).sum()
        found.append(torch.autograd.grad(total, probes, retain_graph=draw + 1 < draws))
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


class Surrogate:
    """Scores plans by the second-order model, and finds good ones.

    Args:
        table: `[n, head, donor]` from `measure_sensitivity`, lessons concatenated and each divided by the square root
            of its unit, if lessons are to count in units.
        reach: which heads may serve which.
        coupling: share of the products between different heads that is believed; they are noisier than the squares.
    """

    def __init__(self, table: Tensor, reach: Reach, coupling: float = 1.0) -> None:
        self._table = table
        self._reach = reach
        self._coupling = coupling
        self._heads = reach.heads()
        self._cost = 0.5 * table.square().mean(0)  # [head, donor], every head alone
        self._cost[~reach.matrix()] = float("inf")

    def donors(self, retrieval: Collection[Head], sweeps: int = 3) -> tuple[list[int], float]:
        """The donor of every head (as an index into `reach.heads()`) and the score, for a set of retrieval heads."""
        inside = sorted(self._heads.index(head) for head in set(retrieval) | set(self._reach.always_retrieval))
        donor = self._cost[:, inside].argmin(1)
        donor = torch.tensor(inside)[donor]
        donor[inside] = torch.tensor(inside)
        return self._descend(donor, inside, sweeps)

    def _descend(self, donor: Tensor, inside: list[int], sweeps: int) -> tuple[list[int], float]:
        """Coordinate descent over donors on the coupled score."""
        every = torch.arange(len(donor))
        total = self._table[:, every, donor].sum(1)
        share = self._coupling
        for _ in range(sweeps if share else 0):
            before = donor.clone()
            for head in (h for h in range(len(donor)) if h not in set(inside)):
                others = total - self._table[:, head, donor[head]]
                options = self._table[:, head, inside]  # [n, R]
                cost = self._cost[head, inside] + share * (others[:, None] * options).mean(0)
                donor[head] = inside[int(cost.argmin())]
                total = others + self._table[:, head, donor[head]]
            if torch.equal(before, donor):
                break
        alone = float(self._cost[every, donor].sum())
        return donor.tolist(), (1 - share) * alone + share * float(0.5 * total.square().mean())

    def table_of(self, donor: Sequence[int]) -> list[list[Head]]:
        """Indices as a donor table."""
        width = self._reach.num_kv_heads
        flat = [self._heads[i] for i in donor]
        return [flat[i : i + width] for i in range(0, len(flat), width)]

    def search(self, number: int, start: Collection[Head] = (), rounds: int = 100) -> list[Head]:
        """A set of `number` retrieval heads: grown greedily from `start`, then exchanged until nothing improves."""
        always = set(self._reach.always_retrieval)
        current = set(start) | always
        while len(current) < number:
            current.add(self._best_addition(current))
        best = self.donors(current)[1]
        for _ in range(rounds):
            larger = current | {self._best_addition(current)}
            score, dropped = min((self.donors(larger - {head})[1], head) for head in sorted(larger - always))
            if score >= best - 1e-9:
                break
            current, best = larger - {dropped}, score
        return sorted(current)

    def _best_addition(self, current: set[Head]) -> Head:
        outside = [head for head in self._heads if head not in current]
        return min((self.donors(current | {head}, sweeps=1)[1], head) for head in outside)[1]
