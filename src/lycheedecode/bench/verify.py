"""Every operation against the reference, on the very tensors that are timed. A mismatch ends the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from .. import ops
from ..config import HybridConfig, ScanKeys
from ..errors import MismatchError
from ..ops import KV, Selections, SmallKeys, reference
from .workload import SMALL, Workload

_TIMES, _DRAWS = 2, 3
"""Logits may be so many times as far off as rounding moves them, by the furthest of so many draws."""


@contextmanager
def rounded_otherwise(seed: int) -> Iterator[None]:
    """While this is open, what innermost modules return is moved by up to half a unit in its last place.

    Eager steps then differ as if they rounded in other places, as compiled ones do. It is for one thread at a time: the
    hook is of all modules, for whichever copy of a model decodes.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def move(module: nn.Module, _: Any, result: Any) -> Any:
        if not isinstance(result, Tensor) or not result.is_floating_point() or any(True for _ in module.children()):
            return None
        device = result.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        places = torch.rand(result.shape, generator=generator, device=device, dtype=torch.float64) - 0.5
        return (result.double() * (1 + torch.finfo(result.dtype).eps * places)).to(result.dtype)

    hook = register_module_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def check_logits(what: str, compute: Callable[[], Tensor], eager: Callable[[], Tensor]) -> tuple[float, Tensor, Tensor]:
    """Logits of steps against those of eager steps: as close as rounding allows, which is measured, not assumed.

    How far rounding moves logits grows with the model's depth, and with selections, where it decides between blocks
    that are equally good. So the eager steps run again, rounded otherwise. A real fault shows: attention's scale off by
    a tenth moves logits several times as far.

    Returns:
        The relative error, the logits and the eager ones.

    Raises:
        MismatchError: the steps are further off than that.
    """
    expected, moved = eager(), 0.0
    for seed in range(_DRAWS):
        with rounded_otherwise(seed):
            moved = max(moved, relative_error(eager(), expected))
    result = compute()
    error, allowed = relative_error(result, expected), _TIMES * moved
    if not error <= allowed:
        raise MismatchError(f"{what} differ from the eager step's by {error:.1e} (rounding allows {allowed:.1e}).")
    return error, result, expected


def relative_error(result: Tensor, expected: Tensor) -> float:
    """`|result - expected| / |expected|`; NaN stays NaN."""
    difference = (result.float() - expected.float()).norm()
    return (difference / expected.float().norm().clamp(min=1e-30)).item()


def check_close(what: str, result: Tensor, expected: Tensor, tolerance: float) -> float:
    """The relative error; raises `MismatchError` above `tolerance`."""
    error = relative_error(result, expected)
    if not error <= tolerance:
        raise MismatchError(f"{what} differs from the reference by {error:.2e} (allowed: {tolerance:.0e}).")
    return error


def check_same_blocks(what: str, result: Selections, expected: Selections, scores: Tensor) -> None:
    """Raise `MismatchError` unless both hold equally many blocks, none twice, of the same `scores`.

    Two ways of adding up a score differ in its last digits; where those decide, either block is right.
    """
    blocks, right = result.blocks.sort(-1).values, expected.blocks.sort(-1).values
    repeated = (blocks[..., 1:] == blocks[..., :-1]) & (blocks[..., 1:] >= 0)
    same = torch.equal(result.counts, expected.counts) and torch.equal(blocks < 0, right < 0) and not repeated.any()
    if not same or not torch.allclose(_worth(blocks, scores), _worth(right, scores), rtol=1e-4, atol=0.0):
        raise MismatchError(f"{what} selects other blocks than the reference.")


def _worth(blocks: Tensor, scores: Tensor) -> Tensor:
    """Scores of the chosen blocks, in order; those that no token of the cache belongs to have none."""
    found = scores.gather(-1, blocks.long().clamp(0, scores.shape[-1] - 1))
    return found.masked_fill((blocks < 0) | (blocks >= scores.shape[-1]), 0.0).sort(-1).values


def verify(work: Workload, config: HybridConfig) -> dict[str, float]:
    """Check the operations on the first cache of a workload; returns their relative errors."""
    (query, kv), scale, size = work.inputs(0), work.shape.scale, config.block_size
    heads = tuple(range(work.shape.kv_heads))
    exact = work.shape.dtype == torch.float32
    where = f"batch {work.batch}, context {work.context}, blocks of {size}"
    errors = {}

    dense = by_sequence(lambda q, cache, _: reference.attend(q, cache, scale), query, kv)
    errors["attend"] = check_close(f"attend ({where})", ops.attend(query, kv, scale), dense, 1e-5 if exact else 1e-2)

    scores = ops.scan_blocks(query, kv, heads, size, scale)
    expected = by_sequence(lambda q, cache, _: reference.scan_blocks(q, cache, heads, size, scale), query, kv, dim=1)
    errors["scan_blocks"] = check_close(f"scan_blocks ({where})", scores, expected, 1e-4)
    if ops.has_float8(query.device):
        for bits, form in SMALL:
            what = f"scan_blocks, {bits}"
            errors[what] = _verify_copy(query, kv, heads, size, scale, form, f"{what} ({where})")

    right, mine, fused = (work.selections(config, len(heads)) for _ in range(3))
    reference.select_blocks(scores, kv, config, right)
    ops.select_blocks(scores, kv, config, mine)
    check_same_blocks(f"select_blocks ({where})", mine, right, scores)
    ops.scan_select(query, kv, heads, config, scale, fused)
    check_same_blocks(f"scan_select ({where})", fused, right, scores)

    selections, rows = work.random_selections(config)
    result = ops.attend_blocks(query, kv, selections, rows[0], size, scale)
    expected = reference.attend_blocks(query, kv, selections, rows[0], size, scale)
    errors["attend_blocks"] = check_close(f"attend_blocks ({where})", result, expected, 1e-5 if exact else 1e-2)
    return errors | _verify_completion(work, replace(config, completion="centroid"), where)


def _verify_completion(work: Workload, config: HybridConfig, where: str) -> dict[str, float]:
    """Means, what selections take of chunks, and attention with both."""
    (query, kv), scale, size = work.inputs(0), work.shape.scale, config.block_size
    exact, errors = work.shape.dtype == torch.float32, {}
    completion, complete = work.completion(0, config), (work.context - 1) // config.chunk_tokens
    assert completion is not None  # the config completes
    right = torch.zeros_like(completion.keys), torch.zeros_like(completion.values)
    reference.write_means(kv, config.chunk_tokens, *right, None, kv.slots)
    for name, means, expected in zip(("keys", "values"), completion[:2], right, strict=True):
        what = f"mean {name}"
        errors[what] = check_close(f"{what} ({where})", means, expected, 1e-6 if exact else 1e-2)

    selections = work.selections(config, work.shape.kv_heads)
    ops.scan_select(query, kv, tuple(range(work.shape.kv_heads)), config, scale, selections)
    assert selections.taken is not None
    taken = selections.taken.clone()
    selections.count_taken(config.chunk_tokens // size)
    if not torch.equal(taken[..., :complete], selections.taken[..., :complete]):
        raise MismatchError(f"scan_select ({where}) counts other blocks of chunks than it selects.")

    rows = torch.arange(work.shape.kv_heads, device=query.device)
    result = ops.attend_blocks(query, kv, selections, rows, size, scale, completion=completion)
    expected = reference.attend_blocks(query, kv, selections, rows, size, scale, completion=completion)
    what = "attend_blocks, completed"
    return errors | {what: check_close(f"{what} ({where})", result, expected, 1e-5 if exact else 1e-2)}


def _verify_copy(
    query: Tensor, kv: KV, heads: tuple[int, ...], size: int, scale: float, form: ScanKeys, what: str
) -> float:
    """The same scan of a copy in 8 or 4 bits."""
    copy = SmallKeys.allocate(form, kv.keys.shape[:3], kv.keys.shape[3], query.device)
    reference.write_copy(copy, kv.keys, heads, 0, kv.slots)
    scores = ops.scan_blocks(query, kv, heads, size, scale, copy=copy)

    def by_reference(q: Tensor, cache: KV, b: int) -> Tensor:
        return reference.scan_blocks(q, cache, heads, size, scale, copy=copy.views(lambda part: part[b : b + 1]))

    expected = by_sequence(by_reference, query, kv, dim=1)
    return check_close(what, scores, expected, 1e-4)


def by_sequence(operation: Callable[[Tensor, KV, int], Tensor], query: Tensor, kv: KV, dim: int = 0) -> Tensor:
    """The reference, one sequence of a contiguous cache at a time: it makes float32 copies."""
    results = []
    for b in range(kv.batch):
        one = KV(kv.keys[b : b + 1], kv.values[b : b + 1], *(None if t is None else t[b : b + 1] for t in kv[2:4]))
        results.append(operation(query[b : b + 1], one, b))
    return torch.cat(results, dim)
