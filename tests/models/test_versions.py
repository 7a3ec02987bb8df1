"""What versions of transformers call differently is called as the installed one has it."""

import importlib.metadata
import runpy
import warnings

import pytest
import tiny
import torch

from lycheedecode import Engine, hybrid
from lycheedecode.models import versions


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("5.9.0", "past_key_values"),
        ("5.17.0", "past_key_values"),
        ("5.23.1", "past_key_values"),
        ("5.24.0", "cache"),
        ("5.40.0.dev0", "cache"),
        ("6.0.0", "cache"),
    ],
)
def test_models_take_a_cache_by_the_name_of_their_release(monkeypatch, release, name):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: release)
    cache = object()
    assert runpy.run_path(versions.__file__)["cache_argument"](cache) == {name: cache}


def test_nothing_that_we_call_is_deprecated(llama):
    rows, options = tiny.prompts(60, 37), {"plan": tiny.plan(), "config": tiny.config()}
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", category)
        for execution in ("eager", "graph"):
            Engine(llama, execution=execution, **options).generate(rows, 4)
        Engine(llama, cache="host", **options).generate(rows, 4)
        Engine(llama, plan=tiny.plan(), config=tiny.config(verify_every=2)).generate(rows, 4)
        Engine(llama).score(rows, torch.tensor(tiny.prompts(3, 3)))
        with hybrid(llama, **options):
            llama.generate(**tiny.padded(rows), max_new_tokens=4, do_sample=False)
