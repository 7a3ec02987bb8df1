"""LycheeDecode: every head is sparse; a few of them look first."""

from importlib import import_module, metadata
from typing import Any

from .config import HybridConfig
from .errors import LycheeError
from .plan import HeadPlan, PlanError

try:
    __version__ = metadata.version("lycheedecode")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

# These need transformers, whose import takes seconds, so they are looked up when they are first asked for.
_LATER = {
    "Context": ".engine",
    "Engine": ".engine",
    "Generation": ".engine",
    "IdentifySettings": ".identify",
    "Piece": ".engine",
    "Sampling": ".engine",
    "hybrid": ".integrations.transformers",
    "load_model": ".models",
}

__all__ = [
    "Context",
    "Engine",
    "Generation",
    "HeadPlan",
    "HybridConfig",
    "IdentifySettings",
    "LycheeError",
    "Piece",
    "PlanError",
    "Sampling",
    "__version__",
    "hybrid",
    "identify",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name == "identify":  # a package that can be called, so that importing it changes nothing
        return import_module(".identify", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
