"""Compiles kernels for a Hopper GPU where there is none; see the fixture `compiled`."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="The kernels need Triton.")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("On a GPU the kernels compile where they run.", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

SHARED_MEMORY = 227 * 1024
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(monkeypatch, cache):
    """From now on kernels are compiled and not run; returns the list in which they gather."""
    found, run = [], JITFunction.run

    def compile_instead(self, *arguments, grid, warmup, **constants):
        found.append(run(self, *arguments, grid=grid, warmup=True, **constants))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(JITFunction, "run", compile_instead)
    monkeypatch.setattr(driver, "_active", Hopper())
    return found


def spilled_bytes(kernel, tmp_path):
    """What the kernel keeps on its stack."""
    return int(re.search(r"STACK:(\d+)", _ask("--dump-resource-usage", kernel, tmp_path))[1])


def programs_at_once(kernel, tmp_path):
    """That a processor holds: as many as its registers and its shared memory suffice for."""
    registers = int(re.search(r"REG:(\d+)", _ask("--dump-resource-usage", kernel, tmp_path))[1])
    warp = -(-32 * registers // 256) * 256
    return min(65536 // (warp * kernel.metadata.num_warps), (SHARED_MEMORY + 1024) // (kernel.metadata.shared + 1024))


def instructions(kernel, tmp_path):
    """Names of the kernel's machine instructions, in order."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", _ask("-sass", kernel, tmp_path))


def _ask(what, kernel, tmp_path):
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    return subprocess.run([TOOL, what, tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
