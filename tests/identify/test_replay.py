"""The student of identification must be the decoder that users run."""

import math
import random
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import DynamicCache

from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.attention import HybridAttention
from lycheedecode.identify.replay import Drawn, Planned, choose_blocks, full, in_parts, prepare, replay
from lycheedecode.models.routing import route_attention
from lycheedecode.models.versions import cache_argument
from lycheedecode.ops import KV
from lycheedecode.prompts.makers import Prompt, PromptMaker

PLAN = HeadPlan.from_donors([[(0, 0), (0, 1)], [(0, 1), (1, 1)], [(1, 1), (0, 0)], [(3, 0), (3, 0)]])


@pytest.fixture(scope="module")
def lesson(model, tokenizer):
    maker = PromptMaker(tokenizer, "noise")
    rng = random.Random(0)
    return prepare(model, [maker.passkeys(211, 1, rng, digits=3 + i) for i in range(2)], chunk=100)


def test_teacher_is_the_model(model, tokenizer):
    prompt = PromptMaker(tokenizer, "noise").passkeys(211, 1, random.Random(0))
    lesson = prepare(model, [prompt], chunk=64)
    ids = torch.tensor([prompt.prompt_ids + prompt.answer_ids])
    expected = model.base_model(input_ids=ids).last_hidden_state[:, len(prompt.prompt_ids) : -1]
    torch.testing.assert_close(lesson.teacher, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["selected", "full"])
@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("factors", [None, [[1.0, 0.5], [0.0, 0.75], [0.0, 0.0], [0.25, 1.0]]], ids=["", "completed"])
def test_student_is_the_step_by_step_decoder(model, lesson, form, score, factors):
    config = HybridConfig(
        budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=9, retrieval_attention=form, block_score=score,
        completion_chunk=16,
    )  # fmt: skip
    plan = replace(PLAN, completion=factors)
    student = replay(model, lesson, Planned(plan, config))
    decoded = _decode(model, lesson, HybridAttention(plan, config))
    torch.testing.assert_close(student[lesson.mask], decoded[lesson.mask], atol=2e-4, rtol=1e-3)
    assert (student - lesson.teacher)[lesson.mask].abs().max() > 1e-2  # 64 of 211 tokens cannot be exact


def test_budget_over_the_context_is_the_teacher(model, lesson):
    student = replay(model, lesson, Planned(PLAN, HybridConfig(budget_tokens=1024, block_size=16)))
    torch.testing.assert_close(student, lesson.teacher, atol=1e-4, rtol=1e-4)


def test_replay_leaves_the_prefill_as_it_was(model, lesson):
    before = [keys.clone() for keys, _ in lesson.prefix]
    replay(model, lesson, full)
    assert all(torch.equal(old, keys) for old, (keys, _) in zip(before, lesson.prefix, strict=True))


def test_what_is_unread_counts_as_the_means_of_its_chunks(model, lesson):
    """Against the definition, head by head and token by token."""
    config = HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=9, completion_chunk=32)
    factor, seen_by = 0.5, {}

    def attend(layer, seen):
        seen_by[layer] = seen
        return full(layer, seen)

    with torch.no_grad():
        replay(model, lesson, attend)
    seen = seen_by[2]
    chosen = choose_blocks(seen.weights, config)
    parts = in_parts(seen, chosen, 8, 32, seen.means(32))
    found = parts.output(factor)
    start = lesson.prompt_length
    for sequence, head, step in [(0, 0, 0), (1, 1, 5), (0, 1, 12), (1, 0, 13)]:  # the last are past a chunk's end
        length = start + step + 1
        keys, values = (tokens[sequence, head, :length] for tokens in (seen.keys, seen.values))
        query = seen.query.unflatten(2, (3, -1))[sequence, head, :, step]
        read = chosen[sequence, head, step].repeat_interleave(8)[:length]
        logits, attended = [query @ keys[read].T], [values[read]]
        for chunk in range((length - 1) // 32):
            place = slice(chunk * 32, chunk * 32 + 32)
            unread = int((~read[place]).sum())
            if unread:
                logits.append((query @ keys[place].mean(0) + math.log(factor * unread))[:, None])
                attended.append(values[place].mean(0)[None])
        expected = torch.cat(logits, -1).softmax(-1) @ torch.cat(attended)
        torch.testing.assert_close(found[sequence, head, :, step], expected, atol=1e-5, rtol=1e-4)


def test_completed_plans_come_between_the_factors(model, lesson):
    config = HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=9, completion_chunk=32)

    def student(plan, **changes):
        return replay(model, lesson, Planned(plan, replace(config, **changes)))

    plain, ones = replace(PLAN, completion=[[0, 0]] * 4), replace(PLAN, completion=[[1, 1]] * 4)
    torch.testing.assert_close(student(plain), student(PLAN))
    torch.testing.assert_close(student(ones), student(PLAN, completion="centroid"))
    torch.testing.assert_close(student(ones, completion="none"), student(PLAN))
    assert (student(ones) - student(PLAN))[lesson.mask].abs().max() > 1e-3
    everything = replace(config, budget_tokens=1024)
    whole = replay(model, lesson, Planned(ones, everything))
    torch.testing.assert_close(whole, lesson.teacher, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_other_layers_stay_as_they_are(family):
    model, rows = tiny.model(family), tiny.prompts(70, 70)
    prompts = [Prompt(tuple(row[:60]), tuple(row[60:]), ()) for row in rows]
    lesson = prepare(model, prompts, chunk=25)
    expected = model.base_model(input_ids=torch.tensor(rows)).last_hidden_state[:, 60:-1]
    torch.testing.assert_close(lesson.teacher, expected, atol=2e-4, rtol=1e-3)
    again = replay(model, lesson, full)
    torch.testing.assert_close(again, lesson.teacher)


def test_answers_can_be_drawn(model, tokenizer):
    prompt = PromptMaker(tokenizer, "noise").continuation(150, 8, random.Random(0))
    cold = prepare(model, [prompt], drawn=Drawn(6, temperature=1e-6)).answer_ids[0].tolist()
    ids = list(prompt.prompt_ids)
    for token in cold:
        assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    one, two = (prepare(model, [prompt], drawn=Drawn(6, 1.0, seed)).answer_ids for seed in (1, 2))
    assert not torch.equal(one, two)


def _decode(model, lesson, attention):
    """The same answers, one token at a time through the operations."""
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(lesson.prefix):
        cache.update(keys, values, layer)
    batch, steps = lesson.answer_ids.shape
    state = attention.allocate(batch, lesson.prompt_length + steps, "cpu")

    def routed(module, query, key, value, mask, scaling, **_):
        if state.means is not None and module.layer_idx in state.means.layers:
            state.means.write(module.layer_idx, KV(key, value))
        output = attention(module.layer_idx, query[:, :, 0], KV(key, value), state, scaling)
        return output[:, None], None

    with route_attention(model, routed):
        states = [
            model.base_model(input_ids=lesson.answer_ids[:, i : i + 1], **cache_argument(cache)).last_hidden_state
            for i in range(steps)
        ]
    return torch.cat(states, 1)
