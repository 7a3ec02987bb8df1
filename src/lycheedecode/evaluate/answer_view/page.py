"""The page: a template in a file of its own, and the numbers that its script reads."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from typing import Any

from .watch import AnswerView


def render(view: AnswerView, title: str = "") -> str:
    """The page's HTML; complete in itself, some hundred bytes a block and an answer token."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files(__package__) / "page.html"
    heads, retrieval = view.heads
    seen: Counter[int] = Counter()
    for token in view.tokens:
        seen.update(token.blocks or {})
    most = max(seen.values(), default=1)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=title or "An answer, and what it looked at",
        view=view,
        heads=heads,
        retrieval=retrieval,
        tokens=view.block_size * len(view.prompt),
        overall=[round(seen[block] / most, 2) for block in range(len(view.prompt))],
        differences=sum(token.otherwise is not None for token in view.tokens),
        data=json.dumps(_data(view), separators=(",", ":")).replace("<", "\\u003c"),
    )


def _data(view: AnswerView) -> list[dict[str, Any]]:
    """For each answer token the distances between its blocks, and their readers as shares of all heads."""
    data = []
    for token in view.tokens:
        blocks = sorted(token.blocks or {})
        steps = [block - before for block, before in zip(blocks, [0, *blocks], strict=False)]
        readers = [token.blocks[block] for block in blocks] if token.blocks else []
        data.append({"d": steps, "n": readers, "m": token.covered})
    return data
