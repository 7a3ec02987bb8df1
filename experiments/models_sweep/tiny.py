"""A tiny random model of any causal class of transformers.

A config class says what its fields are called; fields that go by one of the usual names get a small value. `ODD` holds
what a class needs besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 4, 4, 2, 16, 160
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "embed_dim", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "d_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    "encoder_attention_heads": HEADS,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), KV_HEADS),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv", "d_head", "global_head_dim", "v_head_dim"), DIM),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"), 512
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "local_window_size"), 24),
    "num_kv_shared_layers": 2,
    "rotary_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    **dict.fromkeys(("is_decoder", "use_cache"), True),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Values of fields, by the names that config classes give them."""

ODD: dict[str, dict[str, Any]] = {
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": KV_HEADS, "clip_qkv": 8.0}},
    "BailingHybridForCausalLM": {"n_group": 1, "topk_group": 1},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "ReformerModelWithLMHead": {"axial_pos_embds": False},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
}
"""Fields by class of model, that override `SMALL`."""

NOT_ALONE = {"Gemma4AssistantForCausalLM": "It drafts for another model, whose keys and values all its layers share."}
"""Classes that transformers builds and runs only beside another model, and why."""


def make(class_name: str, **fields: Any) -> nn.Module:
    """A random float32 model in eval mode, the same every time, whose attention is sharp; `fields` go to its config."""
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model = sharpen(model_class(shrunk(model_class.config_class, {**ODD.get(class_name, {}), **fields})))
    model.generation_config.eos_token_id = None  # all generations are equally long
    return model.eval().requires_grad_(False)


def outline(class_name: str) -> nn.Module:
    """The model of a class's own default config, without memory for its weights."""
    import transformers

    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        return model_class(model_class.config_class())


def shrunk(config_class: type, odd: dict[str, Any]) -> Any:
    """A small config of the class; those inside it (of text, say) are small too."""
    default = config_class()
    fields = default.to_dict()
    values = {name: SMALL[name] for name in fields if name in SMALL}
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        values["head_dim"] = SMALL["qk_rope_head_dim"]
    if "sliding_window" in fields and not fields.get("layer_types"):
        values["sliding_window"] = None  # it would hold for every layer
    layers, nested = _of_layers(fields), set()
    for name, value in fields.items():
        inner = getattr(default, name, None) if isinstance(value, dict) else None
        if hasattr(inner, "model_type"):
            values[name] = shrunk(type(inner), odd.get(name, {}))
            nested.add(name)
        elif layers and isinstance(value, list) and len(value) == layers:
            values[name] = _few(value)
    return config_class(**{**values, **{k: v for k, v in odd.items() if k not in nested}})


def _of_layers(fields: dict[str, Any]) -> int:
    """How many layers a config has."""
    return next((fields[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if fields.get(name)), 0)


def _few(of_layers: list[Any]) -> list[Any]:
    """An entry for each layer of a small model, taking the kinds of entries in turn."""
    kinds = [kind for i, kind in enumerate(of_layers) if kind not in of_layers[:i]]
    return [kinds[i % len(kinds)] for i in range(LAYERS)]


@torch.no_grad()
def sharpen(model: nn.Module) -> nn.Module:
    """Larger weights than training starts from: then it matters which tokens are attended to."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.endswith("weight") and parameter.is_floating_point():
            parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
    return model.float()
