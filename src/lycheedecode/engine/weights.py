"""Decode steps with weights in 8-bit floats: a step reads half the bytes, and everything else keeps the model's own.

    model ────────────────────────────────────────────────> prefill, passes that verify or correct
      └─ the same modules and parameters, but for its linear layers ──> decode steps

A weight becomes e4m3, with a scale in float32 for every output channel. When the model was changed, an
engine takes another copy at its next prefill.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeGuard
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HybridConfig
from ..errors import ConfigError, DeviceError, LycheeWarning
from ..fusion.operator import KERNEL_ROWS_8_BITS, quantize
from ..models.shape import inner_model
from ..models.state import ModelState
from ..ops.dispatch import KERNEL_DTYPES

_copies: WeakKeyDictionary[nn.Module, tuple[ReferenceType[nn.Module], ModelState]] = WeakKeyDictionary()
"""Engines of one model share its copy, as long as one of them lives and the model is what it was."""


class EightBitLinear(nn.Module):
    """A linear layer for few rows of input; where there are more, the original's weight is faster.

    Args:
        layer: the original, whose parameters it shares.
    """

    eight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        eight, scale = quantize(layer.weight)
        self.register_buffer("eight", eight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] > KERNEL_ROWS_8_BITS:
            return F.linear(x, self.weight, self.bias)
        biases = [] if self.bias is None else [self.bias]
        return torch.ops.lycheedecode.linear.default(x, [self.eight], biases, None, None, 0.0, False, [self.scale])


def model_of_steps(model: nn.Module, config: HybridConfig, state: ModelState) -> nn.Module:
    """What decode steps run: the model, or a copy with other linear layers that shares all parameters with it.

    Where memory does not suffice for the weights in 8 bits, it is the model, and a warning says so. `state` is
    the model's.

    Raises:
        ConfigError: the model has no linear layers to copy, or is quantised already.
        DeviceError: the GPU does not know 8-bit floats.
    """
    if config.step_weights == "model":
        return model
    known, made_of = _copies.get(model, (None, None))
    made = known() if known is not None else None
    if made is not None and made_of == state:
        return made
    _refuse_unfit(model)
    try:
        made = _copy(model)
    except torch.OutOfMemoryError:
        made = None  # what there is of it goes before memory is needed for anything else
    if made is None:
        said = "Memory does not suffice for weights in 8 bits: decode steps use the model's own."
        warnings.warn(said, LycheeWarning, stacklevel=5)
        return model
    _copies[model] = ref(made), state
    return made


def _refuse_unfit(model: nn.Module) -> None:
    if getattr(inner_model(model).config, "quantization_config", None) is not None:
        raise ConfigError("The weights of this model are quantised already: leave out step_weights.")
    layers = [module for module in model.modules() if _is_plain(module)]
    if not layers:
        raise ConfigError(
            "step_weights='float8' is for plain linear layers in 16 or 32 bits, and this model has none: leave it out."
        )
    device = layers[0].weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise DeviceError("8-bit floats (step_weights='float8') need a GPU of compute capability 8.9 or above.")


def _copy(model: nn.Module) -> nn.Module:
    shared: dict[int, Any] = {id(tensor): tensor for part in (model.parameters, model.buffers) for tensor in part()}
    made = copy.deepcopy(model, shared)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if _is_plain(child):
                setattr(parent, name, EightBitLinear(child))
    return made


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and module.weight.dtype in KERNEL_DTYPES
