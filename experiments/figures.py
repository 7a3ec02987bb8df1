"""How far a student is from full attention, token by token and prompt by prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Figures:
    """KL, agreement and acceptance of one student on one kind of prompt."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._top1: list[Tensor] = []
        self._accepted: list[Tensor] = []
        self._prompts: list[float] = []

    def add(self, expected: Tensor, found: Tensor, mask: Tensor, temperature: float) -> None:
        """Logits of full attention and of the student, `[B, T, V]`, where `mask` is True."""
        for theirs, ours, inside in zip(expected, found, mask, strict=True):
            theirs, ours = theirs[inside], ours[inside]
            p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
            self._kl.append(kl.cpu())
            self._prompts.append(float(kl.mean()))
            self._top1.append((p.argmax(-1) == q.argmax(-1)).cpu())
            hot = torch.minimum((theirs / temperature).softmax(-1), (ours / temperature).softmax(-1))
            self._accepted.append(hot.sum(-1).cpu())

    def to_dict(self) -> dict[str, Any]:
        """Means over tokens, the 99th percentile, and the standard error of the mean over prompts."""
        kl, each = torch.cat(self._kl).double(), torch.tensor(self._prompts).double()
        error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else 0.0
        return {
            "prompts": len(each),
            "kl_mean": float(kl.mean()),
            "kl_error": error,
            "kl_median_of_prompts": float(each.median()),
            "kl_of_prompts": [round(float(kl), 5) for kl in each],
            "kl_p99": float(kl.quantile(0.99)),
            "top1_agreement": float(torch.cat(self._top1).double().mean()),
            "acceptance": float(torch.cat(self._accepted).double().mean()),
        }
