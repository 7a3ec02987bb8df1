"""Counters of a server: workers write down what they counted, the server's `/metrics` shows it.

With PROMETHEUS_MULTIPROC_DIR, or several API servers, vLLM's own way takes them there (`of_process`). Otherwise workers
leave their totals in a folder named after the engine, which the process that started it looks into when it is asked.
Nothing here needs vLLM.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

COUNTERS = {
    "hybrid_steps": ("lycheedecode_hybrid_steps", "Steps in which sequences decoded with hybrid attention."),
    "dense_steps": ("lycheedecode_dense_steps", "Steps in which none did."),
    "hybrid_tokens": ("lycheedecode_hybrid_tokens", "Tokens decoded with hybrid attention."),
    "off_tokens": ("lycheedecode_off_tokens", "Tokens decoded with full attention, as their requests asked for."),
    "bytes": ("lycheedecode_kv_bytes", "Bytes of the KV cache that hybrid steps read."),
    "full": ("lycheedecode_full_kv_bytes", "Bytes that full attention would have read in the same steps."),
}
"""Name and meaning of everything that is counted; Prometheus adds `_total`."""


def folder_of(instance: str) -> Path:
    """Where the workers of an engine leave their totals."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"lycheedecode-{user}-{instance}"


def leave(folder: Path, name: str, totals: Mapping[str, float]) -> None:
    """Write a worker's totals, whole or not at all; without the folder, nothing collects them."""
    if folder.is_dir():
        partial = folder / f"{name}.partial"
        partial.write_text(json.dumps(dict(totals)))
        partial.replace(folder / f"{name}.json")


class Shown:
    """What workers left in some folders, for Prometheus."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        totals: Counter[str] = Counter()
        for path in (path for folder in self.folders for path in folder.glob("*.json")):
            totals.update(json.loads(path.read_text()))
        for key, (name, meaning) in COUNTERS.items():
            yield CounterMetricFamily(name, meaning, totals[key])


@lru_cache(maxsize=1)
def _shown() -> Shown:
    from prometheus_client import REGISTRY

    shown = Shown()
    REGISTRY.register(shown)
    return shown


def show(instance: str) -> None:
    """Let this process's metrics have what the workers of an engine are going to count."""
    folder = folder_of(instance)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ or folder in _shown().folders:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _shown().folders.append(folder)


@lru_cache(maxsize=1)
def of_process() -> dict[str, Any]:
    """Counters of this process, which Prometheus gathers on its own; none where it does not."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return {}
    from prometheus_client import Counter as Count

    return {key: Count(*of) for key, of in COUNTERS.items()}
