"""The operations as Triton kernels: the same contracts for CUDA GPUs (and, to test them, for Triton's interpreter)."""

import os
import shutil

from torch import Tensor

from .common import DTYPES, MAX_HEAD_DIM
from .count import count_bytes
from .operators import attend, attend_blocks, scan_blocks, scan_select, select_blocks

__all__ = [
    "HAS_COMPILER",
    "attend",
    "attend_blocks",
    "count_bytes",
    "scan_blocks",
    "scan_select",
    "select_blocks",
    "why_not",
]

HAS_COMPILER = bool(os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc"))))


def why_not(query: Tensor) -> str | None:
    """What keeps the kernels from this query, as the end of a sentence; None when nothing does."""
    if query.dtype not in DTYPES:
        return f"there are no kernels for {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"there are no kernels for head dims above {MAX_HEAD_DIM}"
    if not HAS_COMPILER:
        return "Triton needs a C compiler: install gcc, or name one in the variable CC"
    return None
