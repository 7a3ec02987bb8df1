"""A KV cache in host memory: the GPU holds what scans read, and the blocks that selections ask for again and again.

    cache      keys and values of all layers with full attention, in host memory; prompts pass through it
    store      per attention: pools of blocks on the GPU, which blocks lie in them, the newest tokens
    attention  hybrid attention over that, and its decode step

A step appends its token to the tail of the pools and to the keys that are scanned. Retrieval heads scan as ever; what
they select and the store lacks is fetched from host memory for every head that reads the selection. Then all heads
attend through the places where their blocks lie. Tokens go to host memory a block at a time, between two steps.
"""

from .attention import OffloadedAttention, OffloadedState, OffloadStep
from .cache import HostCache
from .pinned import HostMemoryError

__all__ = ["HostCache", "HostMemoryError", "OffloadStep", "OffloadedAttention", "OffloadedState"]
