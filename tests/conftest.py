"""Tests share two cores with each other, and everything in them is tiny: one thread each is fastest."""

import pytest
import tiny
import torch

torch.set_num_threads(1)


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
