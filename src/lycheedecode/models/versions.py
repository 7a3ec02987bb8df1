"""What the supported versions of transformers call differently."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any


def _release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


# Renamed in 5.24; the old name warns until 5.40, which removes it.
_CACHE = "cache" if _release("transformers") >= (5, 24) else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The argument by which a model, or its `generate`, takes a cache: `model(ids, **cache_argument(cache))`."""
    return {_CACHE: cache}
