"""Runs the kernels' tests in Triton's interpreter: in few processes, for each takes seconds to start."""

import re
from importlib.util import find_spec
from pathlib import Path

import interpreter
import pytest
import torch

FOLDER = Path(__file__).parent
FUSION = FOLDER.parent / "fusion"
PARTS = {
    "dense": ("dense", [FOLDER / "test_attend_triton.py"]),
    "blocks": ("blocks", [FOLDER / "test_attend_triton.py"]),
    "scan": ("", [FOLDER / "test_scan_triton.py"]),
    "select": ("", [FOLDER / "test_select_triton.py"]),
    "complete": ("", [FOLDER / "test_complete_triton.py"]),
    "several": ("", [FOLDER / f"test_{name}_triton.py" for name in ("tokens", "operators", "serving", "paged")]),
    "layouts": ("", [FOLDER / "test_layouts_triton.py"]),
    "small": ("", [*(FOLDER / f"test_{name}.py" for name in ("append", "count", "fetch", "noise")),
                   FUSION / "test_linear_triton.py"]),
}  # fmt: skip
"""Which tests, and of which files."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU these files run on their own.")
@pytest.mark.skipif(find_spec("triton") is None, reason="The kernels need Triton.")
@pytest.mark.parametrize(("chosen", "files"), PARTS.values(), ids=PARTS)
def test_kernels_in_the_interpreter(chosen, files):
    interpreter.run_tests("-k", chosen, *files)


def test_every_test_of_the_kernels_is_in_a_part():
    files = {path for folder in (FOLDER, FUSION) for path in folder.glob("test_*.py")} - {Path(__file__)}
    kernels = {path for path in files if re.search("^from kernel_cases|TRITON_INTERPRET", path.read_text(), re.M)}
    assert kernels == {path for _, paths in PARTS.values() for path in paths}
