"""`python newer_vllm.py 0.33.0`: that version's Python code over the kernels of the CPU build installed here.

CPU builds of vLLM come later than its releases. What the plugin relies on is Python; the kernels under it change less.
So the code of a release without a CPU build runs over the kernels of the last one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


def main(version: str) -> None:
    """Replace the Python code of the installed vLLM."""
    site = Path(sysconfig.get_path("purelib"))
    installed = site / "vllm"
    kernels = {path.name: path.read_bytes() for path in installed.glob("*.so")}
    with tempfile.TemporaryDirectory() as folder:
        wanted = ["--no-deps", "--only-binary=:all:", "--target", folder, f"vllm=={version}"]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
        shutil.rmtree(installed)
        shutil.copytree(Path(folder) / "vllm", installed, ignore=shutil.ignore_patterns("*.so"))
    for name, kernel in kernels.items():
        (installed / name).write_bytes(kernel)
    for old in site.glob("vllm*.dist-info"):
        shutil.rmtree(old)
    about = site / f"vllm-{version}+cpu.dist-info"  # by this name vLLM knows that it has no GPU
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    main(sys.argv[1])
