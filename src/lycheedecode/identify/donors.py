"""Which donor suits which head: measured on the full model, then read off for any choice of retrieval heads.

Heads are those of the global layers, counted layer by layer; `H` of them. Where other layers lie between (sliding
windows, linear attention), their heads are left out, and in a plan they are their own donors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HybridConfig
from ..errors import ConfigError
from ..models.shape import ModelShape
from ..plan import Head, HeadPlan
from .replay import Seen, TeacherBatch, choose_blocks, full, replay


@dataclass(frozen=True)
class Reach:
    """Which heads may serve which: a donor of the same or an earlier layer, on the same device.

    Attributes:
        num_layers, num_kv_heads: shape of the model.
        same_layer: whether a retrieval head may serve its own layer's heads (needs selection before attention).
        shards: tensor-parallel ranks; each holds a contiguous range of KV heads and donors stay inside it.
        stages: pipeline stages of equal depth; donors stay inside.
        layers: those with full attention; none given: all.
    """

    num_layers: int
    num_kv_heads: int
    same_layer: bool = True
    shards: int = 1
    stages: int = 1
    layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: ModelShape, **limits: Any) -> Reach:
        """Among a model's global layers; `limits` are the other attributes."""
        return cls(shape.num_layers, shape.num_kv_heads, layers=shape.global_layers, **limits)

    def __post_init__(self) -> None:
        if self.shards < 1 or self.num_kv_heads % self.shards:
            raise ConfigError(f"{self.num_kv_heads} KV heads cannot be divided evenly over {self.shards} shards.")
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(self.num_layers)))
        if not 1 <= self.stages <= self.num_layers:
            raise ConfigError(f"{self.num_layers} layers cannot be divided into {self.stages} pipeline stages.")

    @property
    def always_retrieval(self) -> tuple[Head, ...]:
        """Heads that no earlier layer can serve: those of each stage's first layer."""
        stages = [self._stage(layer) for layer in self.layers]
        first = [self.layers[stages.index(stage)] for stage in sorted(set(stages))]
        return tuple((layer, head) for layer in first for head in range(self.num_kv_heads))

    def serves_all(self, retrieval: Collection[Head]) -> bool:
        """Whether every head has a donor among these."""
        return all(any(self.allows(donor, head) for donor in retrieval) for head in self.heads())

    @cached_property
    def _place(self) -> dict[int, int]:
        return {layer: place for place, layer in enumerate(self.layers)}

    def rows(self, layer: int) -> slice:
        """The heads of a layer among all."""
        first = self._place[layer] * self.num_kv_heads
        return slice(first, first + self.num_kv_heads)

    def whole(self, table: Sequence[Sequence[Any]], other: Callable[[Head], Any]) -> list[list[Any]]:
        """A table with a row for each global layer as one for all layers; `other` fills the rows between."""
        width = self.num_kv_heads
        return [
            list(table[self._place[layer]]) if layer in self._place else [other((layer, head)) for head in range(width)]
            for layer in range(self.num_layers)
        ]

    def plan(self, donors: Sequence[Sequence[Head]], **details: Any) -> HeadPlan:
        """The plan of a donor table with a row for each global layer."""
        return HeadPlan.from_donors(self.whole(donors, lambda head: head), **details)

    def allows(self, donor: Head, head: Head) -> bool:
        """Whether `donor` may serve `head`."""
        size = self.num_kv_heads // self.shards
        before = donor[0] < head[0] or (self.same_layer and donor[0] == head[0]) or donor == head
        return before and donor[1] // size == head[1] // size and self._stage(donor[0]) == self._stage(head[0])

    def matrix(self) -> Tensor:
        """bool `[H, H]`: `[head, donor]`."""
        heads = self.heads()
        return torch.tensor([[self.allows(donor, head) for donor in heads] for head in heads])

    def heads(self) -> list[Head]:
        """The heads of the global layers, layer by layer."""
        return [(layer, head) for layer in self.layers for head in range(self.num_kv_heads)]

    def _stage(self, layer: int) -> int:
        return layer * self.stages // self.num_layers


@torch.no_grad()
def measure_coverage(model: nn.Module, lessons: Iterable[TeacherBatch], config: HybridConfig, reach: Reach) -> Tensor:
    """How well each head's selection would serve every other head.

    Returns:
        float32 `[H, H]`: the share of `head`'s attention mass inside the blocks that `donor` would select for itself,
        averaged over answer tokens, `[head, donor]`; 0 for donors of later layers.
    """
    parts = [covered_mass(model, lesson, config, reach) for lesson in lessons]
    return (torch.stack([mass for mass, _ in parts]).sum(0) / sum(tokens for _, tokens in parts)).float()


@torch.no_grad()
def covered_mass(model: nn.Module, lesson: TeacherBatch, config: HybridConfig, reach: Reach) -> tuple[Tensor, int]:
    """Covered attention mass `[head, donor]`, summed over the answer tokens of one lesson, and how many they are."""
    size = len(reach.heads())
    total = torch.zeros(size, size, dtype=torch.float64)
    chosen: dict[int, Tensor] = {}

    def attend(layer: int, seen: Seen) -> Tensor:
        weights = seen.weights
        chosen[layer] = choose_blocks(weights, config)
        padded = F.pad(weights, (0, -weights.shape[-1] % config.block_size))
        mass = padded.unflatten(-1, (-1, config.block_size)).sum(-1).mean(2)  # [B, Hkv, T, N]
        mass = mass * lesson.mask.to(mass.device)[:, None, :, None]
        for earlier, blocks in chosen.items():
            covered = torch.einsum("bhtn,bdtn->hd", mass, blocks.to(mass.device, mass.dtype)).double().cpu()
            total[reach.rows(layer), reach.rows(earlier)] = covered
        return full(layer, seen)

    replay(model, lesson, attend)
    return total, int(lesson.mask.sum())


def assign_donors(retrieval: Collection[Head], coverage: Tensor, reach: Reach) -> list[list[Head]]:
    """The donor table, a row for each global layer, in which every sparse head has the retrieval head that covers it
    best.

    Args:
        retrieval: the retrieval heads; those of `reach.always_retrieval` are added.
        coverage: from `measure_coverage`.
        reach: which heads may serve which.
    """
    heads, allowed = reach.heads(), reach.matrix()
    chosen = sorted(heads.index(head) for head in set(retrieval) | set(reach.always_retrieval))
    within = coverage.masked_fill(~allowed, -1.0)[:, chosen]
    donors = [heads[chosen[i]] for i in within.argmax(1).tolist()]
    for i in chosen:
        donors[i] = heads[i]
    return [donors[i : i + reach.num_kv_heads] for i in range(0, len(donors), reach.num_kv_heads)]


def choose_by_coverage(coverage: Tensor, reach: Reach, number: int) -> list[Head]:
    """Greedy choice of retrieval heads: each time the head that raises the mean coverage of all heads most."""
    heads = reach.heads()
    served = torch.where(reach.matrix(), coverage, 0.0)
    chosen = [heads.index(head) for head in reach.always_retrieval]
    while len(chosen) < number:
        best = served[:, chosen].amax(1, keepdim=True)
        gain = torch.maximum(served, best).sum(0)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
    return sorted(heads[i] for i in chosen)


def remap(plan_heads: Collection[Head], coverage: Tensor, reach: Reach) -> HeadPlan:
    """A plan of these retrieval heads with the best-covering donors."""
    return reach.plan(assign_donors(plan_heads, coverage, reach))
