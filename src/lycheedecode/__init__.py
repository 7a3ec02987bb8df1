"""LycheeDecode: every head is sparse; a few of them look first."""

from importlib import metadata

from .config import HybridConfig
from .plan import HeadPlan, PlanError

try:
    __version__ = metadata.version("lycheedecode")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["HeadPlan", "HybridConfig", "PlanError", "__version__"]
