"""How many positions a model has, and where the length of a text changes what a position means.

transformers scales rotary positions by `rope_parameters`. Two kinds look at the length of what passes through the
model: `longrope` has frequencies for texts up to the original length and others for longer ones; `dynamic` changes them
with every token past it, and keeps what the longest text so far asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


class Positions(NamedTuple):
    """How a model's position encoding depends on the length of the text.

    Attributes:
        longest: tokens of the longest text; 0: not known.
        turn: length beyond which the frequencies change; 0: they never do.
        kind: of scaling that depends on length, `longrope` or `dynamic`; `` where none does.
    """

    longest: int = 0
    turn: int = 0
    kind: str = ""

    @classmethod
    def of(cls, config: Any) -> Positions:
        """Read off a text model's config.

        The longest text is the original length times the factor, whatever the kind, and never below what the config
        says.
        """
        configured = int(getattr(config, "max_position_embeddings", 0) or 0)
        longest, turn, kind = configured, 0, ""
        for scaling in _scalings(config):
            original = scaling.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            original = int(original or configured)
            longest = max(longest, int(original * float(scaling.get("factor") or 1)))
            name = str(scaling.get("rope_type") or scaling.get("type") or "default")
            if name in ("longrope", "dynamic"):
                turn, kind = original, name
        return cls(longest, turn, kind)

    @property
    def most(self) -> int:
        """Tokens of the longest text that `Engine` decodes; 0: not known."""
        return self.turn if self.kind == "dynamic" else self.longest

    def is_long(self, tokens: int) -> bool:
        """Whether a text of so many tokens is read with other frequencies than a short one."""
        return 0 < self.turn < tokens

    def new_tokens(self, wanted: int, prompt: int) -> int:
        """How many of `wanted` tokens can be decoded after a prompt of so many; at least 1, which takes no position."""
        return max(min(wanted, self.most - prompt + 1), 1) if self.most else wanted


def _scalings(config: Any) -> list[dict[str, Any]]:
    """Every set of rope parameters: of the model, or of each kind of its layers."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(given, dict):
        return []
    nested = [inner for inner in given.values() if isinstance(inner, dict)]
    return nested or [given]


def positions_in_table(model: Any) -> int:
    """Of a model that looks its positions up in a table, how many there are; 0: it computes them.

    Args:
        model: a transformers model. Any table beside that of its tokens may be one of positions.
    """
    tokens = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return Positions.of(model.config.get_text_config(decoder=True)).longest if any(tables) else 0
