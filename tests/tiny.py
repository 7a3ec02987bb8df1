"""Tiny random models of several families, and a tokenizer with a token for every byte."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.attention import DecodeAttention, State

LAYERS, KV_HEADS = 4, 2
_SHAPE = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # sharp attention, so that leaving out a token shows
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    # Two layers of four look through a sliding window.
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "query_pre_attn_scalar": 16,
        },
    ),
}
REFUSED = {
    # Two layers of four have linear attention.
    "qwen3_next": (
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
        {
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 0,
        },
    ),
}
"""What the engine refuses, and what may be routed and identified all the same."""


def model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    """A random model in eval mode, the same one every time."""
    config_class, model_class, own = (FAMILIES | REFUSED)[family]
    torch.manual_seed(0)
    config = config_class(**{**_SHAPE, **own, **changes})
    return model_class(config).eval().requires_grad_(False).to(dtype)


def longrope(original: int) -> nn.Module:
    """Phi-3, whose positions change for texts longer than `original`."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": original,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    half = 48 // 4 // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [1.5 + i for i in range(half)],
        "factor": 4.0,
        "original_max_position_embeddings": original,
    }
    return Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=rope)).eval().requires_grad_(False)


def plan(sliding: tuple[int, ...] = ()) -> HeadPlan:
    """Four retrieval heads of eight; donors of the same and of earlier layers; `sliding` layers keep to themselves."""
    donors = [[(0, 0), (0, 1)], [(1, 0), (0, 0)], [(0, 1), (1, 0)], [(1, 0), (3, 1)]]
    for layer in sliding:
        donors[layer] = [(layer, head) for head in range(KV_HEADS)]
    if sliding:
        donors = [[donor if donor[0] not in sliding or donor[0] == layer else (0, donor[1]) for donor in row]
                  for layer, row in enumerate(donors)]  # fmt: skip
    return HeadPlan.from_donors(donors)


def plan_for(family: str) -> HeadPlan:
    """The plan that a family's layers allow."""
    return plan(sliding=(1, 3) if family == "gemma3" else ())


def config(budget_tokens: int | None = 24, **changes: Any) -> HybridConfig:
    """Blocks for prompts of a few dozen tokens, of which the default budget leaves out much and `ROOMY` nothing."""
    small = {"block_size": 4, "sink_tokens": 4, "recent_tokens": 4}
    return HybridConfig(**{"budget_tokens": budget_tokens, **small, **changes})


ROOMY = config(HybridConfig().budget_tokens)


def prompts(*lengths: int) -> list[list[int]]:
    """Random token ids, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 260, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts as `generate` takes them: padded on the left."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def bytes_read(
    attention: DecodeAttention, lengths: torch.Tensor, state: State | None, refreshed: bool, key_bytes: int
) -> list[float]:
    """What `count_bytes` counts for each sequence."""
    total = torch.zeros(len(lengths), dtype=torch.float64)
    attention.count_bytes(total, lengths, state, refreshed, key_bytes)
    return total.tolist()


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, no special ones and no chat template: identification without any download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Four special tokens, then one token for each byte."""
    specials = ["<pad>", "<s>", "</s>", "<user>"]
    characters = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>"],
        chat_template="{% for m in messages %}<user>{{ m.content }}</s>{% endfor %}",
    )
