"""Linear layers of a decode step: an operator near the memory's speed, and a `torch.compile` backend that uses it.

linear     x, weights of one input -> their outputs side by side, with what comes before and after them
backend    a graph that Dynamo traced -> the same with `linear` in it -> Inductor
"""

from .graph import backend
from .operator import linear, reference

__all__ = ["backend", "linear", "reference"]
