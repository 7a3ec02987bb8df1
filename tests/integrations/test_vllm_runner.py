"""Under vLLM's second model runner, which GPUs have by default, hybrid attention does what it does under the first."""

import os
from pathlib import Path

import interpreter
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")

FOLDER = Path(__file__).parent
TESTS = (
    "test_vllm.py::test_a_tight_budget_gives_the_tokens_of_engine[llama]",
    "test_vllm_requests.py::test_each_gets_what_it_asks_for",
)


def test_tokens_and_requests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]))
    interpreter.run_tests("-p", "second_runner", *(FOLDER / name for name in TESTS))
