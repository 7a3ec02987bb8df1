"""The attention function that takes the place of a Hugging Face model's own: dense for many tokens, ours for one.

`RoutedAttention` is what `models.route_attention` installs; `Engine` and `hybrid` differ only in how they tell it
where the tokens of a sequence lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .models import ModelError, ModelShape
from .plan import HeadPlan, PlanError

Decode = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]
"""`(layer, query [B, Hq, D], keys, values [B, Hkv, S, D], mask, scale) -> [B, Hq, D]`."""

_NOT_PLAIN = {
    "softcap": "softcapped logits",
    "s_aux": "attention sinks in the softmax",
    "position_bias": "a position bias",
    "output_attentions": "attention weights as an output",
}


class RoutedAttention:
    """Attention of a routed model.

    Several tokens at once, and layers that are not global, are dense: transformers' own SDPA. One token of a global
    layer goes to `decode`, unless that is None.
    """

    def __init__(self, shape: ModelShape, decode: Decode | None = None) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._dense = sdpa_attention_forward
        self._global_layers = frozenset(shape.global_layers)
        self.decode = decode

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        for name, what in _NOT_PLAIN.items():
            given = options.get(name)
            if given is not None and given is not False:
                raise ModelError(f"LycheeDecode decodes plain softmax attention only, not {what} ({name}).")
        if self.decode is None or query.shape[2] != 1 or module.layer_idx not in self._global_layers:
            return self._dense(module, query, key, value, attention_mask, scaling=scaling, **options)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = self.decode(module.layer_idx, query[:, :, 0], key, value, attention_mask, scale)
        return output[:, None], None


def supported_shape(model: nn.Module, plan: HeadPlan | None) -> ModelShape:
    """The shape of a model that can be decoded with a plan.

    Raises:
        ModelError: its attention does not pass through transformers' attention interface, is not plain, or spread over
            several devices.
        PlanError: the plan does not fit the model.
    """
    shape = ModelShape.of(model)
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"The attention of {shape.architecture} cannot be replaced (no attention interface).")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise ModelError(f"{shape.architecture} has multi-head latent attention, which has no KV heads to choose from.")
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ModelError(
            f"{shape.architecture} is spread over devices {', '.join(devices)}; decoding needs one device."
        )
    if not shape.global_layers:
        raise ModelError(f"{shape.architecture} has no layer with full attention, so there is nothing to make sparse.")
    if plan is not None:
        _check_plan(plan, shape)
    return shape


def _check_plan(plan: HeadPlan, shape: ModelShape) -> None:
    plan.check_fits(
        num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, architecture=shape.architecture
    )  # fmt: skip
    for layer in shape.global_layers:
        for head, donor in enumerate(plan.donors[layer]):
            if donor[0] not in shape.global_layers:
                raise PlanError(
                    f"The donor {donor} of layer {layer}, KV head {head} lies in a layer without full attention."
                )
