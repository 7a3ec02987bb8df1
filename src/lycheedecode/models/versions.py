"""What the supported versions of transformers call differently, and what we take from its private parts.

Seen to work in transformers 5.17, 5.23 and 5.24; `tests/test_private.py` names the version where something is missing.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

TAKEN = (
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping",
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping",
    "transformers.PreTrainedConfig._attn_implementation",
)


def _release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


# Renamed in 5.24; the old name warns until 5.40, which removes it.
CACHE_NAMES = ("cache", "past_key_values")
"""Names under which callers may pass a model its cache."""
_CACHE = CACHE_NAMES[0] if _release("transformers") >= (5, 24) else CACHE_NAMES[1]


def cache_argument(cache: Any) -> dict[str, Any]:
    """The argument by which a model, or its `generate`, takes a cache: `model(ids, **cache_argument(cache))`."""
    return {_CACHE: cache}


def unregister(registry: Any, name: str) -> None:
    """The opposite of `registry.register`, which transformers has for no registry of attention functions or masks."""
    registry._global_mapping.pop(name, None)


def attention_name(config: Any) -> str | None:
    """The name under which models of a config find their attention function."""
    return config._attn_implementation


def set_attention_name(config: Any, name: str | None) -> None:
    """Let models find another one; the public setter also asks whether the model is known to support it."""
    config._attn_implementation = name
