"""GGUF files: what they say about heads and positions is kept, what cannot be read is refused in one sentence."""

import math
import struct
from contextlib import suppress

import numpy as np
import pytest
import tiny
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

gguf_files = pytest.importorskip("gguf_files")

from lycheedecode.models.gguf import read_header  # noqa: E402
from lycheedecode.models.load import load_model  # noqa: E402
from lycheedecode.models.shape import ModelError  # noqa: E402

ROPE = "llama.rope.scaling."


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setenv("LYCHEEDECODE_CACHE", "off")


def load(path):
    return load_model(path, device="cpu", dtype="float32")


def logits(model):
    return model(torch.tensor(tiny.prompts(100))).logits


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        load(path)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


# ---------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_is_the_model_it_was_made_of(family, tmp_path):
    model = tiny.model(family)
    loaded, tokenizer = load(gguf_files.write(tmp_path / "model.gguf", model, family))
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer.decode(tokenizer("round trip")["input_ids"]) == "round trip"


def test_the_suffix_may_be_in_capitals(tmp_path):
    model = tiny.model()
    assert torch.equal(logits(load(gguf_files.write(tmp_path / "MODEL.GGUF", model))[0]), logits(model))


def test_a_tied_head(tmp_path):
    model = tiny.model(tie_word_embeddings=True)
    loaded = load(gguf_files.write(tmp_path / "model.gguf", model))[0]
    assert loaded.config.tie_word_embeddings
    assert torch.equal(logits(loaded), logits(model))


def test_heads_that_do_not_divide_the_hidden_size(tmp_path):
    model = tiny.model("qwen3", hidden_size=52)
    assert torch.equal(logits(load(gguf_files.write(tmp_path / "model.gguf", model, "qwen3"))[0]), logits(model))


# ---------------------------------------------------------------------- positions


SCALED = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {ROPE + "type": "linear", ROPE + "factor": 4.0},
    ),
    "linear, as old files say it": (
        {"rope_type": "linear", "factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "original_context_length": 128},
    ),
    "yarn with a gain and bounds of its own": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 0.9 * (0.1 * math.log(4) + 1)},
        {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "original_context_length": 128,
         ROPE + "attn_factor": 0.9, ROPE + "yarn_beta_fast": 16.0, ROPE + "yarn_beta_slow": 2.0},
    ),
    "none": ({"rope_type": "default"}, {ROPE + "type": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALED)
def test_scaling_is_set(case, tmp_path):
    rope, values = SCALED[case]
    model = tiny.model(rope_parameters={"rope_theta": 10000.0, **rope})
    loaded = load(gguf_files.write(tmp_path / "model.gguf", model, values=values))[0]
    assert {key: loaded.config.rope_parameters[key] for key in rope} == pytest.approx(rope)
    torch.testing.assert_close(logits(loaded), logits(model))
    if rope["rope_type"] != "default":
        assert not torch.allclose(logits(loaded), logits(tiny.model()), atol=0.01)


def frequency_factors(model) -> np.ndarray:
    """By what llama.cpp divides the frequencies of a model."""
    theta = model.config.rope_parameters["rope_theta"]
    plain = tiny.model(rope_parameters={"rope_type": "default", "rope_theta": theta}, head_dim=model.config.head_dim)
    return (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_frequency_factors_of_llama_3(tmp_path):
    model = tiny.model(rope_parameters=LLAMA3, head_dim=64)
    factors = frequency_factors(model)
    assert 1 == factors[0] < factors[-1] == 8
    path = gguf_files.write(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": factors})
    loaded = load(path)[0]
    assert {key: loaded.config.rope_parameters[key] for key in LLAMA3} == LLAMA3
    assert torch.equal(logits(loaded), logits(model))


def test_frequency_factors_of_one_change_nothing(tmp_path):
    path = gguf_files.write(
        tmp_path / "model.gguf", tiny.model(), tensors={"rope_freqs.weight": np.ones(8, np.float32)}
    )
    assert load(path)[0].config.rope_parameters["rope_type"] == "default"


def test_longrope_of_phi_3():
    """Only the config: tiny files are of other families."""
    from types import SimpleNamespace

    from transformers import Phi3Config

    from lycheedecode.models.gguf_config import complete

    long, short = [1.5 + i for i in range(8)], [1.0 + i / 8 for i in range(8)]
    config = Phi3Config(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=4096, vocab_size=64, pad_token_id=0
    )
    said = {"rope.scaling.original_context_length": 512, "rope.scaling.attn_factor": 1.19}
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    header = SimpleNamespace(
        path="phi.gguf", architecture="phi3", tensors=tensors, get=said.get, floats=lambda name: tensors.get(name)
    )
    complete(config, header)
    assert config.rope_parameters["rope_type"] == "longrope"
    frequencies, gain = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=1024)
    expected = [1 / (factor * 10000.0 ** (i / 8)) for i, factor in enumerate(long)]
    torch.testing.assert_close(frequencies, torch.tensor(expected))
    assert gain == 1.19


def test_layers_with_positions_of_their_own():
    """Only the global layers of Gemma 3 are scaled."""
    from types import SimpleNamespace

    from lycheedecode.models.gguf_config import complete

    config = tiny.model("gemma3").config
    local = dict(config.rope_parameters["sliding_attention"])
    said = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    complete(config, SimpleNamespace(architecture="gemma3", tensors={}, get=said.get, floats=lambda name: None))
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"] == local


@pytest.mark.parametrize(
    ("values", "tensors", "said"),
    [
        ({ROPE + "type": "ntk", ROPE + "factor": 4.0}, {}, "scales positions by ntk"),
        ({ROPE + "type": "linear"}, {}, "by linear (factor None)"),
        ({ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({ROPE + "type": "longrope"}, {}, "longrope, without"),
        ({}, {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}, "not Llama 3's"),
        ({}, {"rope_freqs.weight": np.full(8, 2, np.float16)}, "not float32"),
        ({ROPE + "type": "linear", ROPE + "factor": 2.0}, {"rope_freqs.weight": np.full(8, 2, np.float32)}, "twice"),
        ({"llama.attention.value_length": 8}, {}, "keys of 16 and values of 8"),
    ],
)
def test_what_cannot_be_set_is_refused(values, tensors, said, tmp_path):
    assert said in refusal(gguf_files.write(tmp_path / "model.gguf", tiny.model(), values=values, tensors=tensors))


# ---------------------------------------------------------------------- files with faults


def test_a_missing_tensor_is_named(tmp_path):
    said = refusal(gguf_files.write(tmp_path / "model.gguf", tiny.model(), without={"blk.1.ffn_up.weight"}))
    assert "no model.layers.1.mlp.up_proj.weight" in said


def test_a_tensor_without_a_place_is_refused(tmp_path):
    bias = {"blk.2.attn_q.bias": np.ones(96, np.float32)}
    said = refusal(gguf_files.write(tmp_path / "model.gguf", tiny.model(), tensors=bias))
    assert "weights in block 2" in said


def test_part_of_a_model_is_refused(tmp_path):
    path = gguf_files.write(tmp_path / "model.gguf", tiny.model(), values={"split.count": 3, "split.no": 0})
    assert "part 1 of 3" in refusal(path)


def test_a_hidden_size_that_transformers_refuses(tmp_path):
    path = gguf_files.write(tmp_path / "model.gguf", tiny.model(hidden_size=48), values={"llama.embedding_length": 50})
    assert "hidden size (50)" in refusal(path)


def test_another_size_of_a_head_names_the_tensor(tmp_path):
    values = {"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32}
    said = refusal(gguf_files.write(tmp_path / "model.gguf", tiny.model("qwen3"), "qwen3", values=values))
    assert all(word in said for word in ("model.layers.0.self_attn.q_proj.weight", "96 x 48", "192 x 48"))


def test_a_file_cut_short(tmp_path):
    path = gguf_files.write(tmp_path / "model.gguf", tiny.model())
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "is incomplete" in refusal(path)
    for length in (0, 3, 20, 100, 5000):
        path.write_bytes(whole[:length])
        assert "cannot be read" in refusal(path)


def test_other_files(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a GGUF file at all, though it is called one")
    assert "does not begin with GGUF" in refusal(path)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 1, 0, 0))
    assert "version 1" in refusal(path)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0) + b"\0" * 8)
    assert "cannot be loaded" in refusal(path)


def test_damaged_headers_are_read_or_refused(tmp_path):
    path = gguf_files.write(tmp_path / "model.gguf", tiny.model())
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(4, 12_000, random.integers(1, 8)):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        with suppress(ModelError):  # and nothing else
            read_header(path)


def test_sizes_of_a_damaged_header_are_not_believed(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1 << 62, 1 << 62) + b"\0" * 64)
    assert "is damaged" in refusal(path)
