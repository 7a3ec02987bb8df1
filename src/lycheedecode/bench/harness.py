"""What benchmarks share: a device that suits them, rows on stdout as they come, and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from ..errors import DeviceError
from ..results import Result
from .settings import BenchSettings

Settings = TypeVar("Settings", bound=BenchSettings)


def measure(
    command: str,
    settings: Settings,
    run: Callable[[Settings, str], dict[str, Any] | Iterator[dict[str, Any]]],
    needs_gpu: bool = True,
    keep: Callable[[Result], None] | None = None,
    without_gpu: str = "",
) -> Result:
    """The result of a benchmark.

    Args:
        command: its name in the result.
        settings: what it is asked for.
        run: takes settings and device, returns rows and what sums them up, or yields a row at a time.
        needs_gpu: refuse to run without one, unless a smoke test is all that is asked for.
        keep: takes the result so far, after each row.
        without_gpu: what the command line does offer without one, for the error.

    Raises:
        DeviceError: there is no GPU.
        MismatchError: something does not compute what it should; then there are no times.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if needs_gpu and device == "cpu" and not settings.smoke:
        instead = f"; without one, {without_gpu}" if without_gpu else ""
        raise DeviceError(f"There is no CUDA GPU, and only times on a GPU mean anything here{instead}.")
    torch.manual_seed(settings.seed)
    found = run(settings.shrunk() if settings.smoke else settings, device)
    result = Result(command, asdict(settings))
    if isinstance(found, dict):
        return result.add(**found)
    for row in found:
        result = result.add([row])
        if keep is not None:
            keep(result)
    return result


def show(line: str) -> None:
    """A line of what was found, on stdout: once, as soon as it is known."""
    print(line, flush=True)


def say(line: str) -> None:
    """Progress, on stderr; nothing that `show` shows."""
    print(line, file=sys.stderr, flush=True)
