"""The examples in docstrings run, with a tiny model, its tokenizer, a plan for it, and a folder."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import tiny

SOURCE = Path(__file__).parents[1] / "src"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name, model, tokenizer, tmp_path):
    module = import_module(name)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    offered = {"model": model, "tokenizer": tokenizer, "plan": tiny.plan(), "folder": tmp_path}
    failed, tried = doctest.testmod(module, extraglobs=offered, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert tried
    assert not failed, "see what doctest printed"
