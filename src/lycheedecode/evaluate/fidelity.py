"""Fidelity: how far policies of decoding stray from full attention, on fresh prompts, through real decode steps.

Each batch of prompts is prefilled once, for all policies. Every policy then decodes the same answer token by token
(KL, top-1 agreement, acceptance), and on its own (first divergence, exact match). The answer's first token comes from
the prefill and is not counted. Prompts with something hidden have a true answer; the answer to other prompts is what
full attention draws. One more row is full attention by another kernel: what rounding alone does.

A policy that finds every token of an answer most probable while it is fed that answer generates it on its own, too, so
that is not decoded again; and what it is fed equals what it would generate up to the first token that it would not.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_temperature
from ..config import HybridConfig
from ..engine.engine import Context, Engine
from ..engine.prefix import shared_tokens
from ..engine.prompt import right_padded
from ..errors import ConfigError
from ..models.shape import vocabulary_of
from ..prompts.makers import Cell, Prompt, PromptMaker, makers_for
from ..prompts.text import name_of
from .engines import Coverage, coverage_for, make_engines
from .scores import Sums
from .variants import Variant

CELLS = (
    Cell("code", 6144, "continuation", 64),
    Cell("prose", 6144, "continuation", 64),
    Cell("noise", 2048),
    Cell("noise", 4096),
    Cell("noise", 7168),
    Cell("prose", 2048),
    Cell("prose", 4096),
    Cell("prose", 2048, "passkey", 5),
    Cell("prose", 4096, "passkey", 5),
)
"""What plans are judged on: first what people do, then what is easy to mark."""

TEMPERATURE = 0.7
"""The temperature at which answers are drawn and drafts accepted."""
ROUNDING = "full, other kernel"
"""The row of full attention that reads every block as a selected one."""

_WORTH_A_GRAPH = 32
"""Tokens of an answer from which on capturing a step pays: it costs a few steps for every policy and batch."""

Scores = dict[str, dict[str, Any]]
"""By label: a variant's description and its `Score`, or the reason why it was `left_out`."""


@dataclass(frozen=True)
class Long:
    """A kind of prompt with a long answer, which full attention generates.

    Attributes:
        text: source of the text, as in `load_text`.
        length: tokens of the prompt.
        tokens: of the answer.
    """

    text: str
    length: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.length} tokens of {name_of(self.text)}, {self.tokens} tokens generated"

    def make(self, makers: Mapping[str, PromptMaker], number: int, rng: random.Random) -> list[Prompt]:
        """`number` prompts of this kind."""
        return [makers[self.text].open_ended(self.length, rng) for _ in range(number)]


def generated_tokens(cell: Cell | Long) -> int:
    """Tokens of the answers that full attention generates to a kind of prompt; 0 where answers are given."""
    if isinstance(cell, Long):
        return cell.tokens
    return cell.count if cell.task == "continuation" else 0


def measure_fidelity(
    model: Any,
    tokenizer: Any,
    variants: Sequence[Variant],
    cells: Sequence[Cell | Long] = CELLS,
    *,
    prompts: int = 100,
    batch_size: int = 1,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    match_bytes: bool = False,
    minutes: float | None = None,
    finished: dict[str, Scores] | None = None,
    on_cell: Callable[[str, Scores], None] = lambda cell, scores: None,
    report: Callable[[str, int, int], None] = lambda stage, step, steps: None,
) -> dict[str, Scores]:
    """Scores of every variant, and of full attention, on every kind of prompt.

    Args:
        model: Hugging Face decoder in eval mode.
        tokenizer: its tokenizer.
        variants: from `variants`; the first is full attention.
        cells: kinds of prompts; those in `finished` are not decoded again.
        prompts: prompts of each kind, drawn from text that identification never uses.
        batch_size: prompts decoded together.
        seed: of the prompts, and of drawn tokens.
        temperature: at which the answers to continuations and long questions are drawn, and continued by every policy
            with the same random numbers, and at which drafts are accepted; 0 is greedy.
        match_bytes: give every policy the budget at which it reads as many bytes as `hybrid` does with the first plan
            and this config while the answer is decoded.
        minutes: after which no further batch is begun, but the first of each kind; the kinds share them by their
            lengths, and scores say how many prompts they are of.
        finished: results of an interrupted call.
        on_cell: called with every finished kind.
        report: called with kind, prompts done and prompts in all.

    Returns:
        `{kind: {label: ...}}`, see `Scores`.
    """
    check_temperature("temperature", temperature)
    makers = makers_for(tokenizer, cells, "evaluate")
    variants = [variants[0], _rounding(variants[0].config), *variants[1:]]
    results, cells = dict(finished or {}), tuple(dict.fromkeys(cells))
    _check_names(cells)
    open_cells = [cell for cell in cells if str(cell) not in results]
    shares = _Shares(minutes, [cell.length for cell in open_cells])
    for cell in open_cells:
        # Strings seed alike on every machine; the cell is part of it, so cells can be run one by one.
        name = f"fidelity/{seed}/{cell}"
        drawn = cell.make(makers, prompts, random.Random(name))
        longest = generated_tokens(cell) or max(len(prompt.answer_ids) for prompt in drawn)
        match_at, coverage = cell.length + 1 if match_bytes else 0, coverage_for(model, tokenizer, variants, [cell])
        engines, scores = _engines(model, tokenizer, variants, coverage, match_at, longest)
        _check_room(engines["full"], cell, longest)
        sums, deadline = {label: Sums() for label in engines}, shares.next_deadline()
        for start in range(0, prompts, batch_size):
            if start and time.perf_counter() >= deadline:
                break
            batch = drawn[start : start + batch_size]
            _decode(engines, batch, generated_tokens(cell), Choice(temperature, f"{name}/{start}"), sums)
            report(str(cell), start + len(batch), prompts)
        for label, each in sums.items():
            scores[label] |= asdict(each.score())
        results[str(cell)] = scores
        on_cell(str(cell), scores)
    return results


def _check_names(cells: Sequence[Cell | Long]) -> None:
    for name, number in Counter(map(str, cells)).items():
        if number > 1:
            raise ConfigError(f"{number} kinds of prompts would be called {name!r}: rename a text file.")


class _Shares:
    """Gives kinds of prompts their shares of the time, in turn; what one leaves is for those that follow."""

    def __init__(self, minutes: float | None, lengths: Sequence[int]) -> None:
        self._end = inf if minutes is None else time.perf_counter() + 60 * minutes
        self._left = list(lengths)

    def next_deadline(self) -> float:
        """When the next kind has to end, in seconds of `time.perf_counter`."""
        now = time.perf_counter()
        share = self._left[0] / sum(self._left)
        del self._left[0]
        return now + (self._end - now) * share


def _rounding(config: HybridConfig) -> Variant:
    whole = HybridConfig(budget_tokens=2**30, block_size=config.block_size, completion="none")
    return Variant(ROUNDING, "own-topk", whole, exact=True)


def _engines(
    model: Any, tokenizer: Any, variants: Sequence[Variant], coverage: Coverage | None, match_at: int, tokens: int
) -> tuple[dict[str, Engine], Scores]:
    """Engines for answers of `tokens` tokens, and what they are, by label; bytes are matched from `match_at` on."""
    # Many policies for some tokens each: compiling their steps would take longer than the steps do.
    captured = next(model.parameters()).is_cuda and tokens >= _WORTH_A_GRAPH
    engines, left_out = make_engines(
        model, tokenizer, variants, "graph" if captured else "eager", coverage, match_at, max(tokens - 1, 1)
    )
    scores: Scores = {}
    for variant in variants:
        if variant.label in left_out:
            scores[variant.label] = {"policy": variant.policy, "left_out": left_out[variant.label]}
        else:
            scores[variant.label] = variant.describe(engines[variant.label].config, engines[variant.label].shape)
    return engines, scores


def _check_room(full: Engine, cell: Cell | Long, tokens: int) -> None:
    most = full.shape.max_positions
    if most and cell.length + tokens > most + 1:
        raise ConfigError(f"{cell.length} tokens and an answer of {tokens} do not fit the model's {most} positions.")


# ---------------------------------------------------------------------- decoding


class Choice:
    """The next token: the most probable, or one that random numbers decide, the same at every call for a step.

    They are drawn where the logits are: on the host they would take longer than the step.

    Args:
        temperature: 0 is greedy.
        name: seeds the random numbers.
    """

    def __init__(self, temperature: float = 0.0, name: str = "") -> None:
        self.temperature = temperature
        self._seed = random.Random(name).randrange(2**40)

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """int64 `[B]` from `[B, V]`."""
        if not self.temperature:
            return logits.argmax(-1)
        generator = torch.Generator(logits.device).manual_seed(self._seed + step)
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_(1e-20, 1 - 1e-7)
        return (logits / self.temperature - (-uniform.log()).log()).argmax(-1)


class _Reference(NamedTuple):
    """What full attention makes of a batch: its engine, answers `[B, T + 1]`, the logits after each token but the last,
    `T` times `[B, V]`, and which of these count, bool `[B, T]`."""

    engine: Engine
    answers: Tensor
    logits: list[Tensor]
    mask: Tensor


def _decode(
    engines: Mapping[str, Engine], prompts: Sequence[Prompt], tokens: int, choose: Choice, sums: Mapping[str, Sums]
) -> None:
    """Prompts to which full attention generates `tokens` tokens, or with true answers where that is 0."""
    if tokens:
        _decode_long(engines, prompts, tokens, choose, sums)
    else:
        _decode_batch(engines, prompts, choose.temperature, sums)


def _decode_batch(
    engines: Mapping[str, Engine], prompts: Sequence[Prompt], temperature: float, sums: Mapping[str, Sums]
) -> None:
    """Prompts with true answers."""
    full, greedy = engines["full"], Choice()
    lengths = [len(prompt.answer_ids) for prompt in prompts]
    answers = right_padded([prompt.answer_ids for prompt in prompts], vocabulary_of(full.model), full.device)
    mask = torch.arange(1, max(lengths), device=full.device) < torch.tensor(lengths, device=full.device)[:, None]
    context = full.prefill([prompt.prompt_ids for prompt in prompts], room=max(lengths))
    reference = _Reference(full, answers, list(_feed(full, context, answers)), mask)
    expected: list[list[int]] = []  # what full attention generates
    for label, engine in engines.items():
        chosen = _compare(engine, context, reference, greedy, temperature, sums[label])
        if ((chosen == answers)[:, 1:] | ~mask).all() and (chosen[:, 0] == answers[:, 0]).all():
            own = answers
        else:
            own = torch.stack(list(_generate(engine, context, answers.shape[1], greedy)), 1)
        tokens = [row[:length] for row, length in zip(own.tolist(), lengths, strict=True)]
        expected = expected or tokens
        texts = engine.tokenizer.batch_decode(tokens)
        solved = [prompt.is_solved_by(text) for prompt, text in zip(prompts, texts, strict=True)]
        same = [shared_tokens(*pair) for pair in zip(tokens, expected, strict=True)]
        sums[label].add_answers(same, lengths, solved)
    context.rewind()


def _decode_long(
    engines: Mapping[str, Engine], prompts: Sequence[Prompt], tokens: int, choose: Choice, sums: Mapping[str, Sums]
) -> None:
    """Prompts whose answers full attention generates, `tokens` tokens each; end tokens do not end them."""
    full = engines["full"]
    context = full.prefill([prompt.prompt_ids for prompt in prompts], room=tokens)
    logits: list[Tensor] = []
    answers = torch.stack(list(_generate(full, context, tokens, choose, logits)), 1)
    reference = _Reference(full, answers, logits, torch.ones_like(answers[:, 1:], dtype=torch.bool))
    expected = answers.tolist()
    for label, engine in engines.items():
        own = _compare(engine, context, reference, choose, choose.temperature, sums[label]).tolist()
        same = [shared_tokens(*pair) for pair in zip(own, expected, strict=True)]
        sums[label].add_answers(same, [tokens] * len(prompts))
    context.rewind()


def _compare(
    engine: Engine, context: Context, reference: _Reference, choose: Choice, temperature: float, sums: Sums
) -> Tensor:
    """Feed the answers and compare distributions; returns what would have been chosen at every token, `[B, T + 1]`.

    Full attention comes first, with `context` as it left it, and is not decoded again.
    """
    chosen, kl, agreed, accepted = [choose(context.logits, 0)], [], [], []
    first = engine is reference.engine
    found_logits = reference.logits if first else _feed(engine, context, reference.answers)
    for step, (given, logits) in enumerate(zip(reference.logits, found_logits, strict=True), start=1):
        expected, found = given.log_softmax(-1), logits.log_softmax(-1)
        kl.append((expected.exp() * (expected - found)).sum(-1).clamp(min=0))  # rounding can be negative
        agreed.append(expected.argmax(-1) == found.argmax(-1))
        accepted.append(_acceptance(given, logits, temperature) if temperature else agreed[-1])
        chosen.append(choose(logits, step))
    kv_bytes = (context.kv_bytes / context.steps).tolist()
    sums.add_tokens(torch.stack(kl, 1), torch.stack(agreed, 1), torch.stack(accepted, 1), reference.mask, kv_bytes)
    return torch.stack(chosen, 1)


def _acceptance(full: Tensor, policy: Tensor, temperature: float) -> Tensor:
    """The probability that a token drawn from the policy's logits `[B, V]` stands, `[B]`."""
    p, q = ((logits / temperature).softmax(-1) for logits in (full, policy))
    return torch.minimum(p, q).sum(-1)


def _feed(engine: Engine, context: Context, answers: Tensor) -> Iterator[Tensor]:
    """The logits after every answer token but the last."""
    context.rewind()
    for token_ids in answers[:, :-1].unbind(1):
        yield engine.decode_one_token(context, token_ids)


def _generate(
    engine: Engine, context: Context, tokens: int, choose: Choice, kept: list[Tensor] | None = None
) -> Iterator[Tensor]:
    """Token ids `[B]` of answers of `tokens` tokens; `kept` takes the logits after all but the last."""
    context.rewind()
    token_ids = choose(context.logits, 0)
    yield token_ids
    for step in range(1, tokens):
        logits = engine.decode_one_token(context, token_ids)
        if kept is not None:
            kept.append(logits)
        token_ids = choose(logits, step)
        yield token_ids
