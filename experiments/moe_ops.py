"""`python -m experiments.moe_ops bench serving ...`: commands for a vLLM that lacks its kernels for experts.

Such a package still has Triton's kernels for the experts themselves. What is missing, routing and sums, is made up for
in plain PyTorch: slower by some launches a layer, for stock vLLM and for the plugin alike. The command is one of
`lycheedecode`, or `serving-probe`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

_SCHEMAS = {
    "topk_softmax": (
        "(Tensor! weights, Tensor! ids, Tensor! source, Tensor logits, bool renormalize, Tensor? bias=None) -> ()"
    ),
    "moe_align_block_size": (
        "(Tensor ids, int experts, int block, Tensor! sorted_ids, Tensor! expert_of_block, Tensor! padded, "
        "Tensor? map=None) -> ()"
    ),
    "moe_sum": "(Tensor input, Tensor! output, Tensor? ids=None, Tensor? map=None) -> ()",
}


def topk_softmax(
    weights: Tensor, ids: Tensor, source: Tensor, logits: Tensor, renormalize: bool, bias: Any = None
) -> None:
    """The `k` most probable experts of each token `[T, E]`, and how probable they are, `[T, k]`."""
    found, chosen = logits.float().softmax(-1).topk(ids.shape[1], -1)
    weights.copy_(found / found.sum(-1, keepdim=True) if renormalize else found)
    ids.copy_(chosen)


def moe_align_block_size(
    ids: Tensor, experts: int, block: int, sorted_ids: Tensor, expert_of_block: Tensor, padded: Tensor, map: Any = None
) -> None:
    """Sort the entries of `ids` by expert, each expert's from a multiple of `block` on; gaps become `ids.numel()`."""
    flat = ids.flatten().long()
    counts = torch.zeros(experts, dtype=torch.long, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    rooms = (counts + block - 1) // block * block
    ends, order = rooms.cumsum(0), flat.argsort(stable=True)
    expert = flat[order]
    rank = torch.arange(len(flat), device=ids.device) - (counts.cumsum(0) - counts)[expert]
    sorted_ids.fill_(len(flat))
    sorted_ids[(ends - rooms)[expert] + rank] = order.to(sorted_ids.dtype)
    first = torch.arange(len(expert_of_block), device=ids.device) * block
    expert_of_block.copy_(torch.searchsorted(ends, first, right=True).clamp(max=experts - 1))
    padded.copy_(ends[-1:])


def moe_sum(input: Tensor, output: Tensor, ids: Tensor | None = None, map: Tensor | None = None) -> None:
    """`[T, k, D]` -> `[T, D]`."""
    torch.sum(input, 1, out=output)


def install(library: str = "_moe_C") -> list[str]:
    """Give PyTorch those operations of vLLM's library that it lacks; their names."""
    fragment = torch.library.Library(library, "FRAGMENT")
    missing = [name for name in _SCHEMAS if not hasattr(getattr(torch.ops, library), name)]
    for name in missing:
        fragment.define(name + _SCHEMAS[name])
        fragment.impl(name, globals()[name], "CompositeExplicitAutograd")
    _kept.append(fragment)  # which takes its operations with it
    return missing


_kept: list[Any] = []


def main() -> None:
    """Install, in this process, in which vLLM then runs its model; then what the command line says."""
    from vllm.platforms import current_platform

    from experiments.__main__ import app as experiments
    from lycheedecode.cli import app

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    current_platform.import_kernels()
    print(f"made up for in PyTorch: {', '.join(install()) or 'nothing'}", file=sys.stderr)
    (experiments if sys.argv[1:2] == ["serving-probe"] else app)(sys.argv[1:])


if __name__ == "__main__":
    main()
