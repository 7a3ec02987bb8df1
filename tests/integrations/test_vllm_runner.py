"""Under vLLM's second model runner, which GPUs have by default, the plugin does what it does under the first."""

import os
from pathlib import Path

import interpreter
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")

from lycheedecode.integrations.vllm import parts, settings

FOLDER = Path(__file__).parent
TESTS = [
    "test_vllm.py::test_a_tight_budget_gives_the_tokens_of_engine[llama]",
    "test_vllm_requests.py::test_each_gets_what_it_asks_for",
]
if settings.drafts_in_v2(parts.version):
    TESTS += [
        f"test_vllm_lossless.py::test_{name}"
        for name in (
            "drafts_that_see_everything_are_all_accepted[asynchronous]",
            "drafts_that_see_little_change_nothing[both]",
            "texts_end_where_they_end_without_drafts",
            "requests_that_begin_alike_or_end_soon",
            "a_seed_gives_its_text_again",
            "requests_choose_the_budget_of_their_drafts",
            "graphs_are_captured_and_used_for_batches_that_they_hold",
        )
    ]
    TESTS += [
        "test_vllm_structured.py::test_hybrid",
        "test_vllm_structured.py::test_lossless[asynchronous]",
        "test_vllm_structured.py::test_drafts_for_a_given_form_are_certain",
    ]


def test_tokens_and_requests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]))
    interpreter.run_tests("-p", "second_runner", *(FOLDER / name for name in TESTS))
