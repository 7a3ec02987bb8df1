#!/usr/bin/env bash
# Software: triton 3.9.0, which compiles for Hopper (sm_90) without a GPU; its own cuobjdump.
# Input: two kernels that widen 8-bit floats (e4m3) to bfloat16: directly, and by float16 and float32.
# One would guess: the direct conversion is the cheaper one, and the detour at best compiles to the same.
# What happens: both take e4m3 to float16 two numbers at a time. From there the direct one converts every number by an
#   F2F of its own, an instruction of the conversion unit, which runs at a fraction of the usual rate; the detour widens
#   in the ordinary floating-point pipe and packs two bfloat16 at a time, without any F2F. Values are equal: e4m3 fits
#   in float16, and float16's part of it in bfloat16. A matrix product with 8-bit weights is bound by it.
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0
cat > "$folder/show.py" <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def direct(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def detour(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(tl.float16).to(tl.float32).to(tl.bfloat16))


def conversions(kernel):
    """Instructions of a thread that converts 16 numbers, by name."""
    aligned = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
    signature = {"x": "*fp8e4nv", "y": "*bf16", "N": "constexpr"}
    source = ASTSource(kernel, signature=signature, constexprs={"N": 2048}, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    binary = Path(sys.argv[1], "kernel.cubin")
    binary.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.check_output([tool, "-sass", binary], text=True)
    names = re.findall(r"/\*[0-9a-f]{4}\*/\s+([A-Z][A-Z0-9_.]+)", text)
    return {name: names.count(name) for name in sorted(set(names)) if name.startswith(("F2F", "HADD2"))}


found = {kernel.__name__: conversions(kernel) for kernel in (direct, detour)}
print(f"triton {triton.__version__}, sm_90: instructions for 16 numbers from e4m3 to bfloat16")
for name, counts in found.items():
    print(f"  {name}: {counts}")
slow = {name: sum(count for key, count in counts.items() if key.startswith("F2F.")) for name, counts in found.items()}
same = slow == {"direct": 16, "detour": 0}
print("an F2F for every number, unless one goes by float32" if same else "this has changed")
sys.exit(0 if same else 1)
PYTHON
TRITON_CACHE_DIR="$folder/cache" TRITON_DEFAULT_FP_FUSION=1 "$folder/venv/bin/python" "$folder/show.py" "$folder"
