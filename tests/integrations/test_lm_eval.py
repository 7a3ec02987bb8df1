"""The model class of lm-evaluation-harness against the engine, the model itself, and the real harness."""

import lm_eval
import lm_eval.tasks
import pytest
import tiny
import torch
from lm_eval.api.instance import Instance

from lycheedecode import Engine
from lycheedecode.engine.sampling import Sampling
from lycheedecode.integrations.lm_eval import Answer, LycheeLM, TaskRequestError, request_key

TIGHT = tiny.config(16)
PROMPTS = ["some words to go on from", "others, a few more of them than before", "a third"]


@pytest.fixture
def engines(llama, byte_tokenizer):
    return {
        "full": Engine(llama, byte_tokenizer),
        "hybrid": Engine(llama, byte_tokenizer, plan=tiny.plan(), config=TIGHT),
    }


def request(kind, *arguments, document=0, index=0):
    return Instance(kind, {}, arguments, index, metadata=("task", document, 1))


def generation(prompt, document=0, **kwargs):
    return request("generate_until", prompt, {"until": [], "max_gen_toks": 9, **kwargs}, document=document)


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generates_what_each_engine_does(engines, batch_size):
    lm = LycheeLM(engines, batch_size=batch_size)
    requests = [generation(prompt, i) for i, prompt in enumerate(PROMPTS)]
    for name, engine in engines.items():
        lm.chosen = name
        assert lm.generate_until(requests) == [engine.generate(prompt, 9)[0].text for prompt in PROMPTS]
    answers = [lm.answers[name, request_key("task", 0, 0, 0, requests[0].args)] for name in engines]
    results = [engine.generate(PROMPTS[0], 9)[0] for engine in engines.values()]
    assert [one.tokens for one in answers] == [len(result.token_ids) for result in results]
    assert [one.finish_reason for one in answers] == [result.finish_reason for result in results]
    if batch_size == 1:
        assert [one.kv_bytes_per_token for one in answers] == [result.kv_bytes_per_token for result in results]


def test_one_prefill_answers_for_all_engines(engines, monkeypatch):
    prefills = []
    for engine in engines.values():
        prefill = engine.prefill
        monkeypatch.setattr(engine, "prefill", lambda *a, prefill=prefill, **k: prefills.append(1) or prefill(*a, **k))
    told = []
    lm = LycheeLM(engines, batch_size=2, report=lambda *numbers: told.append(numbers))
    requests = [generation(prompt, i) for i, prompt in enumerate(PROMPTS)]
    first = lm.generate_until(requests)
    lm.chosen = "hybrid"
    assert lm.generate_until(requests) != first
    assert len(prefills) == 2
    assert told == [(2, 6), (4, 6), (5, 6), (6, 6)]


def test_what_requests_say_about_generation(engines):
    lm, engine = LycheeLM(engines), engines["full"]
    text = engine.generate(PROMPTS[0], 20)[0].text
    assert lm.generate_until([generation(PROMPTS[0], max_gen_toks=20, until=[text[5:7], ""])]) == [
        text[: text.index(text[5:7])]
    ]
    assert lm.generate_until([generation(PROMPTS[0], do_sample=False, temperature=1.0)]) == [
        engine.generate(PROMPTS[0], 9)[0].text
    ]
    other = LycheeLM({"full": engine}, max_new_tokens=4, temperature=0.0)
    assert other.generate_until([generation(PROMPTS[0], do_sample=True, temperature=1.0)]) == [
        engine.generate(PROMPTS[0], 4)[0].text
    ]
    sampled = generation(PROMPTS[0], do_sample=True, temperature=5.0, max_gen_toks=20)
    texts = lm.generate_until([sampled, sampled, sampled])  # as the harness asks for several samples
    assert len(set(texts)) == 3
    assert lm.generate_until([sampled] * 4)[:3] == texts
    assert LycheeLM({"full": engine}, seed=1).generate_until([sampled]) != texts[:1]
    assert LycheeLM({"full": engine}).generate_until([sampled]) == texts[:1]


def test_a_prompt_that_does_not_fit_is_skipped_with_a_reason(engines):
    lm = LycheeLM(engines)
    requests = [generation("x" * 505, 0), generation("short", 1), generation("", 2)]
    texts = lm.generate_until(requests)
    assert texts[0] == texts[2] == ""
    assert texts[1]
    reasons = [lm.answers["hybrid", request_key("task", i, 0, 0, each.args)].skipped for i, each in enumerate(requests)]
    assert reasons == [
        "505 tokens and 9 for the answer; the model has 512 positions",
        None,
        "an empty prompt or continuation",
    ]


# ---------------------------------------------------------------------- likelihood


def test_likelihoods_are_those_of_a_forward_pass(engines, llama, byte_tokenizer):
    pairs = [("a context", " and more"), ("a context", "!"), ("another, longer context", " x"), ("", "alone")]
    lm = LycheeLM(engines, batch_size=3)
    requests = [request("loglikelihood", *pair, document=i) for i, pair in enumerate(pairs)]
    found = lm.loglikelihood(requests)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        ids, more = (byte_tokenizer(text).input_ids for text in (context, continuation))
        ids = ids or [byte_tokenizer.bos_token_id]
        logits = llama(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
        assert logprob == pytest.approx(float(logits.gather(1, torch.tensor(more)[:, None]).sum()), abs=2e-3)
        assert greedy == (logits.argmax(-1).tolist() == more)
    lm.chosen = "hybrid"
    scored = lm.loglikelihood(requests)
    assert scored[1] == found[1]  # one token comes from the prefill, which all share
    assert scored[0] != found[0] or scored[2] != found[2]


def test_greedy_continuations_are_recognised(engines):
    said = {prompt: engines["full"].generate(prompt, 2)[0].text for prompt in map("prompt number {}".format, range(40))}
    prompt, text = next(pair for pair in said.items() if len(pair[1]) == 2 and pair[1].isascii())
    requests = [request("loglikelihood", prompt, each, index=i) for i, each in enumerate((text, "~~"))]
    assert [greedy for _, greedy in LycheeLM(engines).loglikelihood(requests)] == [True, False]


def test_bytes_of_a_continuation(engines):
    lm = LycheeLM(engines, batch_size=2)
    requests = [request("loglikelihood", "x" * 60, "abcde"), request("loglikelihood", "x" * 30, "abc", document=1)]
    lm.loglikelihood(requests)
    answers = [lm.answers["full", request_key("task", i, 0, 0, each.args)] for i, each in enumerate(requests)]
    assert [one.kv_bytes_per_token for one in answers] == [8 * 2 * 64 * 62.5, 8 * 2 * 64 * 31.5]


def test_whole_texts_are_refused(engines):
    with pytest.raises(TaskRequestError, match="prefill is dense"):
        LycheeLM(engines).loglikelihood_rolling([request("loglikelihood_rolling", "text")])


# ---------------------------------------------------------------------- the harness


def test_chats(engines, byte_tokenizer):
    lm = LycheeLM(engines)
    chat = [{"role": "user", "content": "hello"}]
    assert lm.apply_chat_template(chat) == "<user>hello</s>"
    opened = lm.apply_chat_template([*chat, {"role": "assistant", "content": "Well,"}], add_generation_prompt=False)
    assert opened.endswith("Well,")
    assert lm.templated
    assert lm.tokenizer_name
    engines["full"].tokenizer.chat_template, before = None, byte_tokenizer.chat_template
    try:
        with pytest.raises(TaskRequestError, match="no chat template"):
            lm.apply_chat_template(chat)
    finally:
        byte_tokenizer.chat_template = before


def test_a_finished_answer_is_not_decoded_again(engines):
    each = generation(PROMPTS[0])
    key = request_key("task", 0, 0, 0, each.args)
    answers = {(name, key): Answer(5, text=f"said by {name}") for name in engines}
    assert LycheeLM(engines, answers=answers).generate_until([each]) == ["said by full"]


def test_the_harness_makes_one_from_its_arguments(llama, byte_tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    tiny.plan().save(tmp_path / "plan.json")
    task = {
        "task": "colours",
        "output_type": "multiple_choice",
        "test_split": "test",
        "custom_dataset": _colours,
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["red", "green"],
        "doc_to_target": "answer",
    }
    arguments = f"pretrained={tmp_path},device=cpu,dtype=float32"
    scores, nothing_else = [], lm_eval.tasks.TaskManager(include_defaults=False)
    for more in ("plan=full", f"plan={tmp_path}/plan.json,budget_tokens=64,block_size=4,sink_tokens=4,recent_tokens=4"):
        results = lm_eval.simple_evaluate(
            "lycheedecode",
            f"{arguments},{more}",
            tasks=[dict(task)],
            batch_size=2,
            bootstrap_iters=0,
            task_manager=nothing_else,
        )
        scores.append([sample["resps"] for sample in results["samples"]["colours"]])
    assert scores[0] == [[[(pytest.approx(one), hit)] for [(one, hit)] in each] for each in scores[1]]
    with pytest.raises(ValueError, match="no setting 'budget'"):
        LycheeLM.create_from_arg_string(f"{arguments},plan=full,budget=3")
    with pytest.raises(TaskRequestError, match="no bundled head plan"):
        LycheeLM.create_from_arg_string(arguments)
    with pytest.raises(TaskRequestError, match="batch_size must be a number"):
        LycheeLM.create_from_arg_string(f"{arguments},plan=full", {"batch_size": "auto"})


def _colours(**_):
    from datasets import Dataset

    rows = [
        {"question": f"What colour is {what}?", "answer": i % 2} for i, what in enumerate(("blood", "grass", "wine"))
    ]
    return {"test": Dataset.from_list(rows)}


def test_sampling_has_no_part_in_greedy_answers(engines):
    sampling = LycheeLM(engines)._generation({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_tokens": 5})
    assert sampling == (Sampling(temperature=0.6, top_p=0.9), 5, [])
