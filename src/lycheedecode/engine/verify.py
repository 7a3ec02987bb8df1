"""Lossless decoding: rounds of hybrid drafts, and one dense pass that verifies them all.

    certain token ─> draft ─> draft ─> ... ─> draft          hybrid steps, each over the entries of those before it
          └────────────┴────────┴──── one dense pass ──┘     full attention's token after each, and its cache entries
    longest prefix of drafts that full attention chose, too ─> accepted; its next token is certain

The pass costs about as much as one full step, since all its tokens share one reading of the cache and the weights. A
token is a function of logits, seed, sequence and position (`sampling`), for drafts as for the pass: so the text is what
full attention would have written, with every sampler.

Every sequence advances at its own pace: its length is kept on the device, and nothing in a round waits for the host,
which reads a round's tokens while the next one runs. A finished sequence starts where it ends, so none of its cache is
read, and gains no tokens. Drafts, pass and full step are captured once each.

Dimensions as in `ops`; `T` tokens of a pass, one more than drafts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import DecodeAttention, FullAttention
from ..config import HybridConfig
from ..errors import ConfigError
from ..models.positions import positions_in_table
from ..models.shape import inner_model
from .context import Context
from .decoder import Captured, Decoder
from .generation import PendingTokens, refuse_nan
from .pace import Pace, Schedule
from .passes import DensePass
from .sampling import Sampler, Sampling
from .step import FixedStep, Forward, within_positions

AUTO_DRAFTS = 8
"""Most drafts of a round where their number is chosen while it runs."""
_MOST_BEHIND = 64
"""Full steps in a row after which the drafting attention's state is brought up to date at the latest."""


def most_drafts(config: HybridConfig) -> int:
    """The most drafts of a round."""
    return AUTO_DRAFTS if config.verify_every == "auto" else config.verify_every


def draft_config(config: HybridConfig) -> HybridConfig:
    """The config of drafts: `auto` may select once a round, if the budget has room for the round's tokens."""
    if config.verify_every != "auto" or config.refresh_every > 1:
        return config
    try:
        return replace(config, refresh_every=AUTO_DRAFTS)
    except ConfigError:
        return config


def spare_slots(config: HybridConfig) -> int:
    """Slots of a cache beyond the requested tokens: for drafts, and for rounds that were already running at the end."""
    return 3 * (most_drafts(config) + 1)


@dataclass
class Tally:
    """Counts of one sequence: rounds, drafts, and accepted drafts."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class _Round:
    """A round that was launched: its tokens, still on their way to the host, and the times between its parts."""

    schedule: Schedule
    tokens: PendingTokens
    marks: list[Any]


class Rounds:
    """Rounds over the sequences of one context; kept with it, and reset for every generation.

    What changes in a round is on the device, int32 `[B]` unless said otherwise:

        _window     int64 [B, T]      the certain token, which has no cache entry yet, and its drafts
        _drafted    int64 [1]         drafts of this round so far
        _filled                       slots with verified entries; the certain token's entry goes to the next one
        _starts                       slot of the first token; of a finished sequence, `_filled`
        _followed                     slots that the drafting attention's state covers (`State.follow`)
        _drawn                        tokens drawn so far: the position of the next one's noise
        _active                       1; of a finished sequence, 0
        _result     int64 [B, T + 1]  tokens of the last pass, then how many of them the sequence gained
        _nan        float32 [B]       NaN if all logits of the last pass were

    Args:
        decoder: runs the drafts; if its attention is full attention itself, nothing is drafted, and every token comes
            from the pass.
        full: full attention.
        context: prompts, with room for new tokens and `spare_slots`.
        sampling: how tokens are drawn.
        config: its `verify_every`.

    Attributes:
        tokens: `T`.
        parts: captured: `select` and `keep`, drafts with and without a new selection; `verify`; `full`, a step
            of full attention, which leaves the drafting attention's state behind; `follow`, which brings it up to date.
    """

    def __init__(
        self, decoder: Decoder, full: FullAttention, context: Context, sampling: Sampling, config: HybridConfig
    ) -> None:
        cache, self._decoder, self._full, self._config = context.cache, decoder, full, config
        self._context, self._hybrid = context, not isinstance(decoder.attention, FullAttention)
        self._state = cache.state_for(decoder.attention)[0]
        batch, device = len(context.prompt_lengths), context.logits.device
        self.tokens = tokens = most_drafts(config) + 1
        self._most_positions = positions_in_table(inner_model(decoder.model))
        self._sampler = Sampler(sampling, device)
        self._sequences = torch.arange(batch, device=device)
        self._columns = torch.arange(tokens, device=device)
        self._filled, self._starts, self._followed, self._drawn, self._active = (
            torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(5)
        )
        self._window = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
        self._drafted = torch.zeros(1, dtype=torch.int64, device=device)
        self._result = torch.zeros(batch, tokens + 1, dtype=torch.int64, device=device)
        for layer in cache.layers:  # sums of chunks include slots that are not written yet
            for store in layer.store:
                store[:, :, cache.length :].zero_()
        self._nan = torch.zeros(batch, device=device)
        self.parts: dict[str, Captured] = {}

    @classmethod
    def over(
        cls, decoder: Decoder, full: FullAttention, context: Context, sampling: Sampling, config: HybridConfig
    ) -> Rounds:
        """The rounds kept with a context, or new ones; reset."""
        settings = replace(sampling, seed=None)
        key = decoder, "rounds", settings, config

        def make() -> Rounds:
            with torch.inference_mode():
                context.cache.state_for(decoder.attention)  # may move the buffers
                kept = context.kept_steps
                if key not in kept:
                    kept[key] = cls(decoder, full, context, sampling, config)
                kept[key]._begin(sampling)
            kept[key]._capture()
            return kept[key]

        return decoder.attempt(context, make)

    # ------------------------------------------------------------------ a generation

    def run(self) -> Iterator[tuple[list[list[int]], float]]:
        """Yield the new tokens of every sequence, round by round, and the seconds so far; the prompt's token first."""
        began = time.perf_counter()
        yield [[token] for token in self._window[:, 0].tolist()], time.perf_counter() - began
        seconds, overlaps, launched = 0.0, self._window.is_cuda, None
        while True:
            began = time.perf_counter()
            current = self._launch() if launched is None else launched
            launched = self._launch() if overlaps else None
            tokens = self._read(current)
            seconds += time.perf_counter() - began
            yield tokens, seconds

    def check(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Refuse tokens that were drawn from NaN logits."""
        if 0 in token_ids:
            refuse_nan(0, self._nan[sequence])

    def finish(self, sequence: int) -> None:
        """Stop decoding this sequence."""
        self._finished.add(sequence)
        with torch.inference_mode():
            self._active[sequence] = 0
            if not self._context.is_long:  # otherwise its position may be what tells the model that the text is long
                self._starts[sequence] = self._filled[sequence]

    def report(self, sequence: int) -> dict[str, Any]:
        """Statistics of one sequence, for its `Generation`."""
        steps = max(int(self._drawn[sequence]) - 1, 1)
        each = float(self._context.kv_bytes[sequence]) / steps
        return {"kv_bytes_per_token": each, **vars(self._tallies[sequence])}

    def _begin(self, sampling: Sampling) -> None:
        """Reset to the state after the prefill."""
        cache, context = self._context.cache, self._context
        self._sampler.reseed(sampling)
        self._filled.fill_(cache.length)
        every = self._decoder.attention.refresh_every
        # A copy of keys may lack the newest, which a scan right here would write.
        self._followed.fill_(max(cache.length - every, 0))
        self._starts.zero_()
        if cache.starts is not None:
            self._starts.copy_(cache.starts)
        self._drawn.fill_(1)
        self._active.fill_(1)
        self._drafted.zero_()
        self._window.zero_()
        self._window[:, 0] = self._sampler(context.logits, self._sequences, 0)
        self._note_nan(context.logits)
        self._follow(every + self.tokens)  # also chunks that end in the first round's drafts
        self._finished: set[int] = set()
        self._behind = 0
        self._tallies = [Tally() for _ in context.prompt_lengths]
        fixed = self._config.verify_every != "auto"
        refreshes = sorted({every} if fixed else {1, every})
        self._pace = Pace(most_drafts(self._config) if self._hybrid else 0, fixed, refreshes)

    # ------------------------------------------------------------------ a round

    def _launch(self) -> _Round:
        """Launch a round."""
        with self._decoder.route, torch.inference_mode():
            schedule = self._pace.next()
            self._catch_up(schedule)
            marks = [self._mark()]
            for draft in range(schedule.drafts):
                self.parts["keep" if draft % schedule.refresh else "select"]()
                marks.append(self._mark())
            self.parts["verify" if schedule.drafts or "full" not in self.parts else "full"]()
            marks.append(self._mark())
            return _Round(schedule, PendingTokens(self._result), marks)

    def _catch_up(self, schedule: Schedule) -> None:
        """Bring the drafting attention's state up to date when drafts need it: full steps spend no time on that."""
        if "follow" not in self.parts:
            return
        if self._behind and (schedule.drafts or self._behind == _MOST_BEHIND):
            self.parts["follow"]()
            self._behind = 0
        self._behind += not schedule.drafts

    def _read(self, launched: _Round) -> list[list[int]]:
        """Wait for a round and return its tokens."""
        rows, schedule = launched.tokens.tolist(), launched.schedule
        tokens = [row[:gained] for *row, gained in rows]
        running = [i for i in range(len(rows)) if i not in self._finished and rows[i][-1]]
        for i in running:
            tally = self._tallies[i]
            tally.rounds += 1
            tally.drafted += schedule.drafts
            tally.accepted += len(tokens[i]) - 1
        *drafting, passing = (self._between(*pair) for pair in pairwise(launched.marks))
        self._pace.record(schedule, [len(tokens[i]) - 1 for i in running], drafting, passing)
        return tokens

    def _mark(self) -> Any:
        if not self._window.is_cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def _between(self, begin: Any, end: Any) -> float:
        return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3

    # ------------------------------------------------------------------ for benchmarks

    def rewind(self) -> None:
        """Back to the end of the prompts, so that parts can be called in any order."""
        self._drafted.zero_()
        self._filled.fill_(self._context.cache.length)
        self._followed.fill_(self._context.cache.length)

    def verify_logits(self, token_ids: Tensor) -> Tensor:
        """Logits float32 `[B, T, V]` of the verifying pass for tokens `[B, T]` after the prompts."""
        with torch.inference_mode():
            self.rewind()
            self._window.copy_(token_ids)
        with torch.inference_mode(), self._decoder.route:
            self.parts["verify"]()
            return self._pass_logits.clone()

    # ------------------------------------------------------------------ captured parts

    def _capture(self) -> None:
        """Capture the parts that are missing; what a round changes is restored."""
        model, drafter = self._decoder.model, self._decoder.steps_of
        parts: dict[str, Any] = {}
        if self._hybrid:
            parts["select"] = self._drafting(True), drafter
            if self._decoder.attention.refresh_every > 1:
                parts["keep"] = self._drafting(False), drafter
            if self._config.verify_every == "auto":
                parts["full"] = self._full_step(), model
                parts["follow"] = lambda *_: self._follow(_MOST_BEHIND + 2 * self.tokens), drafter
        parts["verify"] = self._verifying(), model
        kept = [
            self._window, self._filled, self._followed, self._drawn, self._drafted, self._result,
            self._context.kv_bytes,
        ]  # fmt: skip
        for name, (run, of) in parts.items():
            if name not in self.parts:
                self.parts[name] = self._decoder.capture(self._within_positions(run), kept, model=of)

    def _within_positions(self, run: Any) -> Any:
        """Rounds go on past the last token of a text, which may have the model's last position."""
        return lambda forward, model: run(within_positions(forward, self._most_positions), model)

    def _step(self, attention: DecodeAttention, refresh: bool) -> FixedStep:
        cache, context = self._context.cache, self._context
        state = self._state if attention is self._decoder.attention else None
        trims = self._decoder.way == "eager" and getattr(attention, "graph_safe", False)
        return FixedStep(cache, attention, self._decoder.windows, state, refresh, context.kv_bytes, self._starts, trims)

    def _drafting(self, refresh: bool) -> Any:
        """A hybrid step from the last draft to the next."""
        step = self._step(self._decoder.attention, refresh)

        def run(forward: Forward, model: nn.Module) -> None:
            column = self._drafted.expand(len(self._window), 1)
            step.token_ids.copy_(self._window.gather(1, column)[:, 0])
            step.filled.copy_(self._filled + 1 + self._drafted)
            logits = step.run(forward, model)
            token_ids = self._sampler(logits, self._sequences, self._drawn + self._drafted)
            self._window.scatter_(1, column + 1, token_ids[:, None])
            self._drafted += 1

        return run

    def _verifying(self) -> Any:
        """The pass over the certain token and all drafts."""
        cache, context, tokens = self._context.cache, self._context, self.tokens
        dense = DensePass(cache, tokens, self._full, self._decoder.windows, context.kv_bytes, self._starts)

        def run(forward: Forward, model: nn.Module) -> None:
            dense.token_ids.copy_(self._window)
            dense.filled.copy_(self._filled + tokens)
            logits = self._pass_logits = dense.run(forward, model)
            positions = self._drawn[:, None] + self._columns
            self._note_nan(logits[:, 0])
            token_ids = self._sampler(logits, self._sequences[:, None], positions)
            agrees = (token_ids[:, :-1] == self._window[:, 1:]) & (self._columns[:-1] < self._drafted)
            self._advance(token_ids, agrees.long().cumprod(1).sum(1))
            self._follow(2 * self.tokens)

        return run

    def _full_step(self) -> Any:
        """A step of full attention, where drafting does not pay."""
        step = self._step(self._full, True)

        def run(forward: Forward, model: nn.Module) -> None:
            step.token_ids.copy_(self._window[:, 0])
            step.filled.copy_(self._filled + 1)
            logits = step.run(forward, model)
            self._note_nan(logits)
            token_ids = self._sampler(logits, self._sequences, self._drawn)
            self._advance(token_ids[:, None], torch.zeros_like(token_ids))

        return run

    def _note_nan(self, logits: Tensor) -> None:
        self._nan.copy_(torch.where(logits.isnan().all(-1), torch.nan, 0.0))

    def _advance(self, token_ids: Tensor, accepted: Tensor) -> None:
        """Take full attention's tokens `[B, T or 1]`: the `accepted` drafts, int64 `[B]`, and one more."""
        gained = (accepted + 1) * self._active
        self._result[:, : token_ids.shape[1]] = token_ids
        self._result[:, -1] = gained
        self._window[:, :1] = token_ids.gather(1, accepted[:, None])
        self._filled += gained
        self._drawn += gained
        self._drafted.zero_()

    def _follow(self, most: int) -> None:
        """Bring the drafting attention's state up to date: `most` slots at most, drafts included."""
        if self._state is not None:
            layers = self._context.cache.layers
            end = (self._filled + self.tokens).clamp(max=layers[0].capacity)
            end = torch.where(self._active > 0, end, self._starts)  # of a finished sequence nothing is written
            bounds = self._followed, self._filled, end
            self._state.follow(lambda layer: layers[layer].store, *bounds, most, self._starts)
        self._followed.copy_(self._filled)
