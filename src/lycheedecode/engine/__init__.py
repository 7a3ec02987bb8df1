"""The engine: prefill, decode steps, and the generation loop."""

from .engine import Context, Engine
from .generation import Generation, Piece
from .sampling import Sampling

__all__ = ["Context", "Engine", "Generation", "Piece", "Sampling"]
