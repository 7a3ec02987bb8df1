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
_PAGE = 64


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
    """FlashInfer's batch decoding on tensor cores."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page = _PAGE
    batch, heads, slots, dim = kv.keys.shape
    pages = [_pages(cache) for cache in (kv.keys, kv.values)]
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


def flash_of_vllm(query: Tensor, kv: KV, scale: float) -> Attention:
    """FlashAttention as vLLM calls it: the third on Hopper, the second elsewhere."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    batch, _, slots, _ = kv.keys.shape
    counts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    table = torch.arange(batch * (slots // _PAGE), dtype=torch.int32, device=query.device).view(batch, -1)
    keys, values = (_pages(cache).transpose(1, 2).contiguous() for cache in (kv.keys, kv.values))  # [P, page, Hkv, D]
    lengths = torch.full((batch,), slots, dtype=torch.int32, device=query.device)
    version = 3 if torch.cuda.get_device_capability(query.device)[0] == 9 else 2
    return lambda: flash_attn_varlen_func(
        *(query, keys, values, 1, counts, slots),
        seqused_k=lengths,
        softmax_scale=scale,
        causal=True,
        block_table=table,
        fa_version=version,
    )


def _pages(cache: Tensor) -> Tensor:
    """A contiguous cache `[B, Hkv, S, D]` in pages that hold all heads, `[P, Hkv, page, D]`; a copy."""
    batch, heads, slots, dim = cache.shape
    return cache.view(batch, heads, slots // _PAGE, _PAGE, dim).transpose(1, 2).reshape(-1, heads, _PAGE, dim)


def all_baselines() -> dict[str, Callable[[Tensor, KV, float], Attention]]:
    """Makers by name."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    makers = {f"sdpa {name}": _with_backend(backend) for name, backend in backends.items()}
    return {"ours": ours, **makers, "flashinfer": flashinfer, "flash of vllm": flash_of_vllm}


def _with_backend(backend: SDPBackend) -> Callable[[Tensor, KV, float], Attention]:
    return lambda query, kv, scale: sdpa(backend, query, kv, scale)
