"""Options of a request for its attention: `extra_body={"vllm_xargs": {"lycheedecode": "budget_tokens=1024"}}`.

    "hybrid"                as the server was told; the same as saying nothing
    "budget_tokens=1024"    selections of so many tokens
    "off"                   every head reads everything: full attention
    "lossless"              in a server that drafts (see `lossless`), where all requests get full attention's text: the
                            same as "off" or saying nothing; there a budget is that of the drafts

In Python: `SamplingParams(extra_args={"lycheedecode": "off"})`. Nothing here needs vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

from ...checks import LARGEST
from ...config import HybridConfig
from ...errors import LycheeError
from ...ops.types import EVERYTHING

NAME = "lycheedecode"


class ServingError(LycheeError):
    """A server that cannot decode as it was told to; the message is one sentence."""


class RequestError(LycheeError):
    """A request that asks for what there is not, or what the operator does not allow; the message is one sentence."""


class Limits(NamedTuple):
    """What requests may ask for.

    Attributes:
        least: tokens of the smallest budget, which has room for sinks and recent tokens.
        most: tokens of the largest.
        default: blocks of a selection where a request says nothing; None: as many as there are.
        allow_off: whether a request may have full attention.
        block_size: tokens of a block.
        lossless: whether the server is.
    """

    least: int
    most: int | None
    default: int | None
    allow_off: bool
    block_size: int
    lossless: bool = False

    @classmethod
    def of(cls, config: HybridConfig, most: int | None, allow_off: bool, lossless: bool = False) -> Limits:
        """The limits of a server; `most` None: its own budget. Raises `ServingError` for a maximum below that."""
        if most is None:
            most = config.budget_tokens
        elif config.budget_tokens is None:
            raise ServingError(f"max_budget_tokens needs budget_tokens, which selection={config.selection!r} lacks.")
        elif isinstance(most, bool) or not isinstance(most, int) or not config.budget_tokens <= most <= LARGEST:
            raise ServingError(
                f"max_budget_tokens must be a whole number from budget_tokens, {config.budget_tokens}, to {LARGEST}, "
                f"not {most!r}."
            )
        least, default = config.forced_blocks * config.block_size, config.budget_blocks
        return cls(least, most, default, allow_off, config.block_size, lossless)

    def blocks(self, extra_args: Mapping[str, Any] | None) -> int | None:
        """Most blocks of a request's selections; None: the default, `EVERYTHING`: all that there are.

        Raises `RequestError`.
        """
        given = (extra_args or {}).get(NAME)
        if given is None or given == "hybrid" or (self.lossless and given in ("lossless", "off")):
            return None
        if given == "lossless":
            raise RequestError("This server is not lossless: that is a setting of the server, not of a request.")
        if given == "off":
            if not self.allow_off:
                raise RequestError("This server does not let requests switch hybrid attention off.")
            return EVERYTHING
        found = re.fullmatch(r"budget_tokens=(\d{1,9})", given) if isinstance(given, str) else None
        if found is None:
            raise RequestError(f"lycheedecode must be 'hybrid', 'off', 'lossless' or 'budget_tokens=N', not {given!r}.")
        if self.most is None:
            raise RequestError("This server selects without a fixed budget, and takes none from requests.")
        budget = int(found[1])
        if not self.least <= budget <= self.most:
            raise RequestError(f"budget_tokens must be between {self.least} and {self.most}, not be {budget}.")
        return ceil(budget / self.block_size)


class Requests:
    """What the requests of a worker asked for, how long they were, and which of them are in the rows of a step to come.

    Args:
        limits: what they may ask for.
        loads: whether the pages of a new request may still be loading at its first step, from a KV connector.
    """

    def __init__(self, limits: Limits, loads: bool = False) -> None:
        self._limits, self._loads = limits, loads
        self._asked: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._formed: dict[str, bool] = {}
        self._rows: Sequence[str] = ()

    def note(
        self, new: Mapping[str, Any], alive: Collection[str], rows: Sequence[str], moved: Collection[str] = ()
    ) -> None:
        """Take note of the step to come.

        Args:
            new: sampling params of the requests that have just come, by id.
            alive: ids of all requests.
            rows: ids in the order of the batch.
            moved: ids of those that were preempted, whose pages are others than before.
        """
        for name, params in new.items():
            blocks = self._limits.blocks(getattr(params, "extra_args", None))
            if blocks is not None:
                self._asked[name] = blocks
            else:
                self._asked.pop(name, None)
            if getattr(params, "structured_outputs", None) is not None:
                self._formed[name] = True
            else:
                self._formed.pop(name, None)
        for name in (*new, *moved):
            self._seen.pop(name, None)
        for kept in (self._asked, self._seen, self._formed):
            if len(kept) > len(alive):
                for name in [name for name in kept if name not in alive and name not in new]:
                    del kept[name]
        self._rows = rows

    def take(self) -> Sequence[str]:
        """Ids in the rows of this step; only once a step."""
        rows, self._rows = self._rows, ()
        return rows

    def blocks(self, rows: Sequence[str]) -> list[int | None]:
        """Most blocks of each row's selections; None: the default."""
        return [self._asked.get(name) for name in rows] if self._asked else [None] * len(rows)

    def formed(self, rows: Sequence[str]) -> list[int]:
        """Which rows may only have an output of a given form (JSON, a choice, a pattern)."""
        return [row for row, name in enumerate(rows) if name in self._formed] if self._formed else []

    def grow(self, rows: Sequence[str], lengths: Sequence[int], decoding: int) -> list[int]:
        """Note the tokens that sequences have now; returns those at their last single token (0: there was none).

        Args:
            rows: that get a single token each.
            lengths: their tokens, that one included.
            decoding: how many of them, the first, decode; of others the newest token's entries may lack what a hybrid
                step writes beside them.
        """
        before = []
        for row, (name, length) in enumerate(zip(rows, lengths, strict=True)):
            seen = self._seen.get(name)
            before.append(seen if seen is not None and seen < length else 0)
            loading = seen is None and self._loads
            self._seen[name] = 0 if loading else length if row < decoding else length - 1
        return before

    def verify(self, rows: Sequence[str], lengths: Sequence[int]) -> list[int]:
        """Note the tokens that sequences have now; returns those when they last drafted (0: never).

        Args:
            rows: that draft.
            lengths: their tokens, drafts included that were not accepted.
        """
        before = [self._seen.get(name, 0) for name in rows]
        self._seen.update(zip(rows, lengths, strict=True))
        return before
