"""Runs `test_triton.py` in Triton's interpreter."""

from importlib.util import find_spec
from pathlib import Path

import interpreter
import pytest
import torch

CASES = Path(__file__).with_name("test_triton.py")
PARTS = {
    "dense": "dense",
    "blocks": "blocks",
    "scan": "test_scan and not scan_select",
    "select": "test_select",
    "scan_select": "scan_select",
    "tokens": "test_tokens",
    "the rest": "not (dense or blocks or test_scan or test_select or test_tokens)",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU test_triton.py runs by itself.")
@pytest.mark.skipif(find_spec("triton") is None, reason="The kernels need Triton.")
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_kernels_in_the_interpreter(part):
    interpreter.run_tests("-k", part, CASES)
