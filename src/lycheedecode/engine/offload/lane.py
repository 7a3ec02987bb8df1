"""Work beside the model: copies and fetches that are not needed yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Mark = Any
"""The end of a piece of work in a lane."""


class Lane:
    """A stream beside the current one, which takes its work in order; off a GPU work is done when it is given.

    In a CUDA graph, what is given here becomes a branch of it.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if on_gpu else None  # few programs, for the link

    def run(self, work: Callable[[], None]) -> Mark:
        """Do `work` after everything that the current stream has been given so far."""
        if self._stream is None:
            return work()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
            return self._stream.record_event()

    def wait(self, mark: Mark) -> None:
        """Let the current stream wait for `mark`, and so for all that came before it in this lane."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark)
