"""Prefix reuse: new prompts take the place of those that a Context holds, and what both begin with is not read again.

    held    a b c d e        new    . . a b c d E f       kept   . . a b c d
            . g h i j               g h i j k l m n              g h i j k l   <- read, too: k, l, m, n of the longest

Prompts are padded on the left, so that all end in one slot: every sequence reads as many tokens as the one that shares
least, and starts where it would start in a prefill of its own. What was decoded is not kept. Its keys and values come
from hybrid attention; the next turn reads an answer with full attention, as a new engine would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.shape import inner_model
from ..models.state import ModelState
from .cache import KVCache
from .context import Context, left_padding


def new_context(model: nn.Module, state: ModelState, cache: KVCache, sequences: int, is_long: bool) -> Context:
    """One that holds nothing yet of so many prompts; `cache` knows where they will start."""
    inner = inner_model(model)
    device = inner.get_input_embeddings().weight.device
    nothing = torch.empty(sequences, 0, dtype=torch.int64, device=device)
    counted = torch.zeros(sequences, dtype=torch.float64, device=device)
    known: dict[str, Any] = {"token_ids": nothing, "is_long": is_long, "model": inner, "model_state": state}
    return Context(cache, nothing.float(), [0] * sequences, 0.0, counted, **known)


def shared_tokens(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the longest common prefix, in tokens."""
    pairs = enumerate(zip(held, wanted, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(held), len(wanted)))


def replace_prompts(context: Context, rows: list[list[int]], is_long: bool, room: int) -> Tensor:
    """Make `rows` the prompts of a Context, as far as it holds them; the rest has to be read.

    Args:
        context: of as many sequences; rewound, and not whole from now on, unless there is nothing to read.
        rows: token ids of the new prompts.
        is_long: whether they need the positions of a text past the model's turn; entries with others are not kept.
        room: tokens to decode later.

    Returns:
        int64 `[B, T]`, the tokens to read, the same number of every prompt.
    """
    assert context.token_ids is not None  # `check_continued`
    cache, device = context.cache, context.token_ids.device
    held = context.prompts()
    context.rewind()
    cache.reserve(max(map(len, rows)) + room)
    same_positions = is_long == context.is_long  # what was decoded may have changed them
    if context.is_whole and same_positions and held == rows:
        context.cached_tokens = [len(row) for row in rows]
        return torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    shared = [shared_tokens(*pair) if same_positions else 0 for pair in zip(held, rows, strict=True)]
    unread = max(1, *(len(row) - count for row, count in zip(rows, shared, strict=True)))
    kept = [max(len(row) - unread, 0) for row in rows]
    padding = left_padding([len(row) for row in rows])
    context.hold_nothing()
    cache.start_at(padding, kept)
    padded = torch.tensor(
        [[0] * unused + row for unused, row in zip(padding or [0] * len(rows), rows, strict=True)],
        dtype=torch.int64,
        device=device,
    )
    columns = padded.shape[1] - unread
    cache.truncate(columns)
    context.is_long = is_long
    context.token_ids, context.prompt_lengths, context.cached_tokens = padded[:, :columns], kept, kept
    return padded[:, columns:]
