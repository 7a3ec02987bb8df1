"""The engine against Hugging Face `generate`, its forms of decoding against each other, and its text."""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch

from lycheedecode import Engine, HeadPlan, HybridConfig, PlanError, Sampling
from lycheedecode.engine.memory import CacheMemoryError
from lycheedecode.engine.sampling import TokenText
from lycheedecode.errors import InputError
from lycheedecode.models.shape import ModelError

TIGHT = tiny.config(16)


def greedy(model, rows, count):
    batch = tiny.padded(rows)
    output = model.generate(**batch, max_new_tokens=count, do_sample=False)
    return output[:, batch["input_ids"].shape[1] :].tolist()


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lengths", [(40,), (40, 23, 9)], ids=["one", "padded batch"])
@pytest.mark.parametrize("chunk", [2048, 13])
def test_full_attention_generates_what_transformers_does(family, lengths, chunk):
    model, rows = tiny.model(family), tiny.prompts(*lengths)
    results = Engine(model, prefill_chunk=chunk).generate(rows, 12)
    assert [list(result.token_ids) for result in results] == greedy(model, rows, 12)
    assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["selected", "full"])
def test_hybrid_equals_full_when_the_budget_covers_the_context(family, dtype, form):
    model, rows, answers = tiny.model(family, dtype), tiny.prompts(40, 23, 9), tiny.prompts(10, 10, 10)
    full = Engine(model)
    context = full.prefill(rows)
    config = replace(tiny.ROOMY, retrieval_attention=form)
    actual = Engine(model, plan=tiny.plan_for(family), config=config).score(context, answers)
    expected = full.score(context, answers)
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)
    else:  # rounding to bfloat16 goes through four layers of sharp attention
        assert (actual - expected).abs().mean() < 0.05 * expected.std()


def test_heads_that_all_retrieve_densely_equal_full_attention(llama):
    config = replace(TIGHT, retrieval_attention="full")
    plan = HeadPlan.all_retrieval(tiny.LAYERS, tiny.KV_HEADS)
    rows, answers = tiny.prompts(40, 23), tiny.prompts(10, 10)
    actual = Engine(llama, plan=plan, config=config).score(rows, answers)
    torch.testing.assert_close(actual, Engine(llama).score(rows, answers), atol=2e-3, rtol=1e-3)


def test_a_small_budget_is_not_full_attention(llama):
    rows, answers = tiny.prompts(60), tiny.prompts(8)
    actual = Engine(llama, plan=tiny.plan(), config=TIGHT).score(rows, answers)
    assert (actual - Engine(llama).score(rows, answers)).abs().max() > 0.1


def test_padding_changes_nothing(llama):
    rows, answers = tiny.prompts(60, 37, 4), tiny.prompts(8, 8, 8)
    engine = Engine(llama, plan=tiny.plan(), config=TIGHT, prefill_chunk=16)
    together = engine.score(rows, answers)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        torch.testing.assert_close(together[i], engine.score([row], [answer])[0], atol=2e-3, rtol=1e-3)


# ---------------------------------------------------------------------- scoring


def test_scores_are_the_logits_of_a_forward_pass(llama):
    rows, answers = tiny.prompts(30), tiny.prompts(6)
    context = Engine(llama).prefill(rows)
    scored = torch.cat([context.logits[:, None], Engine(llama).score(context, answers)], 1)
    expected = llama(torch.tensor([rows[0] + answers[0]])).logits[:, 29:]
    torch.testing.assert_close(scored, expected, atol=2e-3, rtol=1e-3)


def test_logits_are_ordinary_tensors(llama):
    context = Engine(llama).prefill(tiny.prompts(9))
    for logits in (context.logits, Engine(llama).decode_one_token(context, torch.tensor([5]))):
        logits.div_(2)
        assert not logits.is_inference()


def test_one_prefill_serves_many_engines(llama):
    rows, answers = tiny.prompts(60, 41), tiny.prompts(7, 7)
    context = Engine(llama).prefill(rows)
    engines = [Engine(llama), Engine(llama, plan=tiny.plan(), config=TIGHT)]
    first = [engine.score(context, answers) for engine in engines]
    again = [engine.score(context, answers) for engine in reversed(engines)][::-1]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert context.cache.length == 60


def test_engines_generate_from_one_prefill(llama, byte_tokenizer):
    rows = tiny.prompts(60, 41)
    engines = [Engine(llama, byte_tokenizer), Engine(llama, byte_tokenizer, plan=tiny.plan(), config=TIGHT)]
    context = engines[0].prefill(rows)
    for engine in [*engines, engines[0]]:
        shared, own = engine.generate(context, 9), engine.generate(rows, 9)
        assert [result.token_ids for result in shared] == [result.token_ids for result in own]
        assert [result.text for result in shared] == [result.text for result in own]
        assert [result.kv_bytes_per_token for result in shared] == [result.kv_bytes_per_token for result in own]


def test_shorter_answers_are_padded(llama):
    rows = tiny.prompts(20, 20)
    scored = Engine(llama).score(rows, [[7, 8, 9], [5]])
    assert scored.shape == (2, 3, 260)
    torch.testing.assert_close(scored[1, 0], Engine(llama).score(rows[1:], [[5]])[0, 0], atol=2e-3, rtol=1e-3)


def test_refresh_every_selects_less_often(llama):
    rows, answers = tiny.prompts(60), tiny.prompts(8)
    config = tiny.config(24, refresh_every=3)
    engine = Engine(llama, plan=tiny.plan(), config=config)
    selected = []
    allocate = engine.attention.allocate
    engine.attention.allocate = lambda *arguments: selected.append(allocate(*arguments)) or selected[-1]
    context = engine.prefill(rows)
    seen = []
    for token in answers[0]:
        engine.decode_one_token(context, torch.tensor([token]))
        seen.append(selected[-1].selections.blocks.sort(-1).values.clone())
    changes = [not torch.equal(one, two) for one, two in itertools.pairwise(seen)]
    assert len(selected) == 1
    assert {i for i, changed in enumerate(changes, 1) if changed} <= {3, 6}
    assert any(changes)


CORRECTED = pytest.mark.parametrize("config", [TIGHT, replace(TIGHT, correction_every=3)], ids=["hybrid", "corrected"])


@CORRECTED
@pytest.mark.parametrize("after", ["half of the layers", "all layers"])
def test_a_step_that_was_interrupted_is_not_continued(llama, after, config):
    """Some layers have its token then, or all of them; of a correction, some have the new entries."""
    engine, rows, answers = Engine(llama, plan=tiny.plan(), config=config), tiny.prompts(60, 31), tiny.prompts(3, 3)
    right = engine.score(rows, answers)
    context, tokens = engine.prefill(rows), torch.tensor(answers).unbind(1)

    def interrupt(*_):
        if context.steps == 2:
            raise KeyboardInterrupt

    def feed():
        return torch.stack([engine.decode_one_token(context, token_ids) for token_ids in tokens], 1)

    module = llama.lm_head if after == "all layers" else llama.model.layers[tiny.LAYERS // 2]
    hook = module.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            feed()
    finally:
        hook.remove()
    with pytest.raises(InputError, match="rewind"):
        engine.decode_one_token(context, tokens[2])
    context.rewind()
    assert torch.equal(feed(), right)


@CORRECTED
def test_a_step_that_was_refused_can_be_made_again(llama, config, monkeypatch):
    engine, rows, answers = Engine(llama, plan=tiny.plan(), config=config), tiny.prompts(60, 31), tiny.prompts(7, 7)
    right = engine.score(rows, answers)
    context, logits = engine.prefill(rows), []

    def refuse(slots):
        raise CacheMemoryError(f"{slots} slots do not fit.")

    for token_ids in torch.tensor(answers).unbind(1):
        with monkeypatch.context() as patch:
            patch.setattr(context.cache, "reserve", refuse)
            with pytest.raises(CacheMemoryError):
                engine.decode_one_token(context, token_ids)
        logits.append(engine.decode_one_token(context, token_ids))
    assert torch.equal(torch.stack(logits, 1), right)
    assert context.steps == 7


# ---------------------------------------------------------------------- Cache Correction


@pytest.mark.parametrize("lengths", [(60,), (60, 31)], ids=["one", "padded batch"])
def test_correction_of_full_attention_changes_nothing(llama, lengths):
    rows, answers = tiny.prompts(*lengths), tiny.prompts(*[10] * len(lengths))
    corrected = Engine(llama, config=HybridConfig(correction_every=4)).score(rows, answers)
    torch.testing.assert_close(corrected, Engine(llama).score(rows, answers), atol=2e-3, rtol=1e-3)


def test_correction_rewrites_the_cache_that_sparse_decoding_left(llama):
    rows, answers = tiny.prompts(60), tiny.prompts(8)
    config = replace(TIGHT, correction_every=4)
    caches, logits = [], []
    for engine in (Engine(llama), Engine(llama, plan=tiny.plan(), config=config)):
        context = engine.prefill(rows)
        logits.append([engine.decode_one_token(context, torch.tensor([token])) for token in answers[0]])
        caches.append(context.cache)
    for layer in range(tiny.LAYERS):
        full, corrected = (cache.layers[layer] for cache in caches)
        torch.testing.assert_close(corrected.keys, full.keys, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(corrected.values, full.values, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(logits[1][3], logits[0][3], atol=2e-3, rtol=1e-3)
    assert (logits[1][2] - logits[0][2]).abs().max() > 0.1


# ---------------------------------------------------------------------- generation


def test_sampling_is_reproducible_and_random(llama):
    engine, rows = Engine(llama, plan=tiny.plan(), config=tiny.ROOMY), tiny.prompts(20, 20)
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=3)
    one, two = (engine.generate(rows, 12, sampling=sampling) for _ in range(2))
    assert [result.token_ids for result in one] == [result.token_ids for result in two]
    other = engine.generate(rows, 12, sampling=Sampling(temperature=1.5, seed=4))
    assert [result.token_ids for result in one] != [result.token_ids for result in other]


def test_a_sequence_does_not_depend_on_its_neighbours(llama):
    """Its noise belongs to its place in the batch and in its answer."""
    engine, rows = Engine(llama, plan=tiny.plan(), config=tiny.ROOMY), tiny.prompts(20, 31)
    sampling = Sampling(temperature=1.5, seed=3)
    both = engine.generate(rows, 12, sampling=sampling)
    assert engine.generate([rows[0], rows[0]], 12, sampling=sampling)[0].token_ids == both[0].token_ids
    assert engine.generate(rows[:1], 12, sampling=sampling)[0].token_ids == both[0].token_ids
    again = engine.generate([rows[1], rows[1]], 12, sampling=sampling)
    assert again[1].token_ids == both[1].token_ids != again[0].token_ids


def test_sequences_end_at_their_own_stop_token(llama):
    rows = tiny.prompts(40, 23)
    free = [list(result.token_ids) for result in Engine(llama).generate(rows, 12)]
    end = free[0][4]
    results = Engine(llama).generate(rows, 12, stop=[end])
    for result, tokens in zip(results, free, strict=True):
        length = tokens.index(end) + 1 if end in tokens else 12
        assert list(result.token_ids) == tokens[:length]
        assert result.finish_reason == ("eos" if end in tokens else "length")


def test_stop_strings_end_text_and_are_not_part_of_it(llama, byte_tokenizer):
    engine = Engine(llama, byte_tokenizer)
    free = engine.generate("some words to go on from", 24, ignore_eos=True)[0]
    stop = free.text[5:7]
    at = free.text.index(stop)
    pieces = list(engine.stream("some words to go on from", 24, ignore_eos=True, stop=[stop]))
    assert pieces[-1].generation.finish_reason == "stop"
    assert pieces[-1].generation.text == free.text[:at] == "".join(piece.text for piece in pieces)


def test_streamed_pieces_add_up(llama, byte_tokenizer):
    engine = Engine(llama, byte_tokenizer)
    pieces = list(engine.stream(["first prompt", "the second one"], 20, ignore_eos=True))
    for sequence, result in enumerate(engine.generate(["first prompt", "the second one"], 20, ignore_eos=True)):
        own = [piece for piece in pieces if piece.sequence == sequence]
        assert "".join(piece.text for piece in own) == result.text
        assert own[-1].generation.token_ids == result.token_ids
        assert all(piece.generation is None for piece in own[:-1])


def test_text_never_ends_inside_a_character(byte_tokenizer):
    text = "aé€😀 z"
    stream = TokenText(byte_tokenizer)
    pieces = [stream.push(token) for token in byte_tokenizer(text)["input_ids"]]
    assert "".join(pieces) + stream.finish() == text
    assert [piece for piece in pieces if piece] == list(text)


def test_text_holds_back_what_may_become_a_stop_string(byte_tokenizer):
    stream = TokenText(byte_tokenizer, ["END", "<<"])
    pieces = [stream.push(token) for token in byte_tokenizer("a EN <b END c")["input_ids"][:11]]
    assert "".join(pieces) == stream.text == "a EN <b "
    assert stream.stopped
    assert pieces[2:5] == ["", "", "EN "]


def test_a_broken_character_at_the_end_is_shown(byte_tokenizer):
    stream = TokenText(byte_tokenizer)
    assert stream.push(byte_tokenizer("é")["input_ids"][0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_chats_go_through_the_template(llama, byte_tokenizer):
    engine = Engine(llama, byte_tokenizer)
    one = engine.generate("hello", 4, chat=True)[0]
    two = engine.generate([[{"role": "user", "content": "hello"}]], 4)[0]
    three = engine.generate("<user>hello</s>", 4)[0]
    assert one.token_ids == two.token_ids == three.token_ids
    assert one.prompt_tokens == 7


def test_results_count_bytes_and_time(llama):
    rows = tiny.prompts(60, 30)
    full = Engine(llama).generate(rows, 5)
    hybrid = Engine(llama, plan=tiny.plan(), config=TIGHT).generate(rows, 5)
    # 8 heads, keys and values of 16 float32 each; four steps see 61 to 64 tokens.
    assert full[0].kv_bytes_per_token == 8 * 2 * 64 * 62.5
    assert full[1].kv_bytes_per_token == 8 * 2 * 64 * 32.5
    assert hybrid[0].kv_bytes_per_token < 0.5 * full[0].kv_bytes_per_token
    assert full[0].decode_seconds > 0
    assert full[0].tokens_per_second == 4 / full[0].decode_seconds
    assert full[0].to_dict()["prompt_tokens"] == 60


def test_generation_ends_with_the_models_positions(llama):
    result = Engine(llama).generate(tiny.prompts(508), 100)[0]
    assert len(result.token_ids) == 5  # 508 prompt tokens and 4 more fill 512 positions


# ---------------------------------------------------------------------- refusals


def test_what_cannot_be_done_is_said(llama):
    engine = Engine(llama)
    with pytest.raises(ValueError, match="An empty prompt"):
        engine.generate([[1, 2], []])
    with pytest.raises(ValueError, match="There is no prompt"):
        engine.generate([])
    with pytest.raises(ValueError, match="513 tokens; the model has 512 positions"):
        engine.generate([[1] * 513])
    with pytest.raises(ValueError, match="With this token, the text has 513 tokens; the model has 512 positions"):
        engine.score([[1] * 510], [[1] * 3])
    with pytest.raises(ValueError, match="Text prompts need a tokenizer"):
        engine.generate("text")
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 1"):
        engine.generate([[1]], 0)
    with pytest.raises(ValueError, match="2 answers for 1 prompts"):
        engine.score([[1, 2]], [[1], [2]])
    with pytest.raises(PlanError, match="with 3 layers; the model has 4"):
        Engine(llama, plan=HeadPlan.all_retrieval(3, 2))
    with pytest.raises(PlanError, match="without full attention"):
        Engine(
            tiny.model("gemma3"), plan=HeadPlan.from_donors([[(0, 0), (0, 1)], [(1, 0), (1, 1)]] + [[(1, 0)] * 2] * 2)
        )


def test_the_model_is_left_alone_even_after_an_error(llama):
    before = llama.config._attn_implementation

    class Broken:
        refresh_every = 1

        def allocate(self, *_):
            return None

        def __call__(self, *_):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Engine(llama, attention=Broken()).generate(tiny.prompts(5), 3)
    assert llama.config._attn_implementation == before
    stream = Engine(llama).stream(tiny.prompts(5), 3)
    next(stream, None)
    assert llama.config._attn_implementation == before  # also while a stream is waiting


def test_engines_of_one_model_cannot_be_nested(llama):
    from lycheedecode import hybrid

    with hybrid(llama, tiny.plan()), pytest.raises(ModelError, match="already routed"):
        Engine(llama).generate(tiny.prompts(5), 3)
