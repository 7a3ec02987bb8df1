"""Classes of transformers, in both forms: exact, or refused in one sentence."""

import pytest

from experiments.models_sweep.page import page
from experiments.models_sweep.sweep import Outcome, Row, examine

EXACT = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MistralForCausalLM",
    "MixtralForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM",
    "GPT2LMHeadModel", "GPTNeoXForCausalLM", "GraniteForCausalLM", "CohereForCausalLM", "SmolLM3ForCausalLM",
    "OPTForCausalLM", "AfmoeForCausalLM",
)  # fmt: skip
REFUSED = {
    "GptOssForCausalLM": "attention sinks",
    "Gemma2ForCausalLM": "softcapped",
    "DeepseekV3ForCausalLM": "multi-head latent attention",
    "MambaForCausalLM": "not a decoder with KV heads",
    "FalconForCausalLM": "no attention interface",
    "Gemma4ForCausalLM": "KV heads of one shape",
    "JetMoeForCausalLM": "KV heads",
}
ENGINE_REFUSES = ("DiffLlamaForCausalLM", "HrmTextForCausalLM", "Gemma3nForCausalLM", "MiniMaxForCausalLM")


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    assert examine(name) == (Outcome("exact"),) * 2


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_refused(name, reason):
    hybrid, engine = examine(name)
    assert (hybrid.outcome, engine.outcome) == ("refused", "refused")
    assert reason in hybrid.why


@pytest.mark.parametrize("name", ENGINE_REFUSES)
def test_engine_refuses_what_hybrid_can_do(name):
    hybrid, engine = examine(name)
    assert (hybrid.outcome, engine.outcome) == ("exact", "refused")


def test_the_page_counts_and_says_why():
    rows = [
        Row("a", "AForCausalLM", Outcome("exact"), Outcome("refused", "It has | in it.")),
        Row("b", "BForCausalLM", Outcome("exact"), Outcome("exact")),
    ]
    made = page(rows, "5.0")
    assert "- 1 classes: `hybrid` exact, `Engine` refused" in made
    assert "| AForCausalLM | exact | refused | It has \\| in it. |" in made
