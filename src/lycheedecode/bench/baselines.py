"""Full attention of others on the same tensors: the fastest of all, ours included, is what speed-ups refer to.

Each maker takes a query `[B, Hq, D]` and a contiguous cache whose every slot holds a token, and returns a call that
returns `[B, Hq, D]`; or it raises, when the machine cannot do it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops
from ..ops import KV

Attention = Callable[[], Tensor]


def ours(query: Tensor, kv: KV, scale: float) -> Attention:
    return lambda: ops.attend(query, kv, scale)


def sdpa(backend: SDPBackend, query: Tensor, kv: KV, scale: float) -> Attention:
    """PyTorch's, the query heads of a group as if they were query tokens: a decode step needs no mask."""
    grouped = query.unflatten(1, (kv.keys.shape[1], -1))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(grouped, kv.keys, kv.values, scale=scale).flatten(1, 2)

    return call


def flashinfer(query: Tensor, kv: KV, scale: float) -> Attention:
    """FlashInfer's batch decoding on tensor cores, pages of 64 tokens cut out of the same cache."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page = 64
    batch, heads, slots, dim = kv.keys.shape
    pages = [cache.view(batch, heads, slots // page, page, dim).transpose(1, 2) for cache in (kv.keys, kv.values)]
    pages = [cache.reshape(-1, heads, page, dim) for cache in pages]  # copies: its pages hold all heads
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    per_sequence = slots // page
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=query.device) * per_sequence,
        torch.arange(batch * per_sequence, dtype=torch.int32, device=query.device),
        torch.full((batch,), page, dtype=torch.int32, device=query.device),
        *(query.shape[1], heads, dim, page),
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
        sm_scale=scale,
    )
    return lambda: wrapper.run(query, tuple(pages))


def all_baselines() -> dict[str, Callable[[Tensor, KV, float], Attention]]:
    """Makers by name."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    makers = {f"sdpa {name}": _with_backend(backend) for name, backend in backends.items()}
    return {"ours": ours, **makers, "flashinfer": flashinfer}


def _with_backend(backend: SDPBackend) -> Callable[[Tensor, KV, float], Attention]:
    return lambda query, kv, scale: sdpa(backend, query, kv, scale)
