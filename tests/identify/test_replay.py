"""The student of identification must be the decoder that users run."""

import random

import pytest
import torch
from transformers import DynamicCache

from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.attention import HybridAttention
from lycheedecode.identify.replay import Planned, full, prepare, replay
from lycheedecode.models.routing import route_attention
from lycheedecode.models.versions import cache_argument
from lycheedecode.ops import KV
from lycheedecode.prompts.makers import PromptMaker

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
def test_student_is_the_step_by_step_decoder(model, lesson, form, score):
    config = HybridConfig(
        budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=9, retrieval_attention=form, block_score=score
    )
    student = replay(model, lesson, Planned(PLAN, config))
    decoded = _decode(model, lesson, HybridAttention(PLAN, config))
    torch.testing.assert_close(student[lesson.mask], decoded[lesson.mask], atol=2e-4, rtol=1e-3)
    assert (student - lesson.teacher)[lesson.mask].abs().max() > 1e-2  # 64 of 211 tokens cannot be exact


def test_budget_over_the_context_is_the_teacher(model, lesson):
    student = replay(model, lesson, Planned(PLAN, HybridConfig(budget_tokens=1024, block_size=16)))
    torch.testing.assert_close(student, lesson.teacher, atol=1e-4, rtol=1e-4)


def test_replay_leaves_the_prefill_as_it_was(model, lesson):
    before = [keys.clone() for keys, _ in lesson.prefix]
    replay(model, lesson, full)
    assert all(torch.equal(old, keys) for old, (keys, _) in zip(before, lesson.prefix, strict=True))


def _decode(model, lesson, attention):
    """The same answers, one token at a time through the operations."""
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(lesson.prefix):
        cache.update(keys, values, layer)
    batch, steps = lesson.answer_ids.shape
    state = attention.allocate(batch, lesson.prompt_length + steps, "cpu")

    def routed(module, query, key, value, mask, scaling, **_):
        output = attention(module.layer_idx, query[:, :, 0], KV(key, value), state, scaling)
        return output[:, None], None

    with route_attention(model, routed):
        states = [
            model.base_model(input_ids=lesson.answer_ids[:, i : i + 1], **cache_argument(cache)).last_hidden_state
            for i in range(steps)
        ]
    return torch.cat(states, 1)
