"""Every form of a prompt gives the same token ids, and what is none is refused in one sentence."""

import numpy as np
import pytest
import tiny
import torch
from transformers import BatchEncoding

from lycheedecode import Engine
from lycheedecode.engine.prompt import PromptError, encode, stop_conditions
from lycheedecode.errors import ConfigError
from lycheedecode.models.shape import ModelError

A, B = tiny.prompts(7, 5)
CHAT = [{"role": "user", "content": "hi"}]


def sentence(error) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


# ---------------------------------------------------------------------- token ids


@pytest.mark.parametrize(
    "prompt",
    [
        A,
        tuple(A),
        torch.tensor(A),
        torch.tensor(A, dtype=torch.int32),
        torch.tensor([A]),
        np.array(A),
        np.array([A], dtype=np.uint16),
        list(np.array(A)),
        list(torch.tensor(A)),
        [A],
        [torch.tensor(A)],
        {"input_ids": A},
        {"input_ids": [A], "attention_mask": [[1] * 7]},
        {"input_ids": torch.tensor(A), "attention_mask": torch.ones(7)},
        [{"input_ids": A}],
    ],
)
def test_one_prompt_of_token_ids(prompt):
    [row] = encode(prompt)
    assert row == A
    assert all(type(token) is int for token in row)


@pytest.mark.parametrize(
    "batch",
    [
        [A, B],
        (np.array(A), torch.tensor(B)),
        {"input_ids": [A, B]},
        [{"input_ids": A}, {"input_ids": [B]}],
        {"input_ids": [A, [0, 0, *B]], "attention_mask": [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]},
        {"input_ids": [A, [*B, 0, 0]], "attention_mask": [[True] * 7, [True] * 5 + [False] * 2]},
        BatchEncoding(tiny.padded([A, B])),
        {name: tensor.numpy() for name, tensor in tiny.padded([A, B]).items()},
        {name: tensor.bool() if "mask" in name else tensor for name, tensor in tiny.padded([A, B]).items()},
        {**tiny.padded([A, B]), "token_type_ids": torch.zeros(2, 7)},
        {"input_ids": [A, B], "attention_mask": None},
    ],
)
def test_several_prompts_of_token_ids(batch):
    assert encode(batch) == [A, B]


def test_a_tensor_of_two_dimensions_is_several_prompts():
    assert encode(torch.tensor([A[:5], B])) == encode(np.array([A[:5], B])) == [A[:5], B]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_what_a_tokenizer_returns(padding_side, byte_tokenizer, llama):
    byte_tokenizer.padding_side = padding_side
    texts = ["a short text", "a text that is longer"]
    batch = byte_tokenizer(texts, padding=True, return_tensors="pt")
    assert encode(batch) == encode(texts, byte_tokenizer) == [byte_tokenizer(text)["input_ids"] for text in texts]
    engine = Engine(llama, byte_tokenizer)
    by_text, by_ids = engine.generate(texts, 6), engine.generate(batch, 6)
    assert [made.token_ids for made in by_text] == [made.token_ids for made in by_ids]
    assert encode(byte_tokenizer(texts)) == encode(texts, byte_tokenizer)
    assert encode(byte_tokenizer(texts[0])) == encode(texts[0], byte_tokenizer)


# ---------------------------------------------------------------------- text and chats


def test_chats(byte_tokenizer):
    expected = [byte_tokenizer("<user>hi</s>")["input_ids"]]
    assert encode(CHAT, byte_tokenizer) == encode(CHAT[0], byte_tokenizer) == encode([CHAT], byte_tokenizer) == expected
    assert encode("hi", byte_tokenizer, chat=True) == encode(["hi"], byte_tokenizer, chat=True) == expected
    assert encode([CHAT, A, "hi", {"input_ids": B}], byte_tokenizer) == [
        *expected,
        A,
        byte_tokenizer("hi")["input_ids"],
        B,
    ]


def test_a_template_that_refuses(byte_tokenizer, monkeypatch):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role, please.') }}"
    template += "{% endif %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    with pytest.raises(PromptError) as caught:
        encode([{"role": "system", "content": "be brief"}, *CHAT], byte_tokenizer)
    assert sentence(caught) == "The chat template refuses these messages: No system role, please."
    monkeypatch.setattr(byte_tokenizer, "chat_template", "{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    with pytest.raises(PromptError, match="The chat template refuses"):
        encode(CHAT, byte_tokenizer)
    monkeypatch.setattr(byte_tokenizer, "chat_template", "{% for")
    with pytest.raises(PromptError, match="The chat template refuses"):
        encode(CHAT, byte_tokenizer)


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "There is no prompt"),
        ([[]], "An empty prompt"),
        ("", "An empty prompt"),
        (torch.zeros(0, dtype=torch.long), "An empty prompt"),
        (torch.zeros(2, 0, dtype=torch.long), "An empty prompt"),
        ({"input_ids": [A], "attention_mask": [[0] * 7]}, "An empty prompt"),
        (torch.tensor(3), "one or two dimensions, not 0"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "one or two dimensions, not 3"),
        (torch.rand(3), "whole numbers, not torch.float32"),
        (np.array([True, False]), "whole numbers, not bool"),
        (np.array(["a"]), "whole numbers, not <U1"),
        ([1, 2.5], "has float 2.5 in it"),
        ([1, True], "has bool True in it"),
        ([1, None], "has NoneType in it"),
        ([1, "a"], "has str 'a' in it"),
        ([A, 3], "not int"),
        ([None], "not NoneType"),
        (None, "not NoneType"),
        (7, "not int"),
        (b"bytes", "not bytes"),
        (iter([1]), "not list_iterator"),
        ({1, 2}, "not set"),
        ({}, "with a role and content"),
        ({"text": "x"}, "with a role and content"),
        ([{"role": 3, "content": "x"}], "with a role and content"),
        ([CHAT[0], "more"], "with a role and content"),
        ({"input_ids": "abc"}, "not str 'abc'"),
        ({"input_ids": None}, "not NoneType"),
        ({"input_ids": [A], "attention_mask": [[1]]}, "the same shape"),
        ({"input_ids": [A], "attention_mask": 1}, "An attention_mask is"),
        ([{"input_ids": [A, B]}], "not a batch of 2"),
        ([torch.tensor([A, A])], "have one dimension, not 2"),
        ([4, 260], "The prompt has the token id 260; the model knows 0 to 259"),
        ([A, [-1]], "Prompt 2 has the token id -1; the model knows 0 to 259"),
        ([1 << 70], "token id 1180591620717411303424"),
        ("half \ud83d of a pair", "half a surrogate pair at 5"),
    ],
)
def test_what_is_no_prompt(prompts, said, byte_tokenizer):
    with pytest.raises(PromptError) as caught:
        encode(prompts, byte_tokenizer, vocabulary=260)
    assert said in sentence(caught)


def test_what_needs_a_tokenizer(tokenizer):
    for prompt in ("text", CHAT, CHAT[0]):
        with pytest.raises(PromptError, match="need a tokenizer"):
            encode(prompt)
    with pytest.raises(PromptError, match="no chat template"):
        encode(CHAT, tokenizer)


def test_ids_beyond_the_vocabulary_are_refused_by_every_phase(llama):
    engine = Engine(llama)
    for call in (
        lambda: engine.prefill([[4, 999]]),
        lambda: engine.generate([4, 999]),
        lambda: engine.score([A], [[999]]),
        lambda: engine.prefill(torch.tensor([[-7]])),
    ):
        with pytest.raises(PromptError, match="the model knows 0 to 259"):
            call()


# ---------------------------------------------------------------------- stop conditions


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("end", (["end"], set())),
        (7, ([], {7})),
        (np.int64(7), ([], {7})),
        (["end", 7, torch.tensor(8)], (["end"], {7, 8})),
        (np.array([7, 8]), ([], {7, 8})),
        ((), ([], set())),
        (None, ([], set())),
        ({"a"}, (["a"], set())),
    ],
    ids=str,
)
def test_stop(stop, expected, byte_tokenizer):
    assert stop_conditions(stop, byte_tokenizer) == expected


def test_stop_is_one_string(llama, byte_tokenizer):
    engine = Engine(llama, byte_tokenizer)
    [whole] = engine.generate("a prompt", 40, ignore_eos=True)
    word = whole.text[8:11]
    [stopped] = engine.generate("a prompt", 40, ignore_eos=True, stop=word)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(word)]


@pytest.mark.parametrize("stop", ["", ["a", ""], 1.5, [1.5], [True], b"x", [None], {"a": 1}], ids=str)
def test_what_is_no_stop(stop, byte_tokenizer):
    with pytest.raises(ConfigError) as caught:
        stop_conditions(stop, byte_tokenizer)
    assert "top" in sentence(caught)


@pytest.mark.parametrize(("stop", "wrong"), [(260, 260), (["a", 5, 10**6], 10**6), ([-1], -1)], ids=str)
def test_stop_ids_beyond_the_vocabulary_are_refused(stop, wrong, llama, byte_tokenizer):
    with pytest.raises(ConfigError, match=f"^stop has the token id {wrong}; the model knows 0 to 259"):
        Engine(llama, byte_tokenizer).generate("a prompt", 4, stop=stop)
    assert Engine(llama, byte_tokenizer).generate("a prompt", 4, stop=259)


# ---------------------------------------------------------------------- logits that are no numbers


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_of_nan_end_with_an_error(temperature, byte_tokenizer):
    from lycheedecode import Sampling

    broken = tiny.model()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError) as caught:
        Engine(broken, byte_tokenizer).generate("a prompt", 4, sampling=Sampling(temperature=temperature, seed=1))
    assert "not numbers (NaN)" in sentence(caught)
