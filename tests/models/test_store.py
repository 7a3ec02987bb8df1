"""The plain form of a GGUF file is kept, found again, and never trusted more than the file."""

import os

import pytest
import tiny
import torch

gguf_files = pytest.importorskip("gguf_files")

from lycheedecode.models import load, store  # noqa: E402
from lycheedecode.models.load import load_model, load_tokenizer  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LYCHEEDECODE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    return gguf_files.write(tmp_path / "model.gguf", tiny.model(rope_parameters=YARN), values=VALUES)


@pytest.fixture
def parsed(monkeypatch):
    """How often a file was read rather than what is kept of it."""
    calls = []
    monkeypatch.setattr(load, "read_header", lambda file: calls.append(file) or read_header(file))
    return calls


read_header = load.read_header
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
VALUES = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 128,
}


def logits(path, **options):
    model = load_model(path, device="cpu", dtype="float32", **options)[0]
    return model(torch.tensor(tiny.prompts(40))).logits


def test_what_is_kept_is_the_same_model(path, cache, parsed):
    first, tokenizer = load_model(path, device="cpu", dtype="float32")
    second, again = load_model(path, device="cpu", dtype="float32")
    assert len(parsed) == 1
    for (name, one), (other_name, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    assert first.config.rope_parameters == second.config.rope_parameters
    assert first.generation_config.to_dict() == second.generation_config.to_dict()
    assert second.config.name_or_path == str(path)
    text = "round  trip, ab <user>"
    assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == load_tokenizer(path)(text)["input_ids"]
    assert tokenizer.special_tokens_map == again.special_tokens_map
    assert len(parsed) == 1


def test_dtypes_are_kept_apart(path, cache, parsed):
    for dtype in ("float32", "bfloat16", "float32", "bfloat16"):
        assert load_model(path, device="cpu", dtype=dtype)[0].dtype == getattr(torch, dtype)
    assert len(parsed) == 2


def test_a_changed_file_is_read_anew(path, cache, parsed):
    before = logits(path)
    changed = tiny.model()
    torch.nn.init.normal_(changed.lm_head.weight.requires_grad_())
    gguf_files.write(path, changed)
    os.utime(path, (1, 1))
    assert not torch.allclose(logits(path), before)
    assert len(parsed) == 2
    assert len(list(cache.iterdir())) == 1


def test_nothing_is_kept_unless_wanted(path, cache, parsed, monkeypatch):
    logits(path, cache=False)
    assert not cache.exists()
    for said in ("off", "OFF", "none", "0"):
        monkeypatch.setenv("LYCHEEDECODE_CACHE", said)
        assert store.cache_folder() is None
    logits(path)
    assert not cache.exists()


def test_large_models_are_not_kept(path, cache, monkeypatch):
    monkeypatch.setattr(store, "MOST_BYTES", 1000)
    logits(path)
    assert not list(cache.glob("*/float32"))


def test_a_full_disk_does_not_matter(path, cache, monkeypatch):
    def full(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    expected = logits(path, cache=False)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert torch.equal(logits(path), expected)
    assert [part.name for part in sorted(next(cache.iterdir()).iterdir())] == ["source.json", "tokenizer"]


def test_a_folder_that_cannot_be_written_does_not_matter(path, cache):
    cache.write_text("a file where the folder should be")
    assert torch.equal(logits(path), logits(path, cache=False))


@pytest.mark.parametrize("part", ["float32/model.safetensors", "float32/config.json", "tokenizer/tokenizer.json"])
def test_what_is_damaged_is_made_anew(part, path, cache, parsed):
    expected = logits(path)
    [entry] = cache.iterdir()
    whole = (entry / part).read_bytes()
    (entry / part).write_bytes(whole[: len(whole) // 2])
    assert torch.equal(logits(path), expected)
    assert torch.equal(logits(path), expected)
    assert len(parsed) == 2
    assert (entry / part).read_bytes() == whole
