"""The definition of `append`, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .rope import Rotation


def append(
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    filled: Tensor,
    query: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor | None:
    if rotation is not None:
        key, query = rotation.of_key(key), None if query is None else rotation.of_query(query)
    tokens = filled.shape[0] // keys.shape[0]
    sequence, slot = torch.arange(filled.shape[0], device=filled.device) // tokens, filled.long() - 1
    keys[sequence, :, slot] = key
    values[sequence, :, slot] = value
    return query
