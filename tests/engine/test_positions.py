"""Positions that depend on the length of a text, and how long a text may be."""

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import LlamaConfig

from lycheedecode import Engine, HybridConfig, hybrid
from lycheedecode.errors import InputError
from lycheedecode.models.positions import Positions
from lycheedecode.models.shape import ModelShape

ORIGINAL = 64
WHOLE = HybridConfig(budget_tokens=256, block_size=4)


@pytest.fixture(scope="module")
def phi():
    return tiny.longrope(ORIGINAL)


def generated(model, rows, tokens):
    """What the model chooses greedily, and its logits `[B, T, V]`; every token from a pass over the whole text.

    `generate` does the same from transformers 5.23 on; in 5.17 it drops the cache and then feeds the last token alone.
    """
    rows, logits = [list(row) for row in rows], []
    for _ in range(tokens):
        batch = tiny.padded(rows)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits.append(model(**batch, position_ids=positions, use_cache=False).logits[:, -1].float())
        for row, token in zip(rows, logits[-1].argmax(-1).tolist(), strict=True):
            row.append(token)
    return torch.tensor([row[-tokens:] for row in rows]), torch.stack(logits, 1)


def scored(engine, rows, answers):
    context = engine.prefill(rows)
    return torch.cat([context.logits[:, None].clone(), engine.score(context, answers[:, :-1])], 1), context


@pytest.mark.parametrize(
    "lengths",
    [(40,), (60,), (ORIGINAL,), (ORIGINAL + 1,), (100,), (60, 23), (90, 23)],
    ids=["before", "across", "at the turn", "just past", "past", "a batch across", "a batch past"],
)
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_longrope_is_what_generate_makes_of_it(phi, lengths, chunk, execution):
    rows = tiny.prompts(*lengths)
    answers, expected = generated(phi, rows, 12)
    engine = Engine(phi, plan=tiny.plan(), config=WHOLE, prefill_chunk=chunk, execution=execution)
    found, context = scored(engine, rows, answers)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3)
    torch.testing.assert_close(engine.score(context, answers[:, :-1]), expected[:, 1:], atol=5e-3, rtol=1e-3)
    assert [list(one.token_ids) for one in engine.generate(rows, 12)] == answers.tolist()


def test_correction_goes_across_the_turn(phi):
    rows = tiny.prompts(57)
    answers, expected = generated(phi, rows, 20)
    engine = Engine(phi, plan=tiny.plan(), config=replace(WHOLE, correction_every=4))
    torch.testing.assert_close(scored(engine, rows, answers)[0], expected, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("length", [40, 100])
def test_rounds_stay_on_one_side_of_the_turn(phi, length):
    rows = tiny.prompts(length)
    config = tiny.config(verify_every=2)
    engine = Engine(phi, plan=tiny.plan(), config=config)
    assert list(engine.generate(rows, 8)[0].token_ids) == generated(phi, rows, 8)[0][0].tolist()
    with pytest.raises(ValueError, match="change at 64 tokens, which verify_every cannot cross"):
        engine.generate(tiny.prompts(57), 20)


def test_hybrid_goes_across_the_turn(phi):
    """Whatever the installed `generate` makes of it."""
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    inputs = tiny.padded(tiny.prompts(57))
    expected = phi.generate(**inputs, **options)
    with hybrid(phi, tiny.plan(), WHOLE):
        found = phi.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=5e-3, rtol=1e-3)


def test_the_context_of_another_length_was_made_by_this_engine(phi):
    engine = Engine(phi)
    context = engine.prefill(tiny.prompts(ORIGINAL))
    context.token_ids = None
    with pytest.raises(ValueError, match="past 64 tokens"):
        engine.decode_one_token(context, torch.tensor([5]))


def test_dynamic_scaling_is_refused_past_the_original_length():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny.model("llama", rope_parameters=rope, max_position_embeddings=ORIGINAL)
    rows, engine = tiny.prompts(60), Engine(model)
    answers = generated(model, rows, 5)[0]
    assert list(engine.generate(rows, 5)[0].token_ids) == answers[0].tolist()
    with pytest.raises(InputError, match="every token past 64"):
        engine.prefill(tiny.prompts(ORIGINAL + 1))
    made = engine.generate(rows, 50)[0]
    assert (len(made.token_ids), made.finish_reason) == (5, "length")


ROPES = {
    "default": ({}, 2048),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 8192),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 4096),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
    "shorter": ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}, 2048),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        4096,
    ),
}


@pytest.mark.parametrize(("rope", "longest"), ROPES.values(), ids=ROPES)
def test_the_longest_text_is_the_original_length_times_the_factor(rope, longest):
    config = LlamaConfig(max_position_embeddings=2048, rope_parameters={"rope_theta": 10000.0, **rope})
    assert Positions.of(config).longest == longest


def test_layers_of_each_kind_have_positions_of_their_own():
    full = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    sliding = {"rope_type": "default", "rope_theta": 10000.0}
    model = tiny.model("gemma3", rope_parameters={"full_attention": full, "sliding_attention": sliding})
    assert ModelShape.of(model).max_positions == 8 * 512


def test_prompts_up_to_the_longest_text_are_read():
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny.model("llama", rope_parameters=rope, max_position_embeddings=32)
    rows = tiny.prompts(100)
    assert list(Engine(model).generate(rows, 4)[0].token_ids) == generated(model, rows, 4)[0][0].tolist()
    with pytest.raises(InputError, match="The prompt has 129 tokens; the model has 128 positions"):
        Engine(model).prefill(tiny.prompts(129))


@pytest.mark.parametrize("length", [ORIGINAL - 24, ORIGINAL - 2, ORIGINAL])
def test_a_rewound_context_is_as_it_was(phi, length):
    """What was decoded past the turn leaves nothing: neither in hybrid steps, nor in the rounds of another engine."""
    engine = Engine(phi, plan=tiny.plan(), config=tiny.config(12))
    rows, answers = tiny.prompts(length, length - 9), tiny.prompts(30, 30)
    context = engine.prefill(rows)
    first = engine.score(context, answers)
    torch.testing.assert_close(engine.score(context, answers), first, atol=1e-4, rtol=1e-4)
    if length < ORIGINAL - 20:
        rounds = Engine(phi, plan=tiny.plan(), config=tiny.config(12, verify_every=1))
        found = [one.token_ids for one in rounds.generate(context, 16, ignore_eos=True)]
        assert found == [one.token_ids for one in Engine(phi).generate(rows, 16, ignore_eos=True)]
