"""The paper's form: donors of the same index, and retrieval heads that attend densely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .same_index import SameIndex


@dataclass(frozen=True, kw_only=True)
class Paper(SameIndex):
    """LycheeDecode as published (arXiv 2602.04541), with a plan's roles."""

    changes: ClassVar[dict[str, Any]] = {"retrieval_attention": "full"}
