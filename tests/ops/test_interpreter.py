"""Runs `test_triton.py` in Triton's interpreter, in a process that has not imported Triton yet."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("test_triton.py")
PARTS = {
    "dense": "dense",
    "blocks": "blocks",
    "scan": "test_scan and not scan_select",
    "select": "test_select",
    "scan_select": "scan_select",
    "the rest": "not (dense or blocks or test_scan or test_select)",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU test_triton.py runs by itself.")
@pytest.mark.skipif(find_spec("triton") is None, reason="The kernels need Triton.")
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_kernels_in_the_interpreter(part):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part, str(CASES)]
    done = subprocess.run(command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
