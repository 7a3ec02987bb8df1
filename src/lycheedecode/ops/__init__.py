"""The operations of a decode step. A folder holds the contract, PyTorch reference and Triton kernels of related ones.

    scan/      scan_blocks     queries x keys of the retrieval heads      -> block scores                  [R, B, N]
               scan_select     scan_blocks and select_blocks, fused       -> selections                    [R, B, K]
    select/    select_blocks   block scores                               -> selections                    [R, B, K]
    attend/    attend_blocks   all heads, each over its donor's selection -> output                        [B, H * G, D]
               attend          dense, for comparison and the paper's form -> output                        [B, H * G, D]
               attend_tokens   dense and causal, the newest T tokens      -> output                        [B, T, Hq, D]
               attend_select   dense retrieval heads: attend, and select from the same weights
    complete/  write_means     tokens of whole chunks                     -> their mean key and value
    append/    append          the newest token, normed and rotated       -> the cache
    fetch/     plan_fetch ..   selected blocks in host memory             -> a store on the GPU (`ops.fetch`)
    noise/     add_noise       logits and the positions of their tokens   -> logits whose argmax is drawn  [rows, V]
    count/     count_bytes     what all of them read of the cache         -> added to a total              [B]

Dimensions: `B` sequences, `Hq` query heads, `Hkv` KV heads, `G = Hq / Hkv`, `D` head dim, `S` slots of the cache,
`N = ceil(S / block_size)` blocks, `K` selected blocks, `C` chunks, `R` retrieval heads, or rows of selections where
they have several, `H` the KV heads asked for.
Every query is the newest token of its sequence (of `attend_tokens`: one of the newest `T`), whose key and value are
already in the cache. Accumulation is float32.
"""

from .append import append
from .attend import attend, attend_blocks, attend_select, attend_tokens
from .complete import write_means
from .complete.means import ChunkMeans
from .count import count_bytes
from .noise import add_noise, seed_words
from .scan import has_float8, scan_blocks, scan_select
from .scan.copy import KeyCopy
from .select import select_blocks
from .small_keys import SmallKeys, key_bytes
from .types import EVERYTHING, KV, Completion, Selections, Shares

__all__ = [
    "EVERYTHING",
    "KV",
    "ChunkMeans",
    "Completion",
    "KeyCopy",
    "Selections",
    "Shares",
    "SmallKeys",
    "add_noise",
    "append",
    "attend",
    "attend_blocks",
    "attend_select",
    "attend_tokens",
    "count_bytes",
    "has_float8",
    "key_bytes",
    "scan_blocks",
    "scan_select",
    "seed_words",
    "select_blocks",
    "write_means",
]
