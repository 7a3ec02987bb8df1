"""Models to time: of well-known shapes with random weights, made on the device, or real; caches of random numbers."""

from __future__ import annotations

import gc
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine.cache import KVCache
from ..engine.engine import Context
from ..errors import ConfigError
from ..models.load import load_model, load_tokenizer
from ..models.shape import ModelShape, positions_of
from ..plan import HeadPlan, bundled_plan_of, bundled_plans
from ..prompts.text import load_text
from .workload import Shape, spread_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONG = 1 << 21
_STRETCH, _STRONG = 64, 8
"""Stretches of so many tokens, and how many of a context have strong keys: attention prefers them, as it prefers some
tokens in trained models. Hardly anything then depends on which of the others lie at the edge of a selection, if these
fit into it: a quarter of the usual budget holds them, which is the least that `hybrid+budgets` gives a head."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "Llama",
        {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "llama-3-70b": (
        "Llama",
        {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "qwen3-8b": (
        "Qwen3",
        {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        {"num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 151936,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    ),
    "tiny": (
        "Llama",
        {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 512,
         "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    ),
}  # fmt: skip
"""Family in transformers, and its settings."""


def build(name: str, layers: int | None = None, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model in eval mode: a random one of `MODELS`, which `layers` cuts short, or a real one with a bundled plan."""
    if name not in MODELS:
        if bundled_plan_of(name) is None:
            known = ", ".join([*MODELS, *bundled_plans()])
            raise ConfigError(
                f"There is no model {name!r} to time, random or with a bundled plan: take one of {known}."
            )
        if layers:
            raise ConfigError("--layers cuts random models only.")
        return load_model(name, device=device)[0]
    return build_from(random_config(name, layers), device, dtype)


def build_from(config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """A model of a config of transformers, with random weights, in eval mode."""
    import transformers

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, config.architectures[0])(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def check_positions(model: nn.Module, context: int, tokens: int) -> None:
    """Refuse a generation that would end early: its time would be divided among steps that it never made."""
    most = positions_of(model).most
    if 0 < most < context + tokens - 1:
        raise ConfigError(
            f"{context} tokens and {tokens} new ones do not fit the model's {most} positions: ask for fewer."
        )


def prompts_for(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """int64 `[batch, length]`: for real models stretches of prose, for random ones random tokens."""
    name = ModelShape.of(model).name
    if bundled_plan_of(name) is None:
        return torch.randint(4, model.config.vocab_size, (batch, length))
    text = torch.tensor(load_tokenizer(name)(load_text("prose"), verbose=False).input_ids)
    if length > len(text):
        raise ConfigError(f"The prose that comes with Python has {len(text)} tokens, not {length}.")
    starts = torch.randint(len(text) - length + 1, (batch,)).tolist()
    return torch.stack([text[start : start + length] for start in starts])


def random_config(name: str, layers: int | None = None, **changes: Any) -> Any:
    """The transformers config of a model of `MODELS`."""
    import transformers

    family, settings = MODELS[name]
    plain = {
        "max_position_embeddings": _LONG,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "architectures": [f"{family}ForCausalLM"],
        "num_hidden_layers": layers or settings["num_hidden_layers"],
    }
    return getattr(transformers, f"{family}Config")(**{**settings, **plain, **changes})


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step must read: all but the table of embeddings, of which it reads a row."""
    table = model.get_input_embeddings().weight
    return sum(weight.nbytes for weight in model.parameters() if weight is not table)


def plan_for(model: PreTrainedModel) -> HeadPlan:
    """The bundled plan; of random models an eighth of the heads, layer 0 and others spread over every second layer."""
    shape = ModelShape.of(model)
    if (bundled := bundled_plan_of(shape.name)) is not None:
        return bundled
    heads = shape.num_layers * shape.num_kv_heads
    spread = Shape(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.num_layers, max(heads // 8, shape.num_kv_heads)
    )
    return spread_plan(spread)


@torch.inference_mode()
def random_context(model: PreTrainedModel, batch: int, length: int, room: int) -> Context:
    """A context as if `batch` prompts of `length` tokens had been prefilled, with random keys and values."""
    shape, table = ModelShape.of(model), model.get_input_embeddings().weight
    cache = KVCache(shape.num_layers)
    cache.reserve(length + room)
    token = table.new_empty(batch, shape.num_kv_heads, 1, shape.head_dim)
    for layer in cache.layers:
        layer.lazy_initialization(token, token)
    strength = _strengths(cache.layers[0].store[0])
    for layer in cache.layers:
        keys, values = layer.store
        keys.normal_().mul_(strength)
        values.normal_()
        layer.length = length
    logits = torch.zeros(batch, table.shape[0], device=table.device)
    with torch.inference_mode(False):  # engines add to it outside inference mode, too
        kv_bytes = torch.zeros(batch, dtype=torch.float64, device=table.device)
    return Context(cache, logits, [length] * batch, 0.0, kv_bytes)


def _strengths(keys: torch.Tensor) -> torch.Tensor:
    """Scale of the keys, `[B, 1, S, 1]`: the same for all heads and layers, which choose for each other."""
    batch, _, slots, _ = keys.shape
    strong = torch.rand(batch, ceil(slots / _STRETCH), device=keys.device).argsort(-1) < _STRONG
    scale = torch.where(strong, 3.0, 0.25).to(keys.dtype).repeat_interleave(_STRETCH, 1)
    return scale[:, None, :slots, None]


def release() -> None:
    """Give memory back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
