"""Runs the kernels' tests in Triton's interpreter."""

from importlib.util import find_spec
from pathlib import Path

import interpreter
import pytest
import torch

FOLDER = Path(__file__).parent
PARTS = {
    "dense": ("test_attend_triton.py", "dense"),
    "blocks": ("test_attend_triton.py", "blocks"),
    "tokens": ("test_tokens_triton.py", ""),
    "scan": ("test_scan_triton.py", ""),
    "select": ("test_select_triton.py", "not (scan_select or what_fits)"),
    "scan_select": ("test_select_triton.py", "scan_select or what_fits"),
    "operators": ("test_operators_triton.py", ""),
}
"""Files, and which of their tests: a few parts of about the same length."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU these files run on their own.")
@pytest.mark.skipif(find_spec("triton") is None, reason="The kernels need Triton.")
@pytest.mark.parametrize(("file", "chosen"), PARTS.values(), ids=PARTS)
def test_kernels_in_the_interpreter(file, chosen):
    interpreter.run_tests("-k", chosen, FOLDER / file)


def test_every_test_of_the_kernels_is_in_a_part():
    """Files with the skip of `kernel_cases`; the others that end in `_triton` run themselves."""
    files = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("test_*.py")}
    cases = {name for name, text in files.items() if "\nfrom kernel_cases import" in text}
    assert cases == {file for file, _ in PARTS.values()}
