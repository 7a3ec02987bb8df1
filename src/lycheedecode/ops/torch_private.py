"""What we take from private parts of PyTorch, beside its pattern matcher (`fusion.patterns`).

Seen to work in torch 2.11 and 2.13; `tests/test_private.py` names the version in which something is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

TAKEN = (
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_flash_attention",
    "torch.ops.aten._scaled_dot_product_efficient_attention",
    "torch.ops.aten._scaled_dot_product_cudnn_attention",
    "torch._inductor.compile_fx.compile_fx",
    "torch._dynamo.config.recompile_limit",
    "torch._dynamo.config.accumulated_recompile_limit",
)
"""What has to be there; `torch.cpu._is_avx512_bf16_supported` may be missing, and
`torch._C._cuda_clearCublasWorkspaces` is in builds for GPUs only."""
_aten = torch.ops.aten


def flash_on_cpu(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of each query's mass: the public function returns the first alone."""
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, causal, scale=scale)


def flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """As `flash_on_cpu`, on a GPU; the head dim must be a multiple of 8."""
    output, mass = _aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal, scale=scale)[:2]
    return output, mass


def efficient(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """As `flash`, for any head dim, with as many KV heads as query heads; the masses may have a padded end."""
    found = _aten._scaled_dot_product_efficient_attention(query, keys, values, None, True, 0.0, causal, scale=scale)
    return found[0], found[1]


def cudnn(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """As `flash`, by cuDNN, which makes a plan for every new shape before it runs the first time."""
    found = _aten._scaled_dot_product_cudnn_attention(query, keys, values, None, True, 0.0, causal, scale=scale)
    return found[0], found[1].view(query.shape[:3])


def compile_by_inductor(gm: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> Any:
    """What a backend of `torch.compile` returns that leaves the rest of a graph to Inductor."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs), config_patches=options)


def many_compilations() -> AbstractContextManager[Any]:
    """While open, one function may be compiled for many models and batch sizes, which share one count."""
    return torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024)


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor computes in bfloat16; False where PyTorch does not say."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def clear_cublas_workspaces() -> None:
    """Give back what cuBLAS keeps for each stream; not while a captured graph that uses it is alive."""
    torch._C._cuda_clearCublasWorkspaces()
