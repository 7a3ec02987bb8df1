"""`generate` inside `hybrid` against `generate` outside it."""

from contextlib import contextmanager

import pytest
import tiny
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    TextStreamer,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lycheedecode import Engine, HeadPlan, HybridConfig, PlanError, hybrid
from lycheedecode.integrations.transformers import token_spans
from lycheedecode.models.shape import ModelError
from lycheedecode.models.versions import cache_argument

TIGHT, DENSE = tiny.config(16), tiny.config(16, retrieval_attention="full")

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.2, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def generate(model, batch, **options):
    torch.manual_seed(5)
    return model.generate(**batch, max_new_tokens=12, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lengths", [(40,), (40, 23, 9)], ids=["one", "padded batch"])
def test_a_budget_that_covers_the_context_changes_nothing(family, lengths, way):
    model, batch = tiny.model(family), tiny.padded(tiny.prompts(*lengths))
    expected = generate(model, batch, **WAYS[way])
    with hybrid(model, tiny.plan_for(family), tiny.ROOMY):
        actual = generate(model, batch, **WAYS[way])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("lengths", [(40,), (40, 23, 9)], ids=["one", "padded batch"])
def test_heads_that_all_retrieve_densely_change_nothing(llama, lengths):
    batch = tiny.padded(tiny.prompts(*lengths))
    expected = generate(llama, batch, do_sample=False)
    with hybrid(llama, HeadPlan.all_retrieval(tiny.LAYERS, tiny.KV_HEADS), DENSE):
        assert torch.equal(generate(llama, batch, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_full_attention_to_rounding(dtype):
    model, batch = tiny.model("llama", dtype), tiny.padded(tiny.prompts(40, 23))
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(model.generate(**batch, max_new_tokens=2, **options).logits).float()
    with hybrid(model, tiny.plan(), tiny.ROOMY):
        actual = torch.stack(model.generate(**batch, max_new_tokens=2, **options).logits).float()
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)
    else:
        assert (actual - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("lengths", [(60,), (60, 37, 9)], ids=["one", "padded batch"])
@pytest.mark.parametrize("config", [TIGHT, DENSE], ids=["selected", "full"])
def test_it_decodes_as_the_engine_does(llama, lengths, config):
    rows = tiny.prompts(*lengths)
    expected = [list(result.token_ids) for result in Engine(llama, plan=tiny.plan(), config=config).generate(rows, 12)]
    for options in ({}, {"cache_implementation": "static"}):
        with hybrid(llama, tiny.plan(), config):
            actual = generate(llama, tiny.padded(rows), do_sample=False, **options)
        assert actual[:, max(lengths) :].tolist() == expected
    plain = generate(llama, tiny.padded(rows), do_sample=False)
    assert plain[:, max(lengths) :].tolist() != expected  # the budget does bind


def test_beams_of_a_tight_budget_match_a_batch_of_their_own(llama):
    """Beams are reordered between steps; selections must not stick to their rows."""
    rows = tiny.prompts(60, 37)
    with hybrid(llama, tiny.plan(), TIGHT):
        together = generate(llama, tiny.padded(rows), num_beams=3, do_sample=False)
        alone = [generate(llama, tiny.padded([row]), num_beams=3, do_sample=False)[0, len(row) :] for row in rows]
    for row, expected in zip(together[:, 60:], alone, strict=True):
        assert torch.equal(row, expected)


def test_a_prefix_in_the_cache_is_reused(llama):
    prefix, rest = tiny.prompts(40)[0], tiny.prompts(52)[0][40:]
    whole = {"input_ids": torch.tensor([prefix + rest])}
    with hybrid(llama, tiny.plan(), TIGHT):
        expected = generate(llama, whole, do_sample=False)
        cache = DynamicCache(config=llama.config)
        llama(torch.tensor([prefix]), **cache_argument(cache))
        assert torch.equal(generate(llama, whole, do_sample=False, **cache_argument(cache)), expected)


def test_text_is_streamed(llama, byte_tokenizer, capsys):
    batch = {"input_ids": torch.tensor([byte_tokenizer("something to go on from")["input_ids"]])}
    with hybrid(llama, tiny.plan(), TIGHT):
        output = generate(llama, batch, do_sample=False, streamer=TextStreamer(byte_tokenizer, skip_prompt=True))
    text = byte_tokenizer.decode(output[0, batch["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == text.strip()


# ---------------------------------------------------------------------- assisted decoding

ASSISTED = {
    "assistant": {"assistant_model": tiny.model("llama", num_hidden_layers=1)},
    "good assistant": {"assistant_model": tiny.model("llama")},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "early exit": {"assistant_early_exit": 2},
}


@pytest.mark.parametrize("way", ASSISTED)
@pytest.mark.parametrize(
    "config",
    [
        TIGHT,
        DENSE,
        tiny.ROOMY,
        tiny.config(16, completion="centroid", completion_chunk=8),
        tiny.config(None, budget_ratio=0.3),
    ],
    ids=["selected", "full", "roomy", "completed", "ratio"],
)
def test_candidates_attend_as_in_steps_of_their_own(llama, way, config):
    """Text and logits are those without candidates, whoever proposes them."""
    batch = {"input_ids": torch.tensor([tiny.prompts(20)[0] * 3])}
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with hybrid(llama, tiny.plan(), config), counted_passes(llama) as passes:
        expected = llama.generate(**batch, max_new_tokens=24, **options)
        alone, passes[:] = list(passes), []
        actual = llama.generate(**batch, max_new_tokens=24, **options, **ASSISTED[way])
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(actual.logits), torch.cat(expected.logits), atol=1e-3, rtol=1e-3)
    assert alone == [60] + [1] * 23
    assert max(passes[1:]) > 1  # there were candidates


@contextmanager
def counted_passes(model):
    """The tokens of every pass."""
    passes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, options: passes.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    yield passes
    hook.remove()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_candidates_of_every_family(family):
    model, batch = tiny.model(family), {"input_ids": torch.tensor([tiny.prompts(20)[0] * 3])}
    with hybrid(model, tiny.plan_for(family), TIGHT):
        expected = generate(model, batch, do_sample=False)
        assert torch.equal(generate(model, batch, do_sample=False, prompt_lookup_num_tokens=4), expected)


def test_candidates_after_padding(llama):
    row = tiny.prompts(20)[0] * 3
    padded = {"input_ids": torch.tensor([[0] * 7 + row]), "attention_mask": torch.tensor([[0] * 7 + [1] * 60])}
    with hybrid(llama, tiny.plan(), TIGHT):
        expected = generate(llama, {"input_ids": torch.tensor([row])}, do_sample=False)[0, 60:]
        found = generate(llama, padded, do_sample=False, prompt_lookup_num_tokens=4)[0, 67:]
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_candidates_on_a_gpu():
    model, batch = tiny.model().cuda(), {"input_ids": torch.tensor([tiny.prompts(20)[0] * 3]).cuda()}
    config = tiny.config(48, block_size=16, completion="centroid", completion_chunk=32)
    with hybrid(model, tiny.plan(), config):
        expected = generate(model, batch, do_sample=False)
        with counted_passes(model) as passes:
            assert torch.equal(generate(model, batch, do_sample=False, prompt_lookup_num_tokens=4), expected)
    assert max(passes[1:]) > 1


def test_a_prompt_is_dense_whatever_logits_are_asked_for(llama):
    """A single one, all of them, or those of several sequences; otherwise the last ones are candidates."""
    one, several = torch.tensor(tiny.prompts(60)), torch.tensor(tiny.prompts(60, 60))
    dense = llama(several).logits
    with hybrid(llama, tiny.plan(), TIGHT):
        torch.testing.assert_close(llama(one).logits, dense[:1])
        torch.testing.assert_close(llama(one, logits_to_keep=1).logits, dense[:1, -1:])
        torch.testing.assert_close(llama(several, logits_to_keep=5).logits, dense[:, -5:])
        kept = llama(one, logits_to_keep=5).logits
        torch.testing.assert_close(llama.model(one).last_hidden_state[0, -1] @ llama.lm_head.weight.T, dense[0, -1])
    torch.testing.assert_close(kept[:, 0], dense[:1, -5])
    context = Engine(llama, plan=tiny.plan(), config=TIGHT).prefill(one[:, :56].tolist())
    engine = Engine(llama, plan=tiny.plan(), config=TIGHT)
    steps = [engine.decode_one_token(context, one[:, at]) for at in range(56, 60)]
    torch.testing.assert_close(kept[0, 1:], torch.cat(steps), atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------- nothing left behind


def traces(model):
    return (
        model.config._attn_implementation,
        sorted(ALL_ATTENTION_FUNCTIONS),
        sorted(ALL_MASK_ATTENTION_FUNCTIONS),
        model.generation_config.to_dict(),
        sorted(vars(model)),
        [(name, sorted(vars(module))) for name, module in model.named_modules()],
    )


def test_a_context_outlives_hybrid_attention(llama):
    """Meanwhile an engine is told what keeps it from the model, which is not a change."""
    engine = Engine(llama, plan=tiny.plan(), config=TIGHT)
    context = engine.prefill(tiny.prompts(60))
    expected = engine.generate(context, 6)[0].token_ids
    with hybrid(llama, tiny.plan(), TIGHT), pytest.raises(ModelError, match="already routed by LycheeDecode"):
        engine.generate(context, 6)
    assert engine.generate(context, 6)[0].token_ids == expected


def test_nothing_is_left_behind(llama):
    before = traces(llama)
    with hybrid(llama, tiny.plan(), TIGHT) as inside:
        assert inside is llama
        assert traces(llama) != before
        generate(llama, tiny.padded(tiny.prompts(40, 9)), do_sample=False)
    assert traces(llama) == before

    def fail():
        with hybrid(llama, tiny.plan(), TIGHT):
            generate(llama, tiny.padded(tiny.prompts(40)), do_sample=False)
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        fail()
    assert traces(llama) == before


# ---------------------------------------------------------------------- masks


def test_spans_of_masks():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    lengths, starts = token_spans(mask, 6)
    assert lengths.tolist() == [3, 6]
    assert starts.tolist() == [2, 0]
    assert token_spans(mask[1:], 6) == (None, None)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.tensor([1, 0, 1, 1]).bool()[None, None, None], "has gaps"),
        (torch.zeros(1, 1, 1, 4), "needs a boolean mask"),
        (torch.ones(1, 2, 1, 4).bool(), "needs a boolean mask"),
        (torch.ones(1, 1, 1, 5).bool(), "needs a boolean mask"),
    ],
)
def test_masks_that_are_not_runs_are_refused(mask, reason):
    with pytest.raises(ModelError, match=reason):
        token_spans(mask, 4)


# ---------------------------------------------------------------------- refusals


def enter(model, plan=None, config=TIGHT):
    with hybrid(model, plan or tiny.plan(), config):
        pass


def test_settings_that_need_the_engine_are_refused(llama):
    with pytest.raises(ValueError, match="correction_every"):
        enter(llama, config=HybridConfig(correction_every=32))
    with pytest.raises(ValueError, match="drafts and verifies over one cache, which only Engine does"):
        enter(llama, config=HybridConfig(verify_every=4))
    with pytest.raises(ValueError, match="scan_keys='int4' keeps a copy beside the cache, which only Engine does"):
        enter(llama, config=HybridConfig(scan_keys="int4"))
    with pytest.raises(ValueError, match="refresh_every"):
        enter(llama, config=HybridConfig(refresh_every=2))


def test_plans_that_do_not_fit_are_refused(llama):
    with pytest.raises(PlanError, match="KV heads per layer; the model has 2"):
        enter(llama, HeadPlan.all_retrieval(4, 3))
    with pytest.raises(PlanError, match="without full attention"):
        enter(
            tiny.model("gemma3"), HeadPlan.from_donors([[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(1, 0)] * 2, [(0, 0)] * 2])
        )


def test_a_second_context_on_the_same_model_is_refused(llama):
    before = traces(llama)
    with hybrid(llama, tiny.plan(), TIGHT), pytest.raises(ModelError, match="already routed"):
        enter(llama)
    assert traces(llama) == before


def test_a_model_on_several_devices_is_refused(llama):
    llama.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    try:
        with pytest.raises(ModelError, match="spread over devices 0, cpu"):
            enter(llama)
    finally:
        del llama.hf_device_map


def test_attention_weights_are_refused(llama):
    batch = tiny.padded(tiny.prompts(9))
    with hybrid(llama, tiny.plan(), TIGHT), pytest.raises(ModelError, match="output_attentions"):
        generate(llama, batch, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("by_config", [False, True])
def test_decoding_without_a_cache_is_refused(llama, by_config, monkeypatch):
    """It would read the whole text anew for each token, densely."""
    options = {} if by_config else {"use_cache": False}
    for config in (llama.config, llama.generation_config):
        monkeypatch.setattr(config, "use_cache", not by_config)
    batch = tiny.padded(tiny.prompts(40))
    sentence = r"^[^\n]*use_cache=False[^\n]*$"
    with hybrid(llama, tiny.plan(), TIGHT):
        with pytest.raises(ModelError, match=sentence):
            llama(**batch, **options)
        with pytest.raises(ModelError, match=sentence):
            generate(llama, batch, **options)
    assert generate(llama, batch, use_cache=False).shape == (1, 52)  # outside of it, as ever


@pytest.mark.parametrize("start", [0, 5], ids=["", "padded"])
def test_a_second_reading_of_what_the_cache_holds_is_refused(llama, start):
    """transformers makes it for assisted decoding; its text is then wrong outside of this context, too."""
    ids, cache = torch.tensor(tiny.prompts(40)), DynamicCache(config=llama.config)
    mask = torch.ones_like(ids)
    mask[:, :start] = 0
    with hybrid(llama, tiny.plan(), TIGHT):
        first = generate(llama, {"input_ids": ids, "attention_mask": mask}, **cache_argument(cache))
        held = cache.get_seq_length()
        longer = torch.cat([first, ids[:, :3]], 1)
        mask = torch.cat([mask, torch.ones_like(longer[:, 40:])], 1)
        batch = {"input_ids": longer, "attention_mask": mask}
        with pytest.raises(ModelError, match=rf"again from its beginning, .* holds {held} tokens"):
            generate(llama, batch, **cache_argument(cache), prompt_lookup_num_tokens=3)
        empty = cache_argument(DynamicCache(config=llama.config))
        assert torch.equal(generate(llama, batch), generate(llama, batch, **empty, prompt_lookup_num_tokens=3))


def test_a_mask_with_gaps_is_refused(llama):
    batch = tiny.padded(tiny.prompts(20))
    batch["attention_mask"][0, 7] = 0
    with hybrid(llama, tiny.plan(), TIGHT), pytest.raises(ModelError, match="has gaps"):
        generate(llama, batch)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def test_latent_attention_is_refused():
    config = DeepseekV3Config(**{**SMALL, "num_key_value_heads": 4}, kv_lora_rank=8, q_lora_rank=8, n_routed_experts=8)
    with pytest.raises(ModelError, match="multi-head latent attention"):
        enter(DeepseekV3ForCausalLM(config), HeadPlan.all_retrieval(4, 4))


@pytest.mark.parametrize(
    ("model_class", "config", "reason"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SMALL), "softcap"),
        (GptOssForCausalLM, GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1), "s_aux"),
    ],
)
def test_attention_that_is_not_plain_is_refused(model_class, config, reason):
    model = model_class(config).eval()
    plan = HeadPlan.all_retrieval(4, 2)
    with pytest.raises(ModelError, match=reason), hybrid(model, plan, TIGHT):
        model(torch.tensor([[1, 2, 3]]))
