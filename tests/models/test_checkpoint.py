"""Checkpoints that lack tensors, or hold those of another model, are refused with the name of the first."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from lycheedecode.models.load import load_model
from lycheedecode.models.shape import ModelError


@pytest.fixture
def saved(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path, device="cpu", dtype="float32")
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


def change(folder, edit) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def test_missing_tensors(saved):
    gone = ("model.layers.1.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight")
    change(saved, lambda weights: {name: weight for name, weight in weights.items() if name not in gone})
    said = refusal(saved)
    assert "model.layers.1.mlp.up_proj.weight nor 1 others" in said


def test_no_head(saved):
    change(saved, lambda weights: {name: weight for name, weight in weights.items() if name != "lm_head.weight"})
    assert "no lm_head.weight, which" in refusal(saved)


def test_a_foreign_prefix(saved):
    change(saved, lambda weights: {f"module.{name}": weight for name, weight in weights.items()})
    assert "no model.embed_tokens.weight nor" in refusal(saved)


def test_another_shape(saved):
    change(saved, lambda weights: {**weights, "model.layers.2.mlp.up_proj.weight": torch.zeros(64, 40)})
    said = refusal(saved)
    assert all(word in said for word in ("model.layers.2.mlp.up_proj.weight", "64 x 40", "64 x 48"))


def test_a_bias_that_the_config_does_not_name(saved):
    change(saved, lambda weights: {**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(96)})
    assert "model.layers.0.self_attn.q_proj.bias" in refusal(saved)


def test_what_is_beside_the_decoder_does_not_matter(saved):
    beside = {"vision_tower.layers.0.weight": torch.ones(3), "model.layers.4.eh_proj.weight": torch.ones(3)}
    beside["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    change(saved, lambda weights: {**weights, **beside})
    load_model(saved, device="cpu", dtype="float32")


def test_a_shard_is_missing(saved):
    tiny.model().save_pretrained(saved, max_shard_size="100KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    sorted(saved.glob("model-*.safetensors"))[-1].unlink()
    assert "cannot be loaded" in refusal(saved)


def test_weights_cut_short(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be loaded" in refusal(saved)


def test_a_config_that_is_none(saved):
    (saved / "config.json").write_text("{]")
    assert "cannot be loaded" in refusal(saved)
    (saved / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    assert "cannot be loaded" in refusal(saved)


BERT = {"vocab_size": 260, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 64}


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel])
def test_encoders(kind, tmp_path):
    kind(BertConfig(**BERT)).save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    assert "is an encoder (BertLMHeadModel)" in refusal(tmp_path)


def test_the_same_class_as_a_decoder(tmp_path):
    BertLMHeadModel(BertConfig(**BERT, is_decoder=True)).save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    load_model(tmp_path, device="cpu", dtype="float32")


def test_encoder_decoders(tmp_path):
    config = T5Config(vocab_size=260, d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=32, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    assert "is an encoder-decoder (t5)" in refusal(tmp_path)
