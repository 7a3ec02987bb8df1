"""Do texts of vLLM leave those of its own attention at near ties only? Both are compared by their log-probabilities.

    stock, in steps       the texts, and at every token what the most probable ones had
    stock, once more      the same tokens in other shapes: one sequence at a time; and as prompts, a token a request
                          -> how far rounding moves the gap between two tokens
    another way           its texts: each may leave stock's where the gap of the two tokens is no wider than that; and
                          until then gaps may not move much further, on average, than stock's own do

The gap of two tokens is the difference of their log-probabilities, that is, of their logits. It is looked at where a
text could leave: where the two best tokens of stock's are closest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from experiments.ranks import RankAnswer, generate
from lycheedecode.engine.prefix import shared_tokens

_PLACES = 32
"""Tokens of each text at which gaps are compared."""
_FURTHER = 3.0
"""So many times as far as stock's own gaps move, on average, those of a way with the same text may move."""
_ENOUGH = 16
"""Places, for an average of how far gaps move to say anything."""
_RESOLUTION = 1e-4
"""Nats: log-probabilities that differ by less are the same to float32, in which they are computed."""


@dataclass(frozen=True)
class StockTexts:
    """Texts of vLLM's own attention, and how far rounding moves them.

    Attributes:
        answers: of each prompt.
        places: of each text, at which tokens gaps are compared.
        moves: how far those gaps moved in each of two other shapes of the same attention.
        alone: `compare` of the texts that stock writes one at a time.
    """

    answers: list[RankAnswer]
    places: list[list[int]]
    moves: tuple[list[float], ...]
    alone: dict[str, Any]

    @classmethod
    def of(cls, llm: Any, prompts: Sequence[Sequence[int]], tokens: int) -> StockTexts:
        """Ask vLLM with its own attention for so many tokens after each prompt."""
        lists = [list(prompt) for prompt in prompts]
        answers = generate(llm, lists, tokens)
        places = [_closest(answer) for answer in answers]
        asked = [(row, at) for row, found in enumerate(places) for at in found]
        again = generate(llm, [[*lists[row], *answers[row].tokens[:at]] for row, at in asked], 1)
        moves = [
            _moved(answers[row].logprobs[at], one.logprobs[0]) for (row, at), one in zip(asked, again, strict=True)
        ]
        truth = cls(answers, places, (moves,), {})
        alone = truth._against([generate(llm, [prompt], tokens)[0] for prompt in lists])
        return cls(answers, places, (moves, alone["moves"]), _shown(alone))

    @property
    def rounding(self) -> float:
        """The furthest that a gap moved."""
        return max(*map(max, self.moves), _RESOLUTION)

    @property
    def typical(self) -> float:
        """How far gaps moved on average, in the shape in which they moved further."""
        return max(map(fmean, self.moves))

    def row(self) -> dict[str, Any]:
        """The row of stock itself: its texts written one at a time, against those of the batch."""
        return {**self.alone, "moved": self.typical, "moved_most": max(map(max, self.moves)), "wrong": []}

    def compare(self, found: Sequence[RankAnswer], lossless: bool) -> dict[str, Any]:
        """How far texts are the same; `lossless`: they have to be, and `wrong` says where they are not.

        Returns:
            `same_tokens`, tokens of each text before one differs; `left`, the texts in which one does, `gaps`, how much
            more probable stock's token is there, in nats, and `own_gaps`, how much less in this way (None: the other
            token is not among the most probable); `moved` and `moved_most`, how far gaps moved up to there, on average
            and at most; `rounding`, what stock's moved at most.
        """
        compared = self._against(found)
        moves, wrong = compared["moves"], []
        if lossless:
            for row, apart in zip(compared["left"], compared["gaps"], strict=True):
                if apart is None or apart > self.rounding:
                    place = f"text {row} leaves stock's at token {compared['same_tokens'][row]}"
                    far = "far" if apart is None else f"{apart:.3g} nats"
                    wrong.append(f"{place}, which is {far} above the other where rounding moves {self.rounding:.3g}")
            if len(moves) >= _ENOUGH and fmean(moves) > max(_FURTHER * self.typical, _RESOLUTION):
                wrong.append(f"gaps move by {fmean(moves):.3g} nats on average, stock's own by {self.typical:.3g}")
        moved = {"moved": fmean(moves) if moves else None, "moved_most": max(moves) if moves else None}
        return {**_shown(compared), **moved, "rounding": self.rounding, "wrong": wrong}

    def _against(self, found: Sequence[RankAnswer]) -> dict[str, Any]:
        compared: dict[str, Any] = {"same_tokens": [], "left": [], "gaps": [], "own_gaps": [], "moves": []}
        for row, (truth, other) in enumerate(zip(self.answers, found, strict=True)):
            at = shared_tokens(truth.tokens, other.tokens)
            compared["same_tokens"].append(at)
            compared["moves"] += [
                _moved(truth.logprobs[place], other.logprobs[place]) for place in self.places[row] if place <= at
            ]
            if at < len(truth.tokens):
                pair = truth.tokens[at], other.tokens[at]
                compared["left"].append(row)
                compared["gaps"].append(_known_gap(truth.logprobs[at], *pair))
                compared["own_gaps"].append(_known_gap(other.logprobs[at], *reversed(pair)))
        return compared


def _shown(compared: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in compared.items() if name != "moves"}


def _closest(answer: RankAnswer) -> list[int]:
    """The places at which the two best tokens are closest."""
    gaps = [_gap(step, *_best(step)) for step in answer.logprobs]
    return sorted(sorted(range(len(gaps)), key=gaps.__getitem__)[:_PLACES])


def _best(step: Mapping[int, float]) -> tuple[int, int]:
    first, second = sorted(step, key=step.__getitem__, reverse=True)[:2]
    return first, second


def _moved(step: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The least by which the gap between a step's two best tokens differs elsewhere."""
    best = _best(step)
    return abs(_gap(step, *best) - _gap(other, *best))


def _gap(step: Mapping[int, float], one: int, other: int) -> float:
    """How much more probable one token is than the other, in nats; those that are not among the most count as least."""
    least = min(step.values())
    return step.get(one, least) - step.get(other, least)


def _known_gap(step: Mapping[int, float], one: int, other: int) -> float | None:
    return _gap(step, one, other) if one in step and other in step else None


def said(row: Mapping[str, Any]) -> Iterator[str]:
    """A compared row, as parts of a line."""
    same, alone = row["same_tokens"], "one text at a time, " if row["way"] == "stock" else ""
    yield f"{alone}the first {min(same)} to {max(same)} of {row['tokens']} tokens are stock's"
    if row["gaps"]:
        apart = ("far" if None in row["gaps"] else f"up to {max(row['gaps']):.2g} nats") + " apart"
        yield f"{len(row['gaps'])} texts leave it where tokens are {apart}"
    if row["moved"] is not None:
        yield f"gaps move by {row['moved']:.2g} on average, {row['moved_most']:.2g} at most"
    yield from (f"WRONG: {one}" for one in row["wrong"])
