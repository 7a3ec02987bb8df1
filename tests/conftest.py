"""Tests share two cores with each other, and everything in them is tiny: one thread each is fastest."""

import os
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
# The default model is unpacked once for all of them, and not in the user's folder.
os.environ.setdefault("LYCHEEDECODE_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "models"))


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama():
    return tiny.model("llama")


@pytest.fixture(scope="session")
def byte_tokenizer():
    return tiny.byte_tokenizer()


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Kernels that were launched: compiled for Hopper, and not run."""
    import hopper

    return hopper.compile_only(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def tokenizer():
    """A token for every byte, no special ones and no chat template: identification without any download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)
