"""Whether a model is still what it was when something was made of it: a copy of its weights, or a cache of its keys.

A merged adapter writes into `weight.data`, of which PyTorch keeps no count, and reading all weights to see it costs as
much as a decode step. So a few numbers of each parameter and buffer are compared, beside all that tells of a change at
once.

What transformers writes into modules while a model runs is no change: frequencies for long texts, the longest text so
far, the size of the last static cache, compiled calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 64
"""Numbers of each parameter and buffer that are compared, all over it."""
_PLAIN = (bool, int, float, str, type(None))
_NOT_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
_OF_RUNS = re.compile("inv_freq|rope_deltas|cache|compile")
"""In the names of attributes and buffers that passes write: `long_inv_freq`, `max_seq_len_cached`,
`_last_compile_config`."""


class ModelState:
    """What a model is now: modules, their plain attributes and hooks; where parameters and buffers are, and samples.

    Equal to another one as long as nothing is known to have changed in between.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = tuple((name, type(module), *_attributes(module)) for name, module in model.named_modules())
        buffers = [one for name, one in model.named_buffers() if not _OF_RUNS.search(name.rpartition(".")[2])]
        plain = [one for one in (*model.parameters(), *buffers) if _is_readable(one)]
        self._parameters = tuple((one.dtype, one.device, one.shape, one.data_ptr(), _version(one)) for one in plain)
        kinds: dict[Any, list[Tensor]] = {}
        for one in plain:
            flat = one.detach().reshape(-1)
            kinds.setdefault((one.dtype, one.device), []).append(flat[:: flat.numel() // _SAMPLES | 1])
        self._samples = [torch.cat(parts).view(torch.uint8) for parts in kinds.values()]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModelState):
            return NotImplemented
        same = (self._modules, self._parameters) == (other._modules, other._parameters)
        return same and all(map(torch.equal, self._samples, other._samples))

    __hash__ = None  # type: ignore[assignment]  # equal by tensors


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """Plain attributes, such as which adapters are active, and how many hooks there are."""
    hooks = _count(module._forward_hooks), _count(module._forward_pre_hooks)
    names = (name for name in vars(module) if name not in _NOT_ATTRIBUTES and not _OF_RUNS.search(name))
    return *hooks, *((name, _frozen(vars(module)[name])) for name in names)


def _count(hooks: Mapping[int, Any]) -> int:
    """How many there are, but for our own: `hybrid` watches its model, and keeps engines from it anyway."""
    return sum(not (getattr(hook, "__module__", None) or "").startswith("lycheedecode.") for hook in hooks.values())


def _frozen(value: Any) -> Any:
    """A number or a word, or what is in a short collection of them; of anything else, only its type."""
    if isinstance(value, _PLAIN):
        return value
    inside = tuple(value.values()) if isinstance(value, dict) else value
    if isinstance(inside, (list, tuple)) and len(inside) < 64 and all(isinstance(one, _PLAIN) for one in inside):
        return tuple(inside)
    return type(value)


def _is_readable(parameter: Tensor) -> bool:
    """Not a quantised tensor of another package, and not one that lies elsewhere until it is needed."""
    return type(parameter) in (nn.Parameter, Tensor) and not parameter.is_meta and parameter.numel() > 0


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
