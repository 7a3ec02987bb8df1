"""What a request may say of its own attention: `extra_body={"vllm_xargs": {"lycheedecode": "budget_tokens=1024"}}`.

    "hybrid"                as the server was told; the same as saying nothing
    "budget_tokens=1024"    selections of so many tokens
    "off"                   every head reads everything: full attention

In Python: `SamplingParams(extra_args={"lycheedecode": "off"})`. Nothing here needs vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

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
    """

    least: int
    most: int | None
    default: int | None
    allow_off: bool
    block_size: int

    @classmethod
    def of(cls, config: HybridConfig, most: int | None, allow_off: bool) -> Limits:
        """Of a server; `most` None: the server's own budget. Raises `ServingError` for one below that."""
        if most is None:
            most = config.budget_tokens
        elif config.budget_tokens is None:
            raise ServingError(f"max_budget_tokens needs budget_tokens, which selection={config.selection!r} lacks.")
        elif isinstance(most, bool) or not isinstance(most, int) or most < config.budget_tokens:
            raise ServingError(
                f"max_budget_tokens must be a whole number of at least budget_tokens, {config.budget_tokens}, "
                f"not {most!r}."
            )
        return cls(config.forced_blocks * config.block_size, most, config.budget_blocks, allow_off, config.block_size)

    def blocks(self, extra_args: Mapping[str, Any] | None) -> int | None:
        """Most blocks of a request's selections; None: the default, `EVERYTHING`: all that there are.

        Raises `RequestError`.
        """
        given = (extra_args or {}).get(NAME)
        if given is None or given == "hybrid":
            return None
        if given == "off":
            if not self.allow_off:
                raise RequestError("This server does not let requests switch hybrid attention off.")
            return EVERYTHING
        found = re.fullmatch(r"budget_tokens=(\d{1,9})", given) if isinstance(given, str) else None
        if found is None:
            raise RequestError(f"lycheedecode must be 'hybrid', 'off' or 'budget_tokens=N', not {given!r}.")
        if self.most is None:
            raise RequestError("This server selects without a fixed budget, and takes none from requests.")
        budget = int(found[1])
        if not self.least <= budget <= self.most:
            raise RequestError(f"budget_tokens must lie between {self.least} and {self.most}, not be {budget}.")
        return ceil(budget / self.block_size)


class Requests:
    """What the requests of a worker asked for, and which of them are in the rows of the step to come."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._asked: dict[str, int] = {}
        self._rows: Sequence[str] | None = None

    def note(self, new: Mapping[str, Any], alive: Collection[str], rows: Sequence[str]) -> None:
        """A step is to come.

        Args:
            new: sampling params of the requests that have just come, by id.
            alive: ids of all requests.
            rows: ids in the order of the batch.
        """
        for name, params in new.items():
            blocks = self._limits.blocks(getattr(params, "extra_args", None))
            if blocks is not None:
                self._asked[name] = blocks
            else:
                self._asked.pop(name, None)
        if len(self._asked) > len(alive):
            self._asked = {name: blocks for name, blocks in self._asked.items() if name in alive or name in new}
        self._rows = rows

    def take(self, rows: int) -> list[int | None]:
        """For each of the first `rows` rows of this step: most blocks, None for the default; only once a step."""
        names, self._rows = self._rows or (), None
        asked = [self._asked.get(name) for name in names[:rows]] if self._asked else []
        return asked + [None] * (rows - len(asked))
