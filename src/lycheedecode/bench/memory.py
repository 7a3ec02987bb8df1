"""`bench memory`: the KV cache in host memory against a resident one, and what either takes.

texts    real texts are continued: the same tokens, or no times; how often blocks are missing, by the store's size
steps    of a model with random weights, whose selections change as those texts' did: the same logits, or no times
prefill  of random tokens, in the same chunks: the same logits, or no times
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..config import HybridConfig
from ..engine.engine import Engine
from ..errors import MismatchError
from .harness import show
from .memory_steps import bench_steps
from .memory_texts import bench_texts
from .models import build, plan_for, prompts_for, release
from .settings import MemorySettings
from .verify import relative_error

_TOLERANCE = 1e-2
"""Relative, for logits: the same kernels read the same numbers."""


def run(settings: MemorySettings, device: str) -> Iterator[dict[str, Any]]:
    """Rows of all parts, as they come."""
    parts = {"steps": bench_steps, "prefill": bench_prefill, "texts": bench_texts}
    show(HEADER)
    for part in settings.parts:
        for row in parts[part](settings, device):
            row = {"part": part, **row}
            show(format_row(row))
            yield row
    show(_LEGEND)


def bench_prefill(settings: MemorySettings, device: str) -> Iterator[dict[str, Any]]:
    """Seconds of prompts whose cache stays on the GPU, and of those whose cache goes to host memory meanwhile.

    Both pass in the same chunks: left alone, an engine takes the larger ones the less of the cache the GPU holds.
    """
    model = build(settings.model, settings.layers, device, torch.bfloat16 if device == "cuda" else torch.float32)
    config = HybridConfig(budget_tokens=settings.budgets[0], block_size=settings.block_size)
    chunk = settings.prefill_chunk
    for batch, length in settings.pairs:
        prompts, right, base = prompts_for(model, batch, length).tolist(), None, 0.0
        for place in ("resident", "host"):
            engine = Engine(model, plan=plan_for(model), config=config, cache=place, prefill_chunk=chunk)
            engine.prefill([prompt[: 2 * chunk] for prompt in prompts])  # the first chunk and others have own kernels
            release()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            context = engine.prefill(prompts, room=1)
            seconds = time.perf_counter() - began
            error = 0.0 if right is None else relative_error(context.logits, right)
            if not error <= _TOLERANCE:
                raise MismatchError(
                    f"Logits after {length} tokens differ by {error:.1e} from those of a resident cache."
                )
            right = context.logits if right is None else right
            base = base or seconds
            yield {
                "cache": place,
                "batch": batch,
                "context": length,
                "prefill_chunk": chunk,
                "prefill_seconds": context.prefill_seconds,
                "seconds": seconds,
                "slower": seconds / base - 1,
                "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
                "error": error,
            }
            del context
            release()


HEADER = (
    f"{'':7} {'cache':>8} {'store':>5} {'budget':>6} {'batch':>5} {'context':>8} {'prefill s':>9} {'ms/step':>8} "
    f"{'tokens/s':>8} {'slower':>6} {'GPU MB':>8} {'host MB':>8} {'peak MB':>8} {'new':>6} {'fetched MB':>10}  form"
)
_LEGEND = (
    "store: in percent of a selection; new: share of selected blocks that were fetched, for every head; slower: "
    "than with a resident cache, for prompts with the time to make the cache; at once: nothing is fetched ahead; "
    "form: of attention, and whether new blocks are those of a real model's selections of the same budget or of "
    "the same share of the context. Without a GPU, texts have no times."
)


def format_row(row: Mapping[str, Any]) -> str:
    """A line of the table under `HEADER`."""
    size = f"{row['batch']:5} {row['context']:8}"
    if "left_out" in row:
        return f"{row['part']:7} {row['cache']:>8} {'':5} {'':6} {size} left out: {row['left_out']}"

    def number(name: str, form: str, scale: float = 1.0) -> str:
        width = int(form.split(".")[0].lstrip("+"))
        value = row.get(name)
        return " " * width if value is None else format(value * scale, form)

    sizes = " ".join(number(name, "8.1f", 1e-6) for name in ("bytes_on_gpu", "bytes_on_host", "peak_bytes"))
    store = number("store_percent", "4.0f") + ("%" if row.get("store_percent") else " ")
    cache = row["cache"] if row.get("ahead", True) else "at once"
    times = f"{number('prefill_seconds', '9.2f')} {number('ms', '8.3f')} {number('tokens_per_second', '8.1f')}"
    more = f"{number('slower', '6.1%')} {sizes} {number('miss_rate', '6.1%')} {number('fetched_bytes', '10.1f', 1e-6)}"
    what = f"  {row['form']}, {row['reading']}" if "form" in row else ""
    return f"{row['part']:7} {cache:>8} {store} {number('budget_tokens', '6.0f')} {size} {times} {more}{what}".rstrip()
