"""The linear kernel compiles for a Hopper GPU, without one: loads in flight, no spilled sums, early starts."""

import pytest
import torch
from hopper import instructions, spilled_bytes

from lycheedecode.fusion.operator import EIGHT_BITS
from lycheedecode.fusion.triton import linear
from lycheedecode.ops import kernel_common as common

LLAMA_3_8B = [((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336), ((128256,), 4096)]


@pytest.mark.parametrize(("rows", "dtype"), [
    *[(rows, torch.bfloat16) for rows in (1, 8, 16, 18, 36)], *[(rows, EIGHT_BITS) for rows in (1, 4, 16)],
])  # fmt: skip
@pytest.mark.parametrize(("sizes", "columns"), LLAMA_3_8B, ids=str)
def test_default_launches(compiled, rows, dtype, sizes, columns, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "has_pdl", lambda device: True)
    x = torch.empty(rows, columns, dtype=torch.bfloat16)
    weights = [torch.empty(size, columns, dtype=dtype) for size in sizes]  # memory that nobody touches
    scales = [torch.empty(size) for size in sizes] if dtype == EIGHT_BITS else []
    gated = len(sizes) == 2
    norm = None if len(sizes) == 1 else x[0]
    residual = torch.empty(rows, 4096, dtype=torch.bfloat16) if sizes == (4096,) else None
    linear(x, weights, [], residual, norm, 1e-5, gated, scales)
    (kernel,) = compiled
    assert spilled_bytes(kernel, tmp_path) <= 8  # one address at most, no sums
    assert kernel.metadata.shared <= 113 * 1024  # two programs at least
    ptx = kernel.asm["ptx"]
    assert "cp.async.cg" in ptx
    assert ptx.index("bulk.prefetch") < ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
    assert "ld.global" not in ptx[: ptx.index("griddepcontrol.wait")]
    if dtype == EIGHT_BITS:
        names = instructions(kernel, tmp_path)
        assert any(name.startswith("F2FP") for name in names)  # conversions of two numbers
        assert not any(name.startswith("F2F.") for name in names)  # of one, at an eighth of the rate
        assert not any(name.startswith("HGMMA") for name in names)  # which would take loads of two numbers each
