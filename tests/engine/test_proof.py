"""An engine proves itself on a model when it is made, or refuses it in one sentence."""

import pytest
import tiny
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, T5GemmaConfig, T5GemmaForConditionalGeneration

from experiments.models_sweep import tiny as any_class
from lycheedecode import Engine, HybridConfig, hybrid
from lycheedecode.engine import proof
from lycheedecode.models.shape import ModelError

CONFIG = tiny.config()


def refusal(model, **options):
    with pytest.raises(ModelError) as caught:
        Engine(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DiffLlamaForCausalLM", "Layer 0 of this model stored"),  # two attentions a layer
        ("HrmTextForCausalLM", "Layer 0 of this model stored"),  # layers in cycles
        ("JetMoeForCausalLM", "cannot run JetMoeForCausalLM"),
        ("Gemma3nForCausalLM", "layer|Layer"),  # layers that share keys and values
        ("Gemma4ForCausalLM", "KV heads of one shape"),
    ],
)
def test_models_unlike_others_are_refused(name, reason):
    import re

    assert re.search(reason, refusal(any_class.make(name)))


def test_layers_that_ask_for_contiguous_outputs_work():
    model = any_class.make("AfmoeForCausalLM")
    assert len(Engine(model).generate([list(range(4, 34))], 3)[0].token_ids) == 3


def test_llama4_scales_decode_steps_by_their_position():
    """Its layers without positions scale attention by the logarithm of the length, which they ask the cache for."""
    model = any_class.make("Llama4ForCausalLM", attn_temperature_tuning=True, floor_scale=24, attn_scale=0.9)
    rows, answers = [list(range(4, 34))], torch.arange(50, 74)[None]
    with torch.inference_mode():
        expected = model(torch.cat([torch.tensor(rows), answers], 1)).logits[:, 30:]
    for execution in ("eager", "graph"):
        found = Engine(model, execution=execution).score(rows, answers)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


class WithBias(nn.Module):
    """A wrapper whose attention masks are its own: what it wraps sees the last four tokens only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, **options):
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(-3)
        return self.model(input_ids=input_ids, attention_mask=seen[None, None], **options)


class Wrapper(nn.Module):
    """What adapters look like: a module that holds the model and passes everything on."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, *arguments, **options):
        return self.inside(*arguments, **options)


def test_masks_of_their_own_are_refused(llama):
    assert "masks its attention" in refusal(WithBias(llama))


def test_wrapped_models_are_judged_by_the_class_inside_and_work(llama):
    rows = tiny.prompts(40, 23)
    options = {"plan": tiny.plan(), "config": CONFIG}
    expected = [result.token_ids for result in Engine(llama, **options).generate(rows, 8)]
    engine = Engine(Wrapper(llama), **options)
    assert engine.shape == Engine(llama).shape
    assert [result.token_ids for result in engine.generate(rows, 8)] == expected
    assert "Linear is not a transformers model" in refusal(nn.Linear(2, 2))


def test_what_only_seems_to_be_the_model_is_refused(llama):
    """Virtual tokens before the prompt, say: the wrapper's logits are not those that the engine gives."""

    class Prefixed(Wrapper):
        def forward(self, input_ids, past_key_values=None, cache=None, **options):
            given = past_key_values if cache is None else cache
            if given is not None:
                return self.inside(input_ids, past_key_values=given, **options)
            prefix = torch.full((len(input_ids), 2), 7)
            output = self.inside(torch.cat([prefix, input_ids], 1), **options)
            output.logits = output.logits[:, 2:]
            return output

    assert "the logits of a prompt differ" in refusal(Prefixed(llama))


def test_encoders_and_cross_attention_are_refused():
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = {**sizes, "vocab_size": 200, "max_position_embeddings": 128}
    assert "does not reproduce BertLMHeadModel" in refusal(BertLMHeadModel(BertConfig(**bert)).eval())
    crossed = BertLMHeadModel(BertConfig(**bert, is_decoder=True, add_cross_attention=True)).eval()
    assert "has cross attention" in refusal(crossed)
    text = {**sizes, "vocab_size": 200, "num_key_value_heads": 2, "head_dim": 16}
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=text, decoder=text)).eval()
    assert "is an encoder and a decoder" in refusal(model)
    with pytest.raises(ModelError, match="is an encoder and a decoder"), hybrid(model, tiny.plan()):
        pass


def test_training_mode_is_refused(llama):
    try:
        assert "is in training mode" in refusal(llama.train())
    finally:
        llama.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ordinary_models_pass_in_every_dtype(family, dtype):
    model = tiny.model(family, dtype)
    engine = Engine(model, plan=tiny.plan_for(family))
    assert len(engine.generate(tiny.prompts(30, 9), 4)[0].token_ids) == 4


def test_float64_is_exact(llama):
    rows, answers = tiny.prompts(40), torch.tensor(tiny.prompts(6))
    model = tiny.model("llama", torch.float64)
    with torch.inference_mode():
        expected = model(torch.cat([torch.tensor(rows), answers], 1)).logits[:, 40:].float()
    found = Engine(model, plan=tiny.plan(), config=HybridConfig(budget_tokens=256)).score(rows, answers)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_another_default_dtype_changes_nothing(llama):
    rows = tiny.prompts(40, 23)
    options = {"plan": tiny.plan(), "config": CONFIG}
    expected = [result.token_ids for result in Engine(llama, **options).generate(rows, 8)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [result.token_ids for result in Engine(llama, **options).generate(rows, 8)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_under_autocast_the_model_computes_in_its_own_dtype(llama):
    rows, answers = tiny.prompts(40, 23), tiny.prompts(6, 6)
    expected = Engine(llama, plan=tiny.plan(), config=CONFIG).score(rows, answers)
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny.model("llama")
        assert torch.equal(Engine(model, plan=tiny.plan(), config=CONFIG).score(rows, answers), expected)


def test_a_model_is_proved_once_and_left_as_it_was(llama, monkeypatch):
    model, passes = tiny.model("llama"), []
    original = proof._by_engine
    monkeypatch.setattr(proof, "_by_engine", lambda *arguments: passes.append(1) or original(*arguments))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Engine(model, plan=tiny.plan())
    Engine(model)
    assert len(passes) == 1
    assert torch.equal(torch.get_rng_state(), before)
    model.double()
    Engine(model)
    assert len(passes) == 2
    Engine(tiny.model("qwen3"), check=False)
    assert len(passes) == 2


def test_a_model_that_attends_in_another_way_is_refused(monkeypatch):
    """The proof is about logits, whatever the reason: here keys are scaled before they are stored."""
    model = tiny.model("llama")

    def scaled(module, arguments, output):
        return output * 1.01 if output.shape[1] == 1 else output

    model.model.layers[2].self_attn.k_proj.register_forward_hook(scaled)
    assert "the logits of decode steps differ" in refusal(model)
    assert isinstance(Engine(model, check=False), Engine)
