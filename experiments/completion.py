"""What should stand for the tokens that a head leaves unread?

    python -m experiments.completion --model DIR --json docs/results/completion.json

Every head selects for itself. Over one dense prefill (`identify.replay`) each summary of what is unread is put to the
test in all layers, or from one layer on: the KL of the answer tokens after the first WINDOW. And layer by layer, how
near summaries come to what the unread tokens say: their share of the attention, and their output.

A chunk's summary is one token, with a key, a value and a weight:

    means         mean key, mean value, number of unread tokens: what the engine has
    recent        means weighted by what the latest queries gave to tokens that they did not select; e to the entropy of
                  these weights, as sum exp(l) >= exp(sum w l + entropy(w)), and equal where w is the softmax of l
    recent value  mean keys and numbers as in `means`, values as in `recent`
    rotated       the mean of keys before rotation, rotated to the chunk's middle
    exact mass    mean values, and the weight that the chunk's unread tokens really have
    true value    the weight of `means`, and the output that the unread tokens really have
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from experiments.figures import Figures
from lycheedecode.config import HybridConfig
from lycheedecode.identify import Cell
from lycheedecode.identify.replay import Drawn, Parts, Seen, TeacherBatch, choose_blocks, full, prepare, replay, weigh
from lycheedecode.models.load import DEFAULT_MODEL, load_model
from lycheedecode.models.shape import ModelShape
from lycheedecode.prompts.makers import makers_for
from lycheedecode.results import Result

WINDOW = 8
"""Latest queries that `recent` asks; answers are judged after so many tokens."""


@dataclass(frozen=True)
class Layer:
    """What one layer sees and reads; `C` full chunks of `chunk` tokens.

    Attributes:
        seen: as in `replay`.
        read: bool `[B, Hkv, T, S]`, the tokens that are read.
        unread: of the full chunks, `[B, Hkv, T, C, chunk]`, those that are not.
        rotation: cosines and sines of all positions, `[S, D]` each.
    """

    seen: Seen
    read: Tensor
    unread: Tensor
    rotation: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, seen: Seen, config: HybridConfig, rotation: tuple[Tensor, Tensor]) -> Layer:
        """A layer in which every head has its own selection."""
        steps, slots = seen.weights.shape[3:]
        chunk, size = config.chunk_tokens, config.block_size
        read = choose_blocks(seen.weights, config)[..., None].expand(-1, -1, -1, -1, size).flatten(-2)[..., :slots]
        before = torch.arange(slots - steps, slots, device=read.device)
        chunks = torch.arange(slots // chunk, device=read.device)
        full_chunks = chunks < before[:, None] // chunk  # as the engine has it: a chunk counts once it is complete
        unread = ~read[..., : len(chunks) * chunk].unflatten(-1, (-1, chunk)) & full_chunks[..., None]
        return cls(seen, read, unread, rotation)

    def chunks(self, tokens: Tensor) -> Tensor:
        """`[B, Hkv, S, D]` -> float32 `[B, Hkv, C, chunk, D]`."""
        count, chunk = self.unread.shape[-2:]
        return tokens[:, :, : count * chunk].float().unflatten(2, (count, chunk))

    @property
    def exact(self) -> Tensor:
        """Weights of the unread tokens, `[B, Hkv, G, T, C, chunk]`."""
        count, chunk = self.unread.shape[-2:]
        return self.seen.weights[..., : count * chunk].unflatten(-1, (count, chunk)) * self.unread[:, :, None]

    def weights(self, keys: Tensor) -> Tensor:
        """What tokens with these keys, `[B, Hkv, C, D]`, weigh in units of the others, `[B, Hkv, G, T, C]`."""
        logits = (self.seen.query.float() @ keys.mT).unflatten(2, self.seen.weights.shape[2:4])
        return (logits - self.seen.log_sum).exp()

    def parts(self, weights: Tensor, values: Tensor) -> Parts:
        """What is read, and chunks of these weights `[B, Hkv, G, T, C]` and values `[B, Hkv, C, D]`."""
        kept = self.seen.weights * self.read[:, :, None]
        return Parts(
            weigh(kept, self.seen.values), kept.sum(-1, keepdim=True),
            weigh(weights, values), weights.sum(-1, keepdim=True),
        )  # fmt: skip


def means(layer: Layer) -> Parts:
    """See above."""
    return layer.parts(_masses(layer), layer.chunks(layer.seen.values).mean(3))


def _masses(layer: Layer) -> Tensor:
    return layer.weights(layer.chunks(layer.seen.keys).mean(3)) * layer.unread.sum(-1)[:, :, None]


def rotated(layer: Layer) -> Parts:
    """See above."""
    cosine, sine = layer.rotation
    keys, count = layer.seen.keys.float(), layer.unread.shape[3]
    middle = torch.arange(count, device=keys.device) * layer.unread.shape[4] + layer.unread.shape[4] // 2
    plain = layer.chunks(keys * cosine - rotate_half(keys) * sine).mean(3)
    weights = layer.weights(plain * cosine[middle] + rotate_half(plain) * sine[middle])
    return layer.parts(weights * layer.unread.sum(-1)[:, :, None], layer.chunks(layer.seen.values).mean(3))


def _recent_weights(layer: Layer) -> tuple[Tensor, Tensor]:
    """What the first WINDOW queries gave each chunk's tokens, `[B, Hkv, C, chunk]`, and which none has selected; none
    of a chunk that they gave nothing that float32 can hold."""
    free = layer.unread[:, :, :WINDOW].all(2)
    weights = layer.exact[:, :, :, :WINDOW].mean((2, 3)) * free
    total = weights.sum(-1, keepdim=True)
    some = total > 1e-30
    return (weights / total).where(some, 0.0), free & some


def recent(layer: Layer) -> Parts:
    """See above."""
    weights, free = _recent_weights(layer)
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    keys, values = (
        (weights[..., None] * layer.chunks(tokens)).sum(3) for tokens in (layer.seen.keys, layer.seen.values)
    )
    # Of a chunk that is read in part later on, less is unread.
    share = (layer.unread & free[:, :, None]).sum(-1) / free.sum(-1).clamp(min=1)[:, :, None]
    masses = layer.weights(keys) * entropy.exp()[:, :, None, None] * share[:, :, None]
    return layer.parts(masses.where(share[:, :, None] > 0, 0.0), values)  # a key of zeros may weigh infinitely much


def recent_value(layer: Layer) -> Parts:
    """See above."""
    values = (_recent_weights(layer)[0][..., None] * layer.chunks(layer.seen.values)).sum(3)
    return layer.parts(_masses(layer), values)


def exact_mass(layer: Layer) -> Parts:
    """See above."""
    return layer.parts(layer.exact.sum(-1), layer.chunks(layer.seen.values).mean(3))


def true_value(layer: Layer) -> Parts:
    """See above."""
    parts, exact = means(layer), layer.exact.flatten(-2)
    _, unread_mass = _unread(parts)
    output = weigh(exact, layer.seen.values[:, :, : exact.shape[-1]]) / exact.sum(-1, keepdim=True).clamp(min=1e-30)
    return Parts(parts.read, parts.read_mass, output * unread_mass, unread_mass)


SUMMARIES: dict[str, Callable[[Layer], Parts]] = {
    "means": means, "recent": recent, "recent value": recent_value, "rotated": rotated,
    "exact mass": exact_mass, "true value": true_value,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A summary, what it is multiplied by, and the layer from which on it is used."""

    summary: str
    factor: float = 1.0
    since: int = 0

    def __str__(self) -> str:
        if not self.factor:
            return "nothing"
        parts = [f"x {self.factor}"] * (self.factor != 1) + [f"from layer {self.since}"] * bool(self.since)
        return ", ".join([self.summary, *parts])


def trials(layers: int) -> list[Trial]:
    """What is compared in a model of so many layers."""
    found = [Trial("means", 0.0)]
    for summary in SUMMARIES:
        found += [Trial(summary), Trial(summary, 0.5), Trial(summary, since=max(layers // 5, 1))]
    return found


class Trials:
    """One model: its figures by kind of prompt and student, and by layer."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: HybridConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.figures: dict[tuple[str, str], Figures] = {}
        self.layers: dict[tuple[str, int], list[Tensor]] = {}

    @torch.no_grad()
    def add(self, name: str, lesson: TeacherBatch, compared: Sequence[Trial]) -> None:
        """Judge a batch of prompts of the kind `name`."""
        head, mask = self.model.get_output_embeddings(), lesson.mask.clone()
        mask[:, :WINDOW] = False
        expected, rotation = head(lesson.teacher).float(), self._rotation(lesson)

        def measured(layer: int, seen: Seen) -> Tensor:
            self._measure((name, layer), Layer.of(seen, self.config, rotation))
            return full(layer, seen)

        replay(self.model, lesson, measured)
        for student in compared:

            def attend(layer: int, seen: Seen, student: Trial = student) -> Tensor:
                parts = SUMMARIES[student.summary](Layer.of(seen, self.config, rotation))
                return parts.output(student.factor if layer >= student.since else 0.0)

            found = head(replay(self.model, lesson, attend)).float()
            self.figures.setdefault((name, str(student)), Figures()).add(expected, found, mask, 0.7)

    def rows(self) -> list[dict[str, Any]]:
        """KL of every student, and of every layer what its summaries are worth."""
        found = [{"cell": cell, "student": student, **each.to_dict()} for (cell, student), each in self.figures.items()]
        for (cell, layer), each in self.layers.items():
            values = torch.stack(each).mean(0).tolist()
            found.append({"cell": cell, "layer": layer, **dict(zip(_OF_A_LAYER, values, strict=True))})
        return found

    def _rotation(self, lesson: TeacherBatch) -> tuple[Tensor, Tensor]:
        positions = torch.arange(lesson.prompt_length + lesson.answer_ids.shape[1], device=lesson.answer_ids.device)
        like = lesson.teacher.new_zeros(1, dtype=torch.float32)
        cosine, sine = self.model.base_model.rotary_emb(like, positions[None])
        return cosine[0], sine[0]

    def _measure(self, where: tuple[str, int], layer: Layer) -> None:
        nothing, output = true_value(layer), full(where[1], layer.seen)
        true, read, mass = _unread(nothing)[0], nothing.output(), layer.exact.sum((-2, -1))
        figures = [mass.mean(), _cosine(true, read), _error(read, output)]
        for summary in (means, recent):
            parts = summary(layer)
            found, unread_mass = _unread(parts)
            share = unread_mass / (unread_mass + parts.read_mass)
            figures += [share.mean(), _cosine(true, found), _error(parts.output(1.0), output)]
        self.layers.setdefault(where, []).append(torch.stack(figures).cpu())


_OF_A_LAYER = (
    "unread_mass", "cosine_of_read", "error_of_nothing",
    "mass_of_means", "cosine_of_means", "error_of_means", "mass_of_recent", "cosine_of_recent", "error_of_recent",
)  # fmt: skip
"""Share of the attention that is unread, and by a summary's word; cosine of the unread tokens' output and that of the
read ones, or a summary's; squared error of the heads' output over its square."""


def _unread(parts: Parts) -> tuple[Tensor, Tensor]:
    """Weighted sum and weight of the tokens that are not read, which every summary has."""
    assert parts.unread is not None
    assert parts.unread_mass is not None
    return parts.unread, parts.unread_mass


def _cosine(one: Tensor, two: Tensor) -> Tensor:
    return F.cosine_similarity(one, two, dim=-1).mean()


def _error(found: Tensor, output: Tensor) -> Tensor:
    return (found - output).square().sum() / output.square().sum()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL)
    add("--dtype", default="auto", help="of its weights")
    add("--json", type=Path, required=True)
    add("--cells", nargs="+", default=["code:6000:continuation:64", "prose:6000:continuation:64"])
    add("--prompts", type=int, default=12, help="of each kind")
    add("--budget-tokens", type=int, default=512)
    add("--block-size", type=int, default=16)
    add("--prefill-chunk", type=int, default=32768)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    config = HybridConfig(budget_tokens=options.budget_tokens, block_size=options.block_size)
    study, compared = Trials(model, tokenizer, config), trials(ModelShape.of(model).num_layers)
    settings = {**vars(options), "json": None, "model": Path(options.model).name, "window": WINDOW}
    cells = [Cell.parse(cell) for cell in options.cells]
    drawn = {
        cell: cell.make(makers_for(tokenizer, [cell], "evaluate"), options.prompts, random.Random(f"completion/{cell}"))
        for cell in cells
    }
    for number in range(options.prompts):  # cut short, there are as many of each kind
        for cell in cells:
            answer = Drawn(cell.count, 0.7, number)
            study.add(str(cell), prepare(model, [drawn[cell][number]], options.prefill_chunk, answer), compared)
        Result("completion", settings, rows=study.rows()).save(options.json)
    for row in study.rows():
        if "student" in row:
            print(f"{row['cell']}  {row['student']:30}  {row['kl_mean']:.5f} +- {row['kl_error']:.5f}")


if __name__ == "__main__":
    main()
