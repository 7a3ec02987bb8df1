"""Tests share two cores with each other, and everything in them is tiny: one thread each is fastest."""

import gc
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
# The default model is unpacked once for all of them, and not in the user's folder.
os.environ.setdefault("LYCHEEDECODE_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "models"))


def pytest_configure(config):
    """Kernels' tests by themselves run in Triton's interpreter where there is no GPU; among others they leave that to
    test_interpreter.py, for Triton reads the variable only once."""
    files = [Path(argument.split("::")[0]).name for argument in config.args]
    if files and all(name.endswith("_triton.py") for name in files) and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """The longest tests come first, for the sake of who works beside; what is marked `gpu` is skipped without one."""
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def benchmarks_collect_little():
    """A benchmark collects garbage after every case: of all that is imported, that takes longer than tiny cases do."""
    import tiny  # noqa: F401  # imports transformers

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# transformers takes seconds to import, and kernels in the interpreter need none of it: whoever asks for these pays.


@pytest.fixture(scope="session")
def llama():
    import tiny

    return tiny.model("llama")


@pytest.fixture(scope="session")
def byte_tokenizer():
    import tiny

    return tiny.byte_tokenizer()


@pytest.fixture(scope="session")
def model():
    """What is identified: longer texts than `llama`'s, and tokens that are bytes."""
    import tiny

    return tiny.model("llama", vocab_size=256, max_position_embeddings=4096, pad_token_id=None)


@pytest.fixture(scope="session")
def tokenizer():
    import tiny

    return tiny.plain_tokenizer()


@pytest.fixture(scope="session")
def _compiled_kernels(tmp_path_factory):
    """Triton's cache, which the processes of this run share: what one of them has compiled, the others find."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "triton"


@pytest.fixture
def compiled(monkeypatch, _compiled_kernels):
    """Kernels that were launched: compiled for Hopper, and not run."""
    import hopper

    return hopper.compile_only(monkeypatch, _compiled_kernels)
