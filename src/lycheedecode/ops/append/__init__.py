"""append: the newest tokens of every sequence, normed and rotated, into the cache."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..dispatch import kernel_obstacle
from . import reference
from .rope import Rotation

__all__ = ["Rotation", "append"]


def append(
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    filled: Tensor,
    query: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor | None:
    """Write new tokens to slots `filled - 1` of each sequence of a store; no slot number reaches the host.

    There may be several tokens a sequence, `T` of them: rows `b * T` to `b * T + T - 1` of what follows are its own.

    Args:
        keys, values: `[B, Hkv, capacity, D]`; written in place.
        key, value: of the tokens, `[B * T, Hkv, D]`.
        filled: int32 `[B * T]`, slots in use up to each token, its own included.
        query: of the tokens, `[B * T, Hq, D]`.
        rotation: what key and query still have to pass; None when they have.

    Returns:
        The query, rotated; `query` itself without a rotation.
    """
    implementation: ModuleType = reference
    if keys.is_cuda and kernel_obstacle(key) is None:
        from . import triton

        implementation = triton
    return implementation.append(keys, values, key, value, filled, query, rotation)
