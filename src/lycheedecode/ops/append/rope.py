"""What queries and keys pass between their projection and the cache: an RMSNorm in some models, then the rotation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Rotary position embedding (Su et al. 2021, halves rotated as Hugging Face models do), and a norm of heads before.

    Attributes:
        cos, sin: `[B, D]`.
        query_norm, key_norm: `[D]`, weights of an RMSNorm over the channels of a head, both or neither.
        eps: of the norms.
    """

    cos: Tensor
    sin: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0

    def of_query(self, query: Tensor) -> Tensor:
        """`[B, Hq, D]`, rotated."""
        return self._rotated(query, self.query_norm)

    def of_key(self, key: Tensor) -> Tensor:
        """`[B, Hkv, D]`, rotated."""
        return self._rotated(key, self.key_norm)

    def _rotated(self, x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            wide = x.float()
            x = norm * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * self.cos[:, None] + torch.cat((-second, first), -1) * self.sin[:, None]
