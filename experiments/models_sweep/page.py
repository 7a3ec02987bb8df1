"""The page that says which models work, from the rows of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .sweep import Outcome, Row

_HEAD = """# Which models work

```
python -m experiments.models_sweep --page docs/models.md
```

writes this page. It takes every class that `AutoModelForCausalLM` of transformers {version} knows, makes a tiny random
model of it, and compares its logits with those of its own `generate`: in `hybrid` and in `Engine` (one prompt, a prompt
in chunks, a padded batch), with a budget that covers the context. **Exact** means equal to rounding. Everything else is
refused with one sentence before it answers. `Engine` also proves itself on your model when you make it, whether it is
listed here or not.

{counts}

| class | `hybrid` | `Engine` | why |
|---|---|---|---|
"""


def page(rows: Sequence[Row], version: str) -> str:
    """Markdown."""
    counts = Counter((row.hybrid.outcome, row.engine.outcome) for row in rows)
    lines = [f"- {number} classes: `hybrid` {one}, `Engine` {two}" for (one, two), number in counts.most_common()]
    table = [
        f"| {row.architecture} | {row.hybrid.outcome} | {row.engine.outcome} | {_why(row.hybrid, row.engine)} |"
        for row in sorted(rows, key=lambda row: row.architecture.lower())
    ]
    return _HEAD.format(version=version, counts="\n".join(lines)) + "\n".join(table) + "\n"


def _why(*outcomes: Outcome) -> str:
    said = list(dict.fromkeys(outcome.why for outcome in outcomes if outcome.why))
    return " ".join(said).replace("|", "\\|")
