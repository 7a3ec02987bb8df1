"""Host memory that kernels reach."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import memset
from typing import Any

import torch
from torch import Tensor

from ..memory import CacheMemoryError, free_bytes

MARGIN = 2**30
"""Bytes of host memory that are left to everybody else."""
_PIECE = 2**26
"""Bytes that a thread touches at a time."""


class HostMemoryError(CacheMemoryError):
    """A KV cache that host memory does not hold; the message says how much it needs."""


class Region:
    """Whole pages of host memory, pinned where the device is a GPU; given back when nothing refers to it any more.

    PyTorch's own pinned memory comes in powers of two, up to twice what was asked for; this takes no more than that.

    Args:
        nbytes: its size.
        device: whose kernels are to reach it.

    Attributes:
        data: uint8 `[nbytes]`.
        release: unpins it at once; what lies there stays readable.

    Raises:
        HostMemoryError: the host does not have it, or the system does not let this program pin it.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # steps may make a cache grow in that mode, and it is written outside
            self.data = _pages(nbytes)
        self.release: Callable[[], Any] = lambda: None
        if device.type == "cuda":
            _touch(self.data)
            _pin(self.data)
            self.release = weakref.finalize(self, _unpin, self.data)

    def halves(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two tensors that lie in it, one behind the other."""
        size = dtype.itemsize * torch.Size(shape).numel()
        with torch.inference_mode(False):
            one, two = (self.data[i * size : (i + 1) * size].view(dtype).view(shape) for i in range(2))
        return one, two


def _pages(nbytes: int) -> Tensor:
    """uint8 `[nbytes]` on pages that nothing else lies on, large ones where the system has them."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them; small pages only take longer to pin
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]


def _touch(data: Tensor) -> None:
    """Have the system find the pages, on all cores: pinning would have it do so on one."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
        list(threads.map(lambda piece: memset(piece.data_ptr(), 0, piece.nbytes), data.split(_PIECE)))


def _pin(data: Tensor) -> None:
    status = int(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    if not status:
        return
    _forget_error()
    raise HostMemoryError(
        f"This system does not let a program pin {data.nbytes / 2**30:.1f} GiB of host memory (CUDA error {status}): "
        "raise its limit of locked memory (ulimit -l), or give fewer sequences or shorter ones."
    )


def _forget_error() -> None:
    """CUDA keeps an error for the next launch that asks: have one ask."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unpin(data: Tensor) -> None:
    torch.cuda.synchronize()  # nothing may be on its way there
    torch.cuda.cudart().cudaHostUnregister(data.data_ptr())


def wait_for(device: torch.device) -> None:
    """Until all that was launched so far has been written."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_host_bytes() -> int:
    """Bytes of host memory that a cache can take: what is free, but for the margin."""
    return max(free_bytes(torch.device("cpu")) - MARGIN, 0)
