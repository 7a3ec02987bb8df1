"""What tasks ask of generation is done, or refused: an option is never dropped."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from lycheedecode import Engine, Sampling
from lycheedecode.integrations.generation_kwargs import TaskRequestError, sampling_of
from lycheedecode.integrations.lm_eval import LycheeLM


def sampling(*instead, **said):
    return sampling_of(dict(normalize_gen_kwargs(said)), *instead)


def test_options_that_we_have():
    assert sampling() == Sampling()
    assert sampling(do_sample=True) == Sampling(temperature=1.0)
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert sampling(**asked) == Sampling(temperature=0.6, top_p=0.9, top_k=20)
    assert sampling(0.0, **asked).temperature == 0
    assert sampling(do_sample=True, top_k=-1, top_p=None, until=["x"], max_gen_toks=5) == Sampling(temperature=1.0)


@pytest.mark.parametrize(
    "idle",
    [
        {"repetition_penalty": 1.0}, {"num_beams": 1}, {"min_p": 0.0}, {"num_return_sequences": 1}, {"use_cache": True},
        {"min_p": None}, {"min_p": 0.1}, {"typical_p": 0.9}, {"early_stopping": False},
    ],
)  # fmt: skip
def test_options_without_an_effect(idle):
    [name] = idle
    found = sampling(do_sample=False, **idle)
    assert found == sampling(do_sample=False) or getattr(found, name) == idle[name]  # greedily, neither has an effect


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 4}, {"no_repeat_ngram_size": 3}, {"num_return_sequences": 2}, {"use_cache": False},
        {"bad_words_ids": [[5]]}, {"max_length": 100}, {"guided_json": "{}"},
    ],
)  # fmt: skip
def test_options_that_would_change_the_text(asked):
    [name] = asked
    with pytest.raises(TaskRequestError, match=f"asks for generation with {name}=.*, which this engine does not have"):
        sampling(do_sample=False, **asked)


@pytest.mark.parametrize("name", ["min_p", "repetition_penalty", "typical_p"])
def test_options_are_honoured_where_sampling_has_them(name):
    from dataclasses import fields

    asked = {"do_sample": True, name: 0.9 if name != "repetition_penalty" else 1.2}
    if name in {field.name for field in fields(Sampling)}:
        assert getattr(sampling(**asked), name) == asked[name]
    else:
        with pytest.raises(TaskRequestError, match=f"{name}="):
            sampling(**asked)


def test_values_that_make_no_sense():
    for said in ({"top_p": 0}, {"top_p": "much"}, {"temperature": -1.0, "do_sample": True}):
        with pytest.raises(TaskRequestError, match="make no sense"):
            sampling(**said)


def test_a_task_is_refused_before_it_is_answered(llama, byte_tokenizer):
    lm = LycheeLM({"full": Engine(llama, byte_tokenizer)})
    request = Instance(
        "generate_until", {}, ("A text", {"until": [], "num_beams": 3, "max_gen_toks": 2}), 0, metadata=("task", 0, 1)
    )
    with pytest.raises(TaskRequestError, match="num_beams=3"):
        lm.generate_until([request])
    assert not lm.answers
