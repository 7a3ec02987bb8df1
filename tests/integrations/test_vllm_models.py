"""Models of many kinds in vLLM with the plugin: experts, sinks, windows, linear attention, caches in 8 bits.

A request that switches hybrid attention off gets the stock backend's tokens, through our kernels' definitions; one that
does not gets others; both beside each other.
"""

import pytest
import tiny
import torch
from serving_engine import SETTINGS, TIGHT, generate, groups, serving
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
ALTERNATING = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8}
MADE = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
    "gpt-oss": (GptOssConfig, GptOssForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING}),
    "qwen3-next": (
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
        {
            **EXPERTS,
            **LINEAR,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["full_attention", "linear_attention"] * 2,
        },
    ),
}
CASES = {
    "mixtral": ("mixtral", 4, {"block_size": 32}),
    "qwen3-moe": ("qwen3-moe", 4, {"block_size": 32}),
    "gpt-oss": ("gpt-oss", 2, {"dtype": "bfloat16", "block_size": 32}),
    "qwen3-next": ("qwen3-next", 2, {"dtype": "bfloat16", "mamba_ssm_cache_dtype": "float32"}),
    "gemma3 in one cache group": ("gemma3", 2, {"disable_hybrid_kv_cache_manager": True}),
    "llama with a cache in 8 bits": ("llama", 4, {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "block_size": 32}),
}


def saved(name, folder):
    if name in MADE:
        config, model, own = MADE[name]
        torch.manual_seed(0)
        size = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "head_dim": 32,
        }  # vLLM's experts on a CPU want multiples of 32
        model(config(**{**tiny._SHAPE, **size, **own})).eval().save_pretrained(folder)
    else:
        tiny.model(name, head_dim=32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "layers", "options"), CASES.values(), ids=CASES)
def test_off_is_the_stock_backend_and_hybrid_is_not(tmp_path, name, layers, options):
    prompts, folder = tiny.prompts(60, 37, 90), saved(name, tmp_path)
    with serving(folder, **options) as llm:
        stock = generate(llm, prompts)
    plan = tiny.plan(sliding=(1, 3) if layers == 2 else ())
    with serving(folder, plan, {**TIGHT, **SETTINGS}, **options) as llm:
        [group] = groups(llm)
        assert len(group.layers) == layers
        assert generate(llm, prompts, asked=["off"] * 3) == stock
        hybrid = generate(llm, prompts)
        assert hybrid != stock
        assert generate(llm, prompts, asked=["off", None, "off"]) == [stock[0], hybrid[1], stock[2]]
        assert group.counters["hybrid_steps"] > 0
