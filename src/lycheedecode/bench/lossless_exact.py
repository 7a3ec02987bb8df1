"""`bench lossless --parts exact`: are lossless texts full attention's?

    texts        of a ragged batch: greedy, sampled in several ways, ended by stop tokens, stop strings and end tokens
    float32      every token has to be full attention's
    16 bits      a text may leave full attention's where both tokens nearly tie: where full attention itself would write
                 the other token if its logits moved by no more than they do from one shape of pass to another; and on a
                 GPU it has to be, token for token, what full attention writes in the shape of the verifying pass

How far logits move is measured without lossless decoding: decode steps of full attention over the whole answer against
one prefill of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..config import HybridConfig
from ..engine.context import Context
from ..engine.engine import Engine
from ..engine.generation import Generation
from ..engine.prefix import shared_tokens
from ..engine.sampling import Sampler, Sampling
from ..engine.verify import spare_slots
from ..errors import ConfigError, MismatchError
from ..models.load import load_model
from ..plan import HeadPlan, bundled_plan_of
from .harness import show
from .lossless_texts import config_of, forget, prompts_of
from .models import check_positions, plan_for
from .settings import LosslessSettings

_TEMPERATURE = 0.7
_FILTERS: tuple[dict[str, Any], ...] = ({}, {"top_p": 0.9, "min_p": 0.02}, {"top_k": 40})
"""Filters of the samplers; seeds take them in turn."""
_HALVINGS = 20
"""Times that the interval of a near tie is halved."""
_OF_TIES = "sequence", "token", "found", "right", "gap_in_steps", "gap_in_prefill", "within", "rounding"
"""What is said of a tie: where it is; the token found, and the right one; by how much the right logit is higher, in two
shapes of full attention; the least move of logits that makes full attention write the token found; how far apart the
logits of both shapes are."""


@dataclass(frozen=True)
class Case:
    """How texts are drawn, and what ends them."""

    name: str
    sampling: Sampling
    stop: tuple[str | int, ...] = ()
    ignore_eos: bool = True

    def write(self, engine: Engine, context: Context, tokens: int) -> list[Generation]:
        """A text for each prompt."""
        return engine.generate(context, tokens, sampling=self.sampling, stop=self.stop, ignore_eos=self.ignore_eos)


@dataclass(eq=False)
class Truth:
    """What full attention writes after the prompts, and how close other tokens are.

    Attributes:
        full: full attention.
        prompts: token ids.
        context: of the prompts.
        tokens: new ones of each text, at most.
        texts: by case.
    """

    full: Engine
    prompts: list[list[int]]
    context: Context
    tokens: int
    texts: dict[Case, list[Generation]] = field(default_factory=dict)
    _ties: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)

    def write(self, samplings: Mapping[str, Sampling]) -> None:
        """Texts of fixed length; and the last ones again, ended by what they hold."""
        for name, sampling in samplings.items():
            case = Case(name, sampling)
            self.texts[case] = texts = case.write(self.full, self.context, self.tokens)
        found, words = list(dict.fromkeys(texts[0].token_ids)), (texts[-1].text or "").split()
        stop: list[str | int] = [found[len(found) // 2], *sorted(words[len(words) // 2 :], key=len)[-1:]]
        case = Case(f"{name}, with stops", sampling, tuple(stop), ignore_eos=False)
        self.texts[case] = case.write(self.full, self.context, self.tokens)

    def differences(self, case: Case, found: Sequence[Generation]) -> list[dict[str, Any]]:
        """Where texts first differ from full attention's: `sequence`, `token`, and `_OF_TIES` or what is `wrong`."""
        expected, differ = self.texts[case], []
        for sequence, (one, right) in enumerate(zip(found, expected, strict=True)):
            at = shared_tokens(one.token_ids, right.token_ids)
            if at < min(len(one.token_ids), len(right.token_ids)):
                pair = one.token_ids[at], right.token_ids[at]
                differ.append({"sequence": sequence, "token": at, **self._tie(case, sequence, at, *pair)})
            elif (one.token_ids, one.text, one.finish_reason) != (right.token_ids, right.text, right.finish_reason):
                ends = f"{len(one.token_ids)} tokens ({one.finish_reason}), not {len(right.token_ids)}"
                wrong = f"ends after {ends} ({right.finish_reason})"
                differ.append({"sequence": sequence, "token": at, "wrong": wrong})
        return differ

    def _tie(self, case: Case, sequence: int, at: int, found: int, right: int) -> dict[str, Any]:
        key = case, sequence, at, found, right
        if key not in self._ties:  # a text leaves at the same place whatever is drafted
            self._ties[key] = self._measure(*key)
        return self._ties[key]

    def _measure(self, case: Case, sequence: int, at: int, found: int, right: int) -> dict[str, Any]:
        """How far logits have to move until full attention writes the other token, against how far they do move."""
        answer = self.texts[case][sequence].token_ids[:at]
        shapes = {
            "steps": self._steps(case, at)[sequence],
            "prefill": self.full.prefill([[*self.prompts[sequence], *answer]]).logits[0],
        }
        rounding = float((shapes["steps"] - shapes["prefill"]).abs().max())
        sampler, place = Sampler(case.sampling, self.full.device), torch.tensor([sequence], device=self.full.device)

        def writes_it(moved: float) -> bool:
            moves = (logits + moved * way for logits in shapes.values() for way in _ways(logits, found, right))
            return any(int(sampler(logits[None], place, at)) == found for logits in moves)

        gaps = {f"gap_in_{name}": float(logits[right] - logits[found]) for name, logits in shapes.items()}
        tie = {"found": found, "right": right, **gaps, "rounding": rounding}
        if not writes_it(rounding):
            gap = f"{' and '.join(f'{gap:.2e}' for gap in gaps.values())} higher in {' and '.join(shapes)}"
            moves = f"where rounding moves logits by {rounding:.2e}"
            return {**tie, "wrong": f"has {found} for {right}, whose logit is {gap}, {moves}"}
        low, high = 0.0, rounding
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if writes_it(middle) else (middle, high)
        return {**tie, "within": high}

    def _steps(self, case: Case, at: int) -> Tensor:
        """Logits `[B, V]` of full attention's steps before token `at` of its texts, as when it wrote them."""
        rows = [one.token_ids for one in self.texts[case]]
        padded = [[*row[:at], *[0] * (at - len(row))] for row in rows]
        self.context.rewind()
        logits = self.context.logits
        for token_ids in torch.tensor(padded, device=self.full.device).unbind(1) if at else ():
            logits = self.full.decode_one_token(self.context, token_ids)
        self.context.rewind()
        return logits


def _ways(logits: Tensor, found: int, right: int) -> Iterator[Tensor]:
    """Ways, -1 to 1 for each of the logits `[V]`, to move them for one token and against another.

    Those of the other tokens decide whom top-p, top-k and min-p keep: flatter ones let more in, sharper ones fewer.
    """
    for above, below in product((0.0, -1.0, 1.0), repeat=2):
        way = torch.full_like(logits, below).masked_fill_(logits > logits[found], above)
        way[found], way[right] = 1.0, -1.0
        yield way


def check_exact(settings: LosslessSettings, device: str) -> Iterator[dict[str, Any]]:
    """Lossless texts against full attention's, a row for each case; then `MismatchError` if one is not what it should.

    Without a plan, and where none ships, it takes one of spread heads: the text must not depend on it.
    """
    if "hybrid" in settings.ways:
        raise ConfigError("parts=exact compares lossless texts, which hybrid alone does not write: take other ways.")
    model, tokenizer = load_model(settings.model, device=device, dtype=settings.dtype)
    plan = HeadPlan.load(settings.plan) if settings.plan else bundled_plan_of(settings.model) or plan_for(model)
    wrong: list[str] = []
    check_positions(model, max(settings.contexts), settings.tokens)
    for length, batch in product(settings.contexts, settings.batches):
        truth = _truth(Engine(model, tokenizer, execution=settings.execution), settings, length, batch)
        for way in settings.ways:
            shaped = _shaped(truth, way, settings)
            for budget, weights in product(settings.budgets, settings.weights):
                config = config_of(way, budget, settings, 1, weights)
                engine = Engine(model, tokenizer, plan=plan, config=config, execution=settings.execution)
                for case in truth.texts:
                    row: dict[str, Any] = {"budget_tokens": budget, "way": way, "weights": weights, "context": length}
                    row |= _row(truth, case, case.write(engine, truth.context, settings.tokens), shaped.get(case))
                    wrong += row["wrong"]
                    show(format_exact(row))
                    yield row
                forget(truth.context)
    if wrong:
        raise MismatchError(f"{len(wrong)} texts are not what they should be: {wrong[0]}.")


def _truth(full: Engine, settings: LosslessSettings, length: int, batch: int) -> Truth:
    """Prompts of `length` tokens down to about half of that, and what full attention writes."""
    texts = prompts_of(full.tokenizer, settings, length, batch)
    prompts = [ids[i * length // (2 * batch) :] for i, ids in enumerate(texts)]
    spare = max(spare_slots(config_of(way, 1024, settings, 1, "model")) for way in settings.ways)
    truth = Truth(full, prompts, full.prefill(prompts, room=settings.tokens + spare), settings.tokens)
    samplings = {"greedy": Sampling()}
    for i, seed in enumerate(settings.seeds):
        sampling = Sampling(temperature=_TEMPERATURE, seed=seed, **_FILTERS[i % len(_FILTERS)])
        filters = "".join(f", {name} {value}" for name, value in _FILTERS[i % len(_FILTERS)].items())
        samplings[f"temperature {_TEMPERATURE}{filters}, seed {seed}"] = sampling
    truth.write(samplings)
    return truth


def _shaped(truth: Truth, way: str, settings: LosslessSettings) -> dict[Case, list[Generation]]:
    """In 16 bits, full attention's texts in the shape of the pass; `auto` has passes of several shapes, and no such."""
    full = truth.full
    if way == "auto" or next(full.model.parameters()).dtype == torch.float32:
        return {}
    config = HybridConfig(verify_every=int(way))
    engine = Engine(full.model, full.tokenizer, config=config, execution=settings.execution)
    texts = {case: case.write(engine, truth.context, settings.tokens) for case in truth.texts}
    forget(truth.context)
    return texts


def _row(truth: Truth, case: Case, found: Sequence[Generation], shaped: Sequence[Generation] | None) -> dict[str, Any]:
    """What is equal, what ties, and what is wrong."""
    expected, dtype = truth.texts[case], next(truth.full.model.parameters()).dtype
    differences, wrong = truth.differences(case, found), []
    for one in differences:
        place = f"{case.name}: sequence {one['sequence']} at token {one['token']}"
        if "wrong" in one:
            wrong.append(f"{place} {one['wrong']}")
        elif dtype == torch.float32:
            wrong.append(f"{place} leaves full attention's text, at a tie within {one['within']:.1e}")
    in_its_shape = None if shaped is None else [a.token_ids == b.token_ids for a, b in zip(found, shaped, strict=True)]
    if truth.full.device.type == "cuda":  # where a token's result does not depend on its place in a pass
        unlike = [sequence for sequence, equal in enumerate(in_its_shape or ()) if not equal]
        wrong += [f"{case.name}: sequence {one} is not full attention's in the shape of the pass" for one in unlike]
    drafted, accepted = (sum(getattr(one, name) for one in found) for name in ("drafted", "accepted"))
    return {
        "case": case.name,
        "prompts": [len(ids) for ids in truth.prompts],
        "tokens": [len(one.token_ids) for one in expected],
        "finish_reasons": [one.finish_reason for one in expected],
        "same": [shared_tokens(a.token_ids, b.token_ids) for a, b in zip(found, expected, strict=True)],
        "accepted_share": accepted / drafted if drafted else None,
        "seconds": max(one.decode_seconds for one in found),
        "full_seconds": max(one.decode_seconds for one in expected),
        "in_the_shape_of_the_pass": in_its_shape,
        **{f"tie_{name}": [one[name] for one in differences if "within" in one] for name in _OF_TIES},
        "wrong": wrong,
        "dtype": str(dtype).removeprefix("torch."),
    }


def format_exact(row: Mapping[str, Any]) -> str:
    """A line for people."""
    eight = ", 8-bit drafts" if row["weights"] == "float8" else ""
    pairs = list(zip(row["same"], row["tokens"], strict=True))
    shape = row["in_the_shape_of_the_pass"]
    parts = [
        f"{sum(a == b for a, b in pairs)} of {len(pairs)} texts ({sum(row['tokens'])} tokens) are full attention's"
    ]
    if shape is not None:
        parts.append(f"{sum(shape)} in the shape of the pass")
    if row["accepted_share"] is not None:
        parts.append(f"{row['accepted_share']:.0%} of drafts accepted")
    parts.append(f"{row['seconds']:.1f} s, full attention {row['full_seconds']:.1f}")
    ties = (row[f"tie_{name}"] for name in ("sequence", "token", "within", "rounding"))
    parts += [
        f"sequence {sequence} leaves at token {token}: a tie within {within:.1e} where rounding is {rounding:.1e}"
        for sequence, token, within, rounding in zip(*ties, strict=True)
    ]
    parts += [f"WRONG: {one}" for one in row["wrong"]]
    case = f"{row['dtype']}, budget {row['budget_tokens']}, {row['way']} drafts{eight}, {row['case']}"
    return f"{case}: {'; '.join(parts)}"
