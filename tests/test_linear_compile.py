"""The linear kernel compiles for a Hopper GPU, without one: loads in flight, no spilled sums, early starts."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="The kernel needs Triton.")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("On a GPU the kernel compiles where it runs.", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from lycheedecode.linear.triton import linear  # noqa: E402
from lycheedecode.ops.triton import common  # noqa: E402

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LLAMA_3_8B = [((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336), ((128256,), 4096)]


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Kernels that were launched, compiled and not run."""
    found, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **constants):
        found.append(run(self, *arguments, grid=grid, warmup=True, **constants))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(common, "starts_early", lambda device: True)
    return found


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize(("sizes", "columns"), LLAMA_3_8B, ids=str)
def test_default_launches(compiled, rows, sizes, columns, tmp_path):
    x = torch.empty(rows, columns, dtype=torch.bfloat16)
    weights = [torch.empty(size, columns, dtype=torch.bfloat16) for size in sizes]  # memory that nobody touches
    gated = len(sizes) == 2
    norm = None if len(sizes) == 1 else x[0]
    residual = torch.empty(rows, 4096, dtype=torch.bfloat16) if sizes == (4096,) else None
    linear(x, weights, [], residual, norm, 1e-5, gated)
    (kernel,) = compiled
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOL, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True)
    assert int(re.search(r"STACK:(\d+)", usage.stdout)[1]) <= 8  # one address at most, no sums
    assert kernel.metadata.shared <= 113 * 1024  # two programs at least
    ptx = kernel.asm["ptx"]
    assert "cp.async.cg" in ptx
    assert ptx.index("bulk.prefetch") < ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
    assert "ld.global" not in ptx[: ptx.index("griddepcontrol.wait")]
