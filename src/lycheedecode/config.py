"""HybridConfig: everything a user may choose about a hybrid decode step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from numbers import Integral, Real
from typing import Any, Literal, get_args

from .checks import LARGEST, check_number, settings_from
from .errors import ConfigError

Selection = Literal["top_k", "ratio", "top_p", "threshold"]
RetrievalAttention = Literal["selected", "full"]
BlockScore = Literal["mass", "max"]
ScanKeys = Literal["cache", "float8", "int4"]
StepWeights = Literal["model", "float8"]
Completion = Literal["plan", "centroid", "none"]
VerifyEvery = int | Literal["auto"]

DEFAULT_BUDGET_TOKENS = 4096
MOST_DRAFTS = 31
"""The most drafts of a round: the pass that verifies them takes one token more (`ops.attend_tokens`)."""

MOST_STEPS = 4096
"""The most steps that a selection stands for: it has room for all their tokens."""


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """What a decode step reads. Frozen; raises `ConfigError` for an invalid value.

    A *block* is `block_size` consecutive tokens of one KV head. A *selection* is the set of blocks that one retrieval
    head chose at this step; sinks and recent tokens count towards its budget.

    >>> config = HybridConfig(budget_tokens=1000, block_size=16)
    >>> config.selection, config.budget_blocks
    ('top_k', 63)

    Attributes:
        budget_tokens: most tokens a selection may hold, rounded up to whole blocks. Default 4096 for `top_k`; an
            optional cap for the other strategies.
        budget_ratio: share of the context a selection may hold, in (0, 1]; given alone it implies `selection="ratio"`.
        block_size: tokens per block, a power of two in [1, 256]. Small blocks are more faithful, large ones faster.
        sink_tokens: first tokens of the sequence that every selection contains.
        recent_tokens: last tokens that every selection contains, at least 1 (the token being decoded).
        selection: how block scores become a selection: the best `budget_tokens` (`top_k`) or `budget_ratio`
            (`ratio`), the smallest set that holds `top_p` of the attention mass, or every block with a score of at
            least `threshold`.
        top_p: attention mass in (0, 1] that a `top_p` selection must hold. The sum is float32: even at 1, blocks too
            light to change it are left out.
        threshold: least score in (0, 1), a share of the attention mass, of the blocks that `threshold` selects.
        retrieval_attention: `selected`: retrieval heads scan the keys, then attend over their own selection;
            `full`: they attend to the whole cache, as in the paper.
        block_score: what a block is worth to a query head: the `mass` of its attention weights, or the `max` of them.
        scan_keys: what retrieval heads scan: their keys in the `cache`, or a smaller copy kept beside it, in 8 bits
            (`float8`, half the bytes of 16-bit keys) or in 4 (`int4`, a little over a quarter). On a GPU with long
            contexts, a copy with a larger budget is closer to full attention at the same bytes read
            (docs/head-plans.md, Budget).
        completion: how tokens that a head does not read still count, through their chunk's mean key and value: with the
            head's factor in the `plan` (which may have none), with a factor of 1 for every head (`centroid`), or not at
            all (`none`).
        completion_chunk: tokens per chunk, a power of two up to 4096; with larger blocks, a chunk is a block.
        correction_every: Cache Correction: after every n decoded tokens, a dense pass rewrites their cache entries.
            0 switches it off.
        refresh_every: decoded tokens, up to 4096, for which retrieval heads keep a selection before they select again.
        step_weights: what linear layers of decode steps use: the weights of the `model`, or an 8-bit copy (`float8`),
            which halves weight reads at the cost of 50% more weight memory. Prefill, Cache Correction, the pass of
            `verify_every` and batches of more than 16 keep the model's own; `Engine` only.
        verify_every: lossless decoding: `Engine.generate` drafts n tokens a round, and one dense pass keeps those that
            full attention would have written, so the text is full attention's. `auto` chooses n as it goes and drafts
            nothing where that does not pay. 0 switches it off. In a round, retrieval heads select at the first
            draft and every `refresh_every` after it; `auto` also tries once a round.
    """

    budget_tokens: int | None = None
    budget_ratio: float | None = None
    block_size: int = 32
    sink_tokens: int = 16
    recent_tokens: int = 32
    selection: Selection | None = None
    top_p: float | None = None
    threshold: float | None = None
    retrieval_attention: RetrievalAttention = "selected"
    block_score: BlockScore = "mass"
    scan_keys: ScanKeys = "cache"
    completion: Completion = "plan"
    completion_chunk: int = 128
    correction_every: int = 0
    refresh_every: int = 1
    step_weights: StepWeights = "model"
    verify_every: VerifyEvery = 0

    def __post_init__(self) -> None:
        if self.selection is None:
            only_ratio = self.budget_ratio is not None and self.budget_tokens is None
            object.__setattr__(self, "selection", "ratio" if only_ratio else "top_k")
        if self.selection == "top_k" and self.budget_tokens is None:
            object.__setattr__(self, "budget_tokens", DEFAULT_BUDGET_TOKENS)
        self._check_choices()
        self._check_numbers()
        self._check_strategy()
        self._check_rounds()

    def _check_choices(self) -> None:
        choices = {
            "selection": Selection,
            "retrieval_attention": RetrievalAttention,
            "block_score": BlockScore,
            "scan_keys": ScanKeys,
            "step_weights": StepWeights,
            "completion": Completion,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(repr(choice) for choice in get_args(kind))
                raise ConfigError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}.")

    def _check_numbers(self) -> None:
        least = {
            "block_size": 1,
            "completion_chunk": 1,
            "sink_tokens": 0,
            "recent_tokens": 1,
            "correction_every": 0,
            "refresh_every": 1,
        }
        if self.budget_tokens is not None:
            least["budget_tokens"] = 1
        for name, smallest in least.items():
            check_number(name, getattr(self, name), smallest, MOST_STEPS if name == "refresh_every" else LARGEST)
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's are no JSON
        if self.block_size > 256 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two up to 256, not {self.block_size}.")
        if self.completion_chunk > 4096 or self.completion_chunk & (self.completion_chunk - 1):
            raise ConfigError(f"completion_chunk must be a power of two up to 4096, not {self.completion_chunk}.")
        for name, interval in (("budget_ratio", "(0, 1]"), ("top_p", "(0, 1]"), ("threshold", "(0, 1)")):
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not is_number or not 0 < value <= 1 or (value == 1 and interval.endswith(")")):
                raise ConfigError(f"{name} must be in {interval}, not {value!r}.")
            object.__setattr__(self, name, float(value))

    def _check_rounds(self) -> None:
        every = self.verify_every
        if every != "auto":
            if isinstance(every, bool) or not isinstance(every, Integral) or not 0 <= every <= MOST_DRAFTS:
                said = f"'auto' or a whole number from 0 to {MOST_DRAFTS}"
                raise ConfigError(f"verify_every must be {said}, not {every!r}.")
            object.__setattr__(self, "verify_every", int(every))
        if every and self.correction_every:
            raise ConfigError("verify_every rewrites all entries of the cache already: leave out correction_every.")

    def _check_strategy(self) -> None:
        needed = {"ratio": "budget_ratio", "top_p": "top_p", "threshold": "threshold"}
        for strategy, name in needed.items():
            given = getattr(self, name) is not None
            if self.selection == strategy and not given:
                raise ConfigError(f"selection={strategy!r} needs {name}.")
            if self.selection != strategy and given:
                raise ConfigError(f"{name} belongs to selection={strategy!r}, not {self.selection!r}.")
        if self.scan_keys != "cache" and self.retrieval_attention == "full":
            raise ConfigError(
                f"scan_keys={self.scan_keys!r} needs retrieval_attention='selected': dense heads read all keys."
            )
        if self.budget_blocks is not None and self.forced_blocks > self.budget_blocks:
            raise ConfigError(
                f"budget_tokens={self.budget_tokens} has no room for {self.sink_tokens} sink and {self.recent_tokens} "
                f"recent tokens in blocks of {self.block_size}: raise it to at least "
                f"{self.forced_blocks * self.block_size} or lower sink_tokens, recent_tokens or block_size."
            )

    @property
    def strategy(self) -> Selection:
        """`selection`, which is never None once the config is made."""
        assert self.selection is not None
        return self.selection

    @property
    def forced_blocks(self) -> int:
        """Most blocks that sinks and recent tokens can touch (recent tokens may straddle one more block)."""
        lookahead = self.refresh_every - 1
        return (
            ceil(self.sink_tokens / self.block_size) + ceil((self.recent_tokens + lookahead - 1) / self.block_size) + 1
        )

    @property
    def budget_blocks(self) -> int | None:
        """`budget_tokens` in whole blocks, or None without that limit."""
        return None if self.budget_tokens is None else ceil(self.budget_tokens / self.block_size)

    def share_blocks(self, factor: float) -> int:
        """Most blocks of a selection that has `factor` times the budget; sinks and recent tokens always have room."""
        assert self.budget_blocks is not None
        return share_of(self.budget_blocks, parts_of(factor), self.forced_blocks)

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk of the completion: whole blocks."""
        return max(self.completion_chunk, self.block_size)

    def capacity_blocks(self, num_blocks: int) -> int:
        """Most blocks `K` that a selection over a context of `num_blocks` blocks may hold."""
        limit = num_blocks
        if self.budget_blocks is not None:
            limit = min(limit, self.budget_blocks)
        if self.selection == "ratio" and self.budget_ratio is not None:
            limit = min(limit, max(ceil(self.budget_ratio * num_blocks), self.forced_blocks))
        return max(limit, 1)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> HybridConfig:
        """Inverse of `to_dict`; raises `ValueError` for an unknown setting."""
        return settings_from(cls, settings, "settings")


PARTS = 1 << 16
"""A budget is shared out in so many parts: kernels count in whole numbers, for budgets that requests choose as well."""


def parts_of(factor: float) -> int:
    """A factor on the budget in parts of it, rounded down: 0.3 of ten blocks are three."""
    return int(factor * PARTS)


def share_of(budget: int, parts: int, least: int) -> int:
    """Blocks of a selection that has so many parts of a budget in blocks, rounded up, and `least` at least."""
    return max(-(-budget * parts // PARTS), least)


ConfigLike = HybridConfig | Mapping[str, Any] | None
"""What functions take as `config`: the object, a mapping of some of its settings, or None for the defaults."""
