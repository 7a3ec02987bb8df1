"""Requests that say something of their own attention: each gets what it asks for, whoever else is in the batch."""

from dataclasses import replace

import pytest
import tiny
import torch
from serving_engine import CROWDED, ROOMY, SETTINGS, TIGHT, generate, groups, ours, serving

from lycheedecode.integrations.vllm import self_check
from lycheedecode.integrations.vllm.parts import VLLMValidationError
from lycheedecode.integrations.vllm.settings import ServingError

PROMPTS = tiny.prompts(60, 37, 90, 23, 70, 81)
ASKED = ["off", None, "budget_tokens=24", "hybrid", "off", "budget_tokens=32"]
BUDGETS = [512, 16, 24, 16, 512, 32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.model("llama", head_dim=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with serving(folder, tiny.plan(), {**TIGHT, "max_budget_tokens": 32}, **CROWDED) as llm:
        yield llm


def test_each_gets_what_it_asks_for(llm):
    """Beside others and after others; 'off' is full attention."""
    expected = [
        ours("llama", tiny.plan(), {**SETTINGS, "budget_tokens": budget}, [prompt])[0]
        for budget, prompt in zip(BUDGETS, PROMPTS, strict=True)
    ]
    assert expected != ours("llama", tiny.plan(), TIGHT, PROMPTS)
    assert generate(llm, PROMPTS, asked=ASKED) == expected
    assert generate(llm, PROMPTS[::-1], asked=ASKED[::-1]) == expected[::-1]
    [group] = groups(llm)
    total = group.report()
    assert total["off_tokens"] == 2 * 2 * 11
    assert total["hybrid_tokens"] == 2 * 4 * 11
    assert len(group.requests._asked) <= len(PROMPTS)
    assert generate(llm, PROMPTS) == ours("llama", tiny.plan(), TIGHT, PROMPTS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lossless", "This server is not lossless: that is a setting of the server, not of a request."),
        (7, "lycheedecode must be 'hybrid', 'off', 'lossless' or 'budget_tokens=N', not 7."),
        ("budget_tokens=33", "budget_tokens must be between 12 and 32, not be 33."),
        ("budget_tokens=4", "budget_tokens must be between 12 and 32, not be 4."),
    ],
)
def test_what_cannot_be_had_is_refused(llm, given, words):
    with pytest.raises(VLLMValidationError) as error:
        generate(llm, PROMPTS[:1], asked=[given])
    assert str(error.value) == words
    assert generate(llm, PROMPTS[:1]) == ours("llama", tiny.plan(), TIGHT, PROMPTS[:1])


def test_engines_that_do_not_use_the_plugin_do_not_look(folder):
    with serving(folder) as llm:
        stock = generate(llm, PROMPTS[:1])
        assert generate(llm, PROMPTS[:1], asked=["nonsense"]) == stock == ours("llama", tiny.plan(), ROOMY, PROMPTS[:1])


def test_off_is_full_attention_of_everything(folder):
    """Also of tokens that another request has decoded with hybrid attention, whose pages are in the prefix cache."""

    def hits(llm):
        return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")

    with serving(folder, tiny.plan(), TIGHT, block_size=32) as llm:
        [answer] = generate(llm, PROMPTS[:1], 100)
        longer = [PROMPTS[0] + answer[:80]]
        before = hits(llm)
        found = generate(llm, longer, 8, logprobs=0, asked=["off"])
        assert hits(llm) == before
        again = generate(llm, longer, 8, logprobs=0, asked=["off"])
        assert hits(llm) - before == 128
    with serving(folder, block_size=32) as llm:
        stock = generate(llm, longer, 8, logprobs=0)
    for tokens, logprobs in (found, again):
        assert tokens == stock[0]
        torch.testing.assert_close(logprobs, stock[1], atol=1e-5, rtol=1e-5)


def test_the_self_check_needs_no_more_room_than_there_is(folder):
    with serving(folder, tiny.plan(), TIGHT, max_num_seqs=1) as llm:
        assert generate(llm, PROMPTS[:2]) == ours("llama", tiny.plan(), TIGHT, PROMPTS[:2])


def test_it_does_not_serve_what_it_gets_wrong(folder, monkeypatch):
    """Here vLLM is made to be wrong."""
    monkeypatch.setattr(self_check, "_TOLERANCES", {4: 0.0})
    wrong = pytest.raises(ServingError, match=r"in its self-check a step of .* was .* off vLLM's own attention")
    with wrong, serving(folder, tiny.plan(), TIGHT):
        pass
    with serving(folder, tiny.plan(), {**TIGHT, "self_check": False}) as llm:
        assert groups(llm)


def test_budgets_of_heads_grow_and_shrink_with_those_of_requests(folder):
    """Tokens are those of Engine with that budget, after the self-check."""
    plan = replace(tiny.plan(), budgets=((0.5, 2.0), (1.0, 2.0), (0.25, 0.5), (1.0, 1.0)))
    asked = [None, "budget_tokens=16", "budget_tokens=32", "off"]
    budgets = [24, 16, 32, None]
    with serving(folder, plan, {**TIGHT, "budget_tokens": 24, "max_budget_tokens": 32}) as llm:
        found = generate(llm, PROMPTS[:4], asked=asked)
    for prompt, tokens, budget in zip(PROMPTS, found, budgets, strict=False):
        assert [tokens] == ours("llama", budget and plan, {**TIGHT, "budget_tokens": budget or 24}, [prompt])
