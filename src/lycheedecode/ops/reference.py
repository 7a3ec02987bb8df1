"""Every operation in plain PyTorch, gathered: their definition, the oracle of every kernel, and the CPU path.

Written to be read next to the contracts, and not slow by carelessness: sparse heads gather only their blocks, query
heads of a group share one matrix product, nothing is expanded to `Hq` heads.
"""

from .append.reference import append
from .attend.reference import attend, attend_blocks, attend_select, attend_tokens
from .complete.reference import write_means
from .count.reference import count_bytes
from .scan.reference import (
    scan_blocks,
    write_copy,
    write_newest_to_copy,
    write_pages_to_copy,
    write_slots_to_copy,
)
from .select.reference import select_blocks

__all__ = [
    "append",
    "attend",
    "attend_blocks",
    "attend_select",
    "attend_tokens",
    "count_bytes",
    "scan_blocks",
    "select_blocks",
    "write_copy",
    "write_means",
    "write_newest_to_copy",
    "write_pages_to_copy",
    "write_slots_to_copy",
]
