"""Requests that ask for JSON, a choice or a pattern, beside others: the tokens of vLLM's own attention."""

import json
import re

import pytest
import tiny
import torch
from serving_engine import CROWDED, SETTINGS, TIGHT, ours, serving
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

PROMPTS = tiny.prompts(60, 37, 5, 90, 23, 70)
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "sizes": {"type": "array", "items": {"enum": [1, 20]}, "maxItems": 3}},
    "required": ["yes", "sizes"],
}
PATTERN, CHOICES = "([a-f]{3}-){2}[0-9]{4}x{1,3}y", ["north by north-west", "north by north-east", "south"]
FORMS = [{"json": SCHEMA}, {}, {"choice": CHOICES}, {"regex": PATTERN}, {}, {"json": SCHEMA}]
"""Of each prompt."""
FREE, BOUND = (1, 4), (0, 2, 3, 5)
ENGINE = {
    "skip_tokenizer_init": False,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.model("llama", head_dim=32).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(folder):
    with serving(folder, **ENGINE, **CROWDED) as llm:
        return generate(llm)


def generate(llm, asked=(None,) * 6, only=(0, 1, 2, 3, 4, 5)):
    """Token ids of each prompt, or of some; those of a given form have it."""
    params = [
        SamplingParams(
            max_tokens=40,
            temperature=0,
            ignore_eos=not FORMS[i],
            structured_outputs=StructuredOutputsParams(**FORMS[i]) if FORMS[i] else None,
            extra_args=asked[i] and {"lycheedecode": asked[i]},
        )
        for i in only
    ]
    prompts = [{"prompt_token_ids": PROMPTS[i]} for i in only]
    found = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    for i, output in zip(only, found, strict=True):
        has_form(output.text, FORMS[i])
    return [list(output.token_ids) for output in found]


def has_form(text, form):
    if "json" in form:
        answer = json.loads(text)
        assert set(answer) == {"yes", "sizes"}
        assert type(answer["yes"]) is bool
        assert set(answer["sizes"]) <= {1, 20}
    assert text in form.get("choice", [text])
    assert "regex" not in form or re.fullmatch(form["regex"], text)


def test_hybrid(folder, stock):
    """With full attention stock's tokens; with a budget, those of the request alone."""
    with serving(folder, tiny.plan(), {**TIGHT, "max_budget_tokens": 512}, **ENGINE, **CROWDED) as llm:
        full = generate(llm, ["off", None, "budget_tokens=512", "off", None, "budget_tokens=512"])
        tight = generate(llm)
        assert tight == [generate(llm, only=[i])[0] for i in range(len(PROMPTS))]
    for i in BOUND:
        assert full[i] == stock[i]
    for i in FREE:
        assert [full[i]] == [tight[i]] == ours("llama", tiny.plan(), TIGHT, [PROMPTS[i]], 40)
    assert tight[3] != stock[3]


@pytest.mark.parametrize("scheduling", [False, True], ids=["one step at a time", "asynchronous"])
def test_lossless(folder, stock, scheduling):
    """Most drafts are none that the form allows."""
    config = {**TIGHT, "lossless": 3}
    with serving(folder, tiny.plan(), config, async_scheduling=scheduling, **ENGINE, **CROWDED) as llm:
        assert generate(llm) == stock


def test_drafts_for_a_given_form_are_certain(folder):
    """Those beside them are drawn at random."""
    sampled = {"max_tokens": 30, "temperature": 1.0, "ignore_eos": True, "detokenize": False}
    form = StructuredOutputsParams(regex="[a-z]{99}")
    params = [SamplingParams(**sampled, structured_outputs=form), SamplingParams(**sampled)]

    def probabilities(worker):
        runner = worker.model_runner
        if worker.vllm_config.use_v2_model_runner:
            return runner.speculator.draft_logits.softmax(-1)
        return runner.drafter._last_draft_probs

    with serving(folder, tiny.plan(), {**TIGHT, "lossless": 3}, max_num_seqs=2, **ENGINE) as llm:
        for prompt in PROMPTS[:2]:
            llm.llm_engine.add_request(str(prompt[0]), {"prompt_token_ids": prompt}, params.pop())
        for _ in range(4):
            llm.llm_engine.step()
        [found] = llm.collective_rpc(probabilities)
        certain = (found.amax(-1) == 1).all(-1).tolist()
        llm.llm_engine.abort_request([str(prompt[0]) for prompt in PROMPTS[:2]])
    assert sorted(certain) == [False, True]


def test_sampled_texts_of_a_given_form_have_the_models_distribution(folder):
    """Of the second token, which was drafted, after each of several first ones; drafts that the pattern refuses, of
    which there are many, must not make others less or more probable. (It would allow special tokens a `<`.)"""
    model, tokenizer = tiny.model("llama", head_dim=32), tiny.byte_tokenizer()
    allowed = tokenizer.convert_tokens_to_ids([chr(code) for code in range(33, 127) if chr(code) != "<"])
    letters, count, squares = "abcdefgh", 1000, []
    asked = [
        SamplingParams(
            n=count,
            max_tokens=2,
            temperature=1.0,
            detokenize=False,
            structured_outputs=StructuredOutputsParams(regex=f"{letter}[!-;=-~]{{9}}"),
        )
        for letter in letters
    ]
    with serving(
        folder, tiny.plan(), {**SETTINGS, "budget_tokens": 12, "lossless": 1}, max_num_seqs=256, **ENGINE
    ) as llm:
        outputs = llm.generate([{"prompt_token_ids": PROMPTS[0]}] * len(letters), asked, use_tqdm=False)
    for letter, output in zip(letters, outputs, strict=True):
        first = tokenizer.convert_tokens_to_ids(letter)
        drawn = torch.tensor([list(each.token_ids) for each in output.outputs])
        assert (drawn[:, 0] == first).all()
        with torch.no_grad():
            right = model(torch.tensor([[*PROMPTS[0], first]])).logits[0, -1, allowed].softmax(-1)
        found = torch.bincount(drawn[:, 1], minlength=260)[allowed] / count
        assert found.sum() == pytest.approx(1)
        apart = (found - right) / (right * (1 - right) / count).sqrt()
        squares.append(apart[right > 5 / count] ** 2)
    assert torch.cat(squares).mean() < 1.35  # 1, but for chance; 1.8 with drafts drawn at random
