"""Linear layers of a decode step: an operator near the memory's speed, and a `torch.compile` backend that uses it.

linear     x, weights of one input -> their outputs side by side, with what comes before and after them
backend    a graph that Dynamo traced -> the same with `linear` in it -> Inductor
"""

from typing import Any

from .operator import linear, reference

__all__ = ["backend", "linear", "reference"]


def __getattr__(name: str) -> Any:
    """The backend when it is asked for: Inductor takes more than a second to import, and not every engine compiles."""
    if name == "backend":
        from .graph import backend

        return backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
