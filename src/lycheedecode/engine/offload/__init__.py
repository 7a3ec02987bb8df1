"""A KV cache in host memory: the GPU holds the scanned keys and the recently selected blocks.

    cache      keys and values of all layers with full attention, in host memory; prompts pass through it
    store      per attention: pools of blocks on the GPU, the map of their blocks, the newest tokens
    attention  hybrid attention over that, and its decode step

A step appends its token to the tail of the pools and to the keys that are scanned. Retrieval heads scan as
usual; selected blocks that the store lacks are fetched from host memory for every head that reads the selection. Then
all heads attend to their blocks through the map. Tokens go to host memory a block at a time, between two steps.
"""

from .attention import OffloadedAttention, OffloadedState, OffloadStep
from .cache import HostCache
from .pinned import HostMemoryError

__all__ = ["HostCache", "HostMemoryError", "OffloadStep", "OffloadedAttention", "OffloadedState"]
