"""Host memory that kernels reach."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..memory import CacheMemoryError

_MARGIN = 2**30
"""Bytes of host memory that are left to everybody else."""


class HostMemoryError(CacheMemoryError):
    """A KV cache that host memory does not hold; the message says how much it needs."""


def pin(owner: Any, *tensors: Tensor) -> Callable[[], Any]:
    """Pin tensors in host memory, until `owner` ceases to be or what this returns is called; keeps them so long.

    PyTorch's own pinned memory comes in powers of two, up to twice what was asked for; this takes no more than that.

    Raises:
        HostMemoryError: the system does not let this program.
    """
    runtime: Any = torch.cuda.cudart()
    done: list[Tensor] = []
    for tensor in tensors:
        status = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if status:
            _unpin(done)
            size = sum(one.nbytes for one in tensors) / 2**30
            raise HostMemoryError(
                f"This system does not let a program pin {size:.1f} GiB of host memory (CUDA error {status}): raise "
                "its limit of locked memory (ulimit -l), or give fewer sequences or shorter ones."
            )
        done.append(tensor)
    return weakref.finalize(owner, _unpin, done)


def _unpin(tensors: list[Tensor]) -> None:
    if tensors:
        torch.cuda.synchronize()  # nothing may be on its way there
    for tensor in tensors:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def wait_for(device: torch.device) -> None:
    """Until all that was launched so far has been written."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def free_host_bytes() -> int:
    """Bytes of host memory that a cache can take."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        free = int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min(free, _container_left()) - _MARGIN, 0)


def _container_left() -> int:
    """Bytes that a container's limit leaves; all there are without one."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            most = int(limit.read())  # "max" without a limit
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as current:
            return most - int(current.read())
    except (OSError, ValueError):
        return 2**62
