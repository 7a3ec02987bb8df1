"""About how long an identification takes and how much memory: for whoever decides whether to start one.

Time is that of reading the prompts once, at the speed of products that is measured here, and of some tens of small
passes a batch. A rough guide: what a batch takes on a GPU comes from two runs of SmolLM2-135M (57 s for 28 batches on
an H100, 128 s for 84 on an H200), what it takes on a CPU is a guess.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from ..models.shape import ModelShape
from .settings import IdentifySettings, default_cells

_PASSES = 4
"""Passes through the weights that the work on a prompt amounts to: the prefill, attention, the passes of answers."""
_BATCH_SECONDS = {"cuda": 1.5, "cpu": 3.0}
"""What a batch takes however small the model is."""
_COPIES = 4
"""Copies of the attention weights that a backward pass keeps."""
_ANSWER = 64


@dataclass(frozen=True)
class Estimate:
    """What an identification would take: seconds, and bytes of weights and of all else."""

    seconds: float
    weight_bytes: int
    other_bytes: int

    def __str__(self) -> str:
        minutes = self.seconds / 60
        span = f"{max(round(minutes), 1)} min" if minutes < 90 else f"{minutes / 60:.0f} h"
        return f"about {span} and {(self.weight_bytes + self.other_bytes) / 1e9:.0f} GB"


def estimate(config: Any, settings: IdentifySettings, device: torch.device) -> Estimate:
    """Estimate for a model of this transformers config on a device."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape, numbers = ModelShape.of(model), sum(weight.numel() for weight in model.parameters())
    cells = settings.calibrate_cells or default_cells(settings.texts, shape)
    passes = 1 + settings.head_budgets  # over all prompts
    batches = passes * len(cells) * ceil(settings.calibrate_prompts / settings.batch_size)
    tokens = passes * settings.calibrate_prompts * sum(cell.length for cell in cells)
    seconds = _PASSES * 2 * numbers * tokens / _speed(device) + batches * _BATCH_SECONDS[device.type]
    size = 2 if device.type == "cuda" else 4
    longest, batch = max(cell.length for cell in cells), settings.batch_size
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size * longest * batch
    weights = _COPIES * 4 * shape.num_heads * _ANSWER * shape.num_layers * longest * batch
    return Estimate(seconds, numbers * size, cache + weights)


def _speed(device: torch.device) -> float:
    """Operations a second of a large product on a device."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (left @ left)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
