"""Tiny GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers
from torch import Tensor, nn

# A token for every byte but the last two, whose place the merges take.
TOKENS = ["<pad>", "<s>", "</s>", "<user>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:-2], "ab", "cd"]
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(
    path: Path,
    model: nn.Module,
    architecture: str = "llama",
    *,
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: Collection[str] = (),
) -> Path:
    """Write a model as a GGUF file.

    Args:
        model: of `tiny`: Llama, Qwen2 or Qwen3.
        architecture: GGUF's name of its architecture.
        values: further metadata.
        tensors: further tensors.
        without: keys of the metadata and names of tensors to leave out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_metadata(model.config, architecture), **(values or {})}.items():
        if key in without:
            continue
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add.get(type(value), writer.add_array)(key, value)
    weights = {_name(name): _array(name, weight, model.config, architecture) for name, weight in _own(model)}
    for name, weight in {**weights, **(tensors or {})}.items():
        if name not in without:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return {f"{architecture}.{key}": value for key, value in own.items()} | {
        f"{architecture}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(TOKENS) - 4),
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _own(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, weight.float()) for name, weight in model.named_parameters()]  # a tied head is left out, as there


def _name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module.startswith("model.layers."):
        block, _, inner = module.removeprefix("model.layers.").partition(".")
        return f"blk.{block}.{_NAMES[inner]}.{suffix}"
    return f"{_NAMES[module]}.{suffix}"


def _array(name: str, weight: Tensor, config: Any, architecture: str) -> np.ndarray:
    """Llama's files interleave the two halves that a rotation pairs."""
    array = weight.detach().numpy()
    for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if architecture == "llama" and projection in name:
            paired = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = paired.swapaxes(1, 2).reshape(array.shape)
    return np.ascontiguousarray(array)
