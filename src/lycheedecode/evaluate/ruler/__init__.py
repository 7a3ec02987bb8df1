"""RULER's 13 kinds of tasks, made here: facts hidden in a haystack that fills a context to a given number of tokens.

The kinds, their answers and their scoring follow the paper (arXiv 2404.06654); sentences and haystacks are our own, so
scores compare with each other and not with published ones. An item of a length leaves room for its answer within it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...prompts.text import load_text
from ..tasks_data import Documents
from .fit import Fitter, Item, TaskLengthError
from .haystack import Sources
from .kinds import KINDS

__all__ = ["KINDS", "Item", "TaskLengthError", "dataset", "make_items", "plain_count"]

Count = Callable[[str, str], int]
"""`(text, prefix of the answer) -> tokens` of the whole prompt, a chat template's included."""


def make_items(
    kind: str,
    length: int,
    number: int,
    count: Count,
    *,
    room: int,
    seed: int = 0,
    text: str = "prose",
    data: Path | None = None,
) -> list[Item]:
    """Items of one kind, as long as `length` allows, the same ones every time.

    Args:
        kind: a name in `KINDS`.
        length: tokens of prompt and answer together.
        number: of items.
        count: tokens of a prompt.
        room: tokens kept for the answer.
        seed: of names, values, positions and order.
        text: source of prose haystacks and words, as in `load_text`.
        data: folder of the question sets that `qa_1` and `qa_2` read; None asks the hub.

    Raises:
        TaskLengthError: the length has no room for the question and what is hidden.
        DataError: a question set that cannot be found.
        TextError: a text that cannot be read.
    """
    sources = Sources(_load(text), length, data)
    fitter = Fitter(lambda item: count(item.text, item.prefix), length - room, f"{kind} with {length} tokens")
    items = []
    for i in range(number):
        # Strings seed alike on every machine; every size of an item draws the same facts.
        name = f"ruler/{seed}/{kind}/{length}/{i}"

        def build(size: int, name: str = name, i: int = i) -> Item:
            return KINDS[kind](sources, size, random.Random(name), i)

        items.append(fitter.longest(build))
    return items


@lru_cache(maxsize=2)
def _load(text: str) -> str:
    return load_text(text)


def dataset(
    kind: str,
    room: int,
    length: int = 4096,
    items: int = 100,
    count: Count | None = None,
    seed: int = 0,
    text: str = "prose",
    data: str | None = None,
    **others: Any,
) -> dict[str, Any]:
    """What a task file of lm-evaluation-harness asks for: the split `test`.

    `length`, `items`, `seed`, `text` and `data` come from the task manager's metadata. There, `count` may be left out:
    prompts are then counted without a chat template by the tokenizer that `tokenizer`, `pretrained` or `model` names.
    """
    if count is None:
        count = plain_count(others.get("tokenizer") or others.get("pretrained") or others.get("model"))
    made = make_items(
        kind, length, items, count, room=room, seed=seed, text=text, data=None if data is None else Path(data)
    )
    return {"test": Documents(vars(item) for item in made)}


def plain_count(name: str | None) -> Count:
    """Counts the tokens of prompts without a chat template, by the tokenizer of a model."""
    from transformers import AutoTokenizer

    if not name:
        raise ConfigError("RULER tasks measure their prompts: give the task manager a tokenizer in its metadata.")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return lambda text, prefix: len(tokenizer(f"{text} {prefix}" if prefix else text, verbose=False).input_ids)
