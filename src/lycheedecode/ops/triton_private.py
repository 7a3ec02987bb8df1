"""What we take from private parts of Triton."""

from __future__ import annotations

import os
from ctypes import CDLL, c_int, c_void_p
from functools import lru_cache
from typing import Any

_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT."""


def leave_shared_memory(launched: Any, percent: int) -> None:
    """Processors that a kernel without shared memory finds idle keep so much as shared memory, from its next launch on.

    A processor's memory is divided when the first program comes, and that lasts as long as one runs there. By default
    such a kernel takes nearly all of it as a cache, and programs of other kernels, which need shared memory, cannot
    start beside it. This is a wish; CUDA may do otherwise.

    Args:
        launched: what the launch returned; in the interpreter, None.
        percent: of a processor's memory; -1: CUDA's choice.
    """
    function = getattr(launched, "function", None)
    if function is not None:
        _cuda().cuFuncSetAttribute(c_void_p(function), c_int(_CARVEOUT), c_int(percent))


@lru_cache(maxsize=1)
def _cuda() -> CDLL:
    return CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
