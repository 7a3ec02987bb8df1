"""Prompts that go on from a Context: the tokens of a new engine, and no token read that was held."""

import pytest
import tiny
import torch

from lycheedecode import Engine
from lycheedecode.engine.prefix import shared_tokens
from lycheedecode.errors import InputError

WAYS = {
    "hybrid": {},
    "selects every third token": {"refresh_every": 3, "budget_tokens": 32},
    "completed": {"completion": "centroid", "completion_chunk": 8},
    "8-bit keys": {"scan_keys": "float8"},
    "4-bit keys": {"scan_keys": "int4"},
    "correction": {"correction_every": 5},
    "lossless": {"verify_every": 3, "budget_tokens": 32},
}


def engine_of(model, family="llama", **changes):
    options = {name: changes.pop(name) for name in ("cache", "execution", "prefill_chunk") if name in changes}
    return Engine(model, plan=tiny.plan_for(family), config=tiny.config(**changes), **options)


def turns(*lengths):
    """What is new in each turn of a batch."""
    return [tiny.prompts(*row) for row in lengths]


def talk(engine, first, questions, tokens=9):
    """Every turn's prompts and results of a chat in one Context."""
    context, rows, said = engine.prefill(first), first, []
    for question in questions:
        rows = [row + more for row, more in zip(rows, question, strict=True)]
        results = engine.generate(rows, tokens, context=context, ignore_eos=True)
        said.append((rows, results))
        rows = [row + list(result.token_ids) for row, result in zip(rows, results, strict=True)]
    return said


def read_tokens(monkeypatch, engine):
    """Tokens of each sequence that pass through prefills from now on."""
    seen, dense = [], engine._dense
    monkeypatch.setattr(engine, "_dense", lambda cache, ids, pad: seen.append(ids.shape[1]) or dense(cache, ids, pad))
    return seen


def same_as_fresh(results, engine, rows, tokens=9, **options):
    expected = engine.generate(rows, tokens, ignore_eos=True, **options)
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert [result.prompt_tokens for result in results] == [len(row) for row in rows]
    assert all(result.cached_tokens == 0 for result in expected)


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("lengths", [(60,), (60, 37, 9)], ids=["one", "ragged batch"])
def test_a_chat_has_the_tokens_of_an_engine_that_reads_it_anew(llama, changes, lengths):
    engine = engine_of(llama, **changes)
    questions = turns([11 for _ in lengths], [13 - 2 * i for i in range(len(lengths))], [1 for _ in lengths])
    held = [len(row) for row in tiny.prompts(*lengths)]
    for rows, results in talk(engine, tiny.prompts(*lengths), questions):
        same_as_fresh(results, engine, rows)
        unread = max(len(row) - before for row, before in zip(rows, held, strict=True))
        assert [result.cached_tokens for result in results] == [max(len(row) - unread, 0) for row in rows]
        held = [len(row) for row in rows]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("chunk", [2048, 7])
def test_every_family_goes_on(family, chunk):
    model = tiny.model(family)
    for engine in (Engine(model, prefill_chunk=chunk), engine_of(model, family, prefill_chunk=chunk)):
        for rows, results in talk(engine, tiny.prompts(40, 23), turns([11, 30], [6, 2])):
            same_as_fresh(results, engine, rows)


@pytest.mark.filterwarnings("ignore:Without a GPU")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("changes", [{}, {"scan_keys": "int4"}, WAYS["completed"]], ids=["plain", "4-bit", "completed"])
def test_a_cache_in_host_memory_goes_on(family, changes):
    engine = engine_of(tiny.model(family), family, cache="host", **changes)
    for lengths in ((60,), (60, 37, 9)):
        questions = turns([11 for _ in lengths], [5 + 4 * i for i in range(len(lengths))], [250 for _ in lengths])
        for rows, results in talk(engine, tiny.prompts(*lengths), questions):
            same_as_fresh(results, engine, rows)


def test_only_what_is_new_is_read(llama, monkeypatch):
    engine = engine_of(llama)
    [document] = tiny.prompts(300)
    context = engine.prefill([document])
    read = read_tokens(monkeypatch, engine)
    for question, unread in ([5, 6, 7], 3), ([5, 6, 9, 9], 2), ([8], 1), ([8], 0), ([], 1), ([4] * 20, 20):
        read.clear()
        [result] = engine.generate([document + question], 4, context=context, ignore_eos=True)
        assert sum(read) == unread
        assert result.cached_tokens == 300 + len(question) - unread
        assert (result.prefill_seconds < 0.01) if not unread else result.prefill_seconds > 0
        same_as_fresh([result], engine, [document + question], 4)


def test_texts_may_change_anywhere(llama):
    """Cut short, changed in the middle, changed at once, swapped: each sequence by itself."""
    engine = engine_of(llama)
    a, b, c = tiny.prompts(90, 71, 50)
    context = engine.prefill([a, b, c])
    cases = [
        [a[:40], b, c],
        [a[:40], [*b[:70], 5, 6], c + b],
        [c, [*b[:70], 5, 6], c + b[:60]],
        [c[:20], b[:9], c[:30]],
        [a + a, b + b, c + c + a],
    ]
    for rows in cases:
        same_as_fresh(engine.generate(rows, 9, context=context, ignore_eos=True), engine, rows)
    for rows in reversed(cases):
        scores = engine.score(engine.prefill(rows, context=context), tiny.prompts(5, 5, 5))
        torch.testing.assert_close(scores, engine.score(rows, tiny.prompts(5, 5, 5)), atol=2e-4, rtol=1e-4)


def test_what_is_not_kept_is_not_read(llama):
    """Entries beyond the common prefix and of answers are overwritten, or out of sight."""
    engine, [row, other] = Engine(llama), tiny.prompts(60, 45)
    context = engine.prefill([row, other])
    engine.generate(context, 30, ignore_eos=True)
    with torch.inference_mode():
        for part in (part for layer in context.cache.layers for part in layer.store):
            part[:, :, 40:] = float("nan")  # the second sequence starts at slot 15
    rows = [row[:40] + [7] * 30, other[:25] + [8] * 12]
    same_as_fresh(engine.generate(rows, 9, context=context, ignore_eos=True), engine, rows)


def test_a_stream_that_nobody_reads_to_its_end_goes_on(llama, byte_tokenizer):
    engine = Engine(llama, byte_tokenizer, plan=tiny.plan(), config=tiny.config())
    context = engine.prefill("A book. " * 12)
    next(engine.stream("A book. " * 12 + "Who?", 20, context=context, ignore_eos=True))
    [result] = engine.generate("A book. " * 12 + "Why?", 20, context=context, ignore_eos=True)
    [expected] = engine.generate("A book. " * 12 + "Why?", 20, ignore_eos=True)
    assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
    assert result.cached_tokens == 98  # Wh, too
    assert result.to_dict()["cached_tokens"] == 98


def test_chats_go_on_by_messages(llama, byte_tokenizer):
    engine = Engine(llama, byte_tokenizer, plan=tiny.plan(), config=tiny.config())
    messages = [{"role": "user", "content": "A book. " * 12}]
    context = engine.prefill(messages)
    [answer] = engine.generate(messages, 8, context=context, ignore_eos=True)
    assert answer.cached_tokens == answer.prompt_tokens == 98
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why?"}]
    [answer] = engine.generate(messages, 8, context=context, ignore_eos=True)
    assert answer.cached_tokens == 98
    assert answer.token_ids == engine.generate(messages, 8, ignore_eos=True)[0].token_ids


def test_engines_of_one_model_take_turns(llama):
    full, hybrid = Engine(llama), engine_of(llama)
    rows = tiny.prompts(60, 37)
    context = full.prefill(rows)
    for engine in (hybrid, full, hybrid):
        rows = [[*row, 5, 6, 7] for row in rows]
        results = engine.generate(rows, 9, context=context, ignore_eos=True)
        same_as_fresh(results, engine, rows)
        assert all(result.cached_tokens for result in results)


def test_seeds_draw_what_they_draw_anew(llama):
    engine, rows = engine_of(llama), tiny.prompts(60)
    context = engine.prefill(rows)
    rows[0] += [5, 6]
    sampling = {"temperature": 0.9, "seed": 3}
    results = engine.generate(rows, 9, context=context, sampling=sampling, ignore_eos=True)
    same_as_fresh(results, engine, rows, sampling=sampling)


def test_an_interrupt_leaves_what_was_read(llama, monkeypatch):
    engine, rows = engine_of(llama, prefill_chunk=10), tiny.prompts(60, 9)
    context, dense, left = engine.prefill(rows), engine._dense, [3]

    def interrupted(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return dense(*arguments)

    longer = [rows[0] + tiny.prompts(41)[0], rows[1] + [5]]
    monkeypatch.setattr(engine, "_dense", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(longer, 9, context=context)
    monkeypatch.setattr(engine, "_dense", dense)
    for use in (lambda: engine.generate(context, 4), lambda: engine.score(context, [[5], [6]])):
        with pytest.raises(InputError, match=r"interrupted.* context="):
            use()
    results = engine.generate(longer, 9, context=context, ignore_eos=True)
    assert results[0].cached_tokens == 80
    same_as_fresh(results, engine, longer)


def test_an_interrupt_while_sequences_move_leaves_nothing_to_rely_on(llama, monkeypatch):
    """Some layers have moved then, and others have not."""
    engine, rows = engine_of(llama), tiny.prompts(60, 9)
    context, layers = engine.prefill(rows), llama.config.num_hidden_layers
    longer = [rows[0] + [5], rows[1] + tiny.prompts(41)[0]]
    moved = iter(range(layers // 2))

    def clone(tensor):
        if next(moved, None) is None:
            raise KeyboardInterrupt
        return tensor + 0

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", clone)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(longer, context=context)
    with pytest.raises(InputError, match="interrupted"):
        engine.generate(context, 4)
    for again in (rows, longer):
        results = engine.generate(again, 9, context=context, ignore_eos=True)
        same_as_fresh(results, engine, again)
    assert results[0].cached_tokens


def test_an_interrupt_while_prompts_get_other_positions_leaves_nothing_to_rely_on(monkeypatch):
    engine, rows = Engine(tiny.longrope(64)), tiny.prompts(62)
    context, dense = engine.prefill(rows), engine._dense

    def interrupted(*arguments):
        dense(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_dense", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(context, 9, ignore_eos=True)
    with pytest.raises(InputError, match="interrupted"):
        engine.generate(context, 4)
    for _ in range(2):
        same_as_fresh(engine.generate(rows, 9, context=context, ignore_eos=True), engine, rows)


@pytest.mark.parametrize("changes", [{}, {"correction_every": 4}], ids=["hybrid", "correction"])
def test_positions_that_change_with_the_length_are_read_anew(changes, monkeypatch):
    model, turn = tiny.longrope(64), 64
    engine = Engine(model, config=tiny.config(**changes))
    rows = tiny.prompts(turn - 12)
    context = engine.prefill(rows)
    read = read_tokens(monkeypatch, engine)
    for more, unread in (4, 4), (5, 5), (20, turn + 17), (6, 6), (-31, turn - 14 + 6):
        rows = [rows[0] + [7 + more] * more] if more > 0 else [rows[0][:more]]
        read.clear()
        results = engine.generate(rows, 3, context=context, ignore_eos=True)
        assert read[0] == unread, more
        same_as_fresh(results, engine, rows, 3)


def test_an_answer_past_the_turn_leaves_no_positions_behind():
    """The same prompt again: what stood before its answer was read again with the positions of a longer text."""
    model, rows = tiny.longrope(64), tiny.prompts(62)
    engine = Engine(model, plan=tiny.plan(), config=tiny.config())
    context = engine.prefill(rows)
    for _ in range(2):
        results = engine.generate(rows, 9, context=context, ignore_eos=True)
        same_as_fresh(results, engine, rows)
        [bytes_read] = [one.kv_bytes_per_token for one in results]
        assert bytes_read == engine.generate(rows, 9, ignore_eos=True)[0].kv_bytes_per_token


def test_what_cannot_go_on_is_one_sentence(llama):
    engine, other = Engine(llama), Engine(tiny.model("qwen2"))
    context = engine.prefill(tiny.prompts(20, 9))
    cases = {
        "A Context of 2 prompts goes on with as many, not with 1": lambda: engine.generate([[5, 6]], context=context),
        "give text, messages or token ids beside it": lambda: engine.stream(context, context=context),
        "was read by another model": lambda: other.generate([[5], [6]], context=context),
        "prefill makes the Context that is needed here; this is": lambda: engine.generate([[5]], context="chat"),
        "There is no prompt": lambda: engine.prefill([], context=context),
        "has 600 tokens; the model has 512 positions": lambda: engine.prefill(tiny.prompts(600, 4), context=context),
    }
    for message, use in cases.items():
        with pytest.raises(InputError, match=message):
            use()
    same_as_fresh(engine.generate(tiny.prompts(20, 9), 5, context=context), engine, tiny.prompts(20, 9), 5)


def test_common_prefixes():
    assert shared_tokens([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_tokens([1, 2, 3], [1, 2]) == 2
    assert shared_tokens([], [1]) == shared_tokens([2], [1]) == 0


# ---------------------------------------------------------------------- on a GPU

WIDE = {"hidden_size": 384, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1}


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["graph", "compiled"])
@pytest.mark.parametrize("changes", [{}, {"correction_every": 4}, {"cache": "host"}], ids=str)
def test_replayed_steps_go_on(changes, execution):
    """Sequences move within the buffers that a graph has captured."""
    model, answers = tiny.model("llama", **WIDE).cuda(), tiny.prompts(8, 8)
    options = {"block_size": 16, "budget_tokens": 64, "execution": execution, **changes}
    engine = engine_of(model, **options)
    context = engine.prefill(tiny.prompts(90, 37))
    for more in turns([11, 30], [5, 4], [3, 3]):
        rows = [row + new for row, new in zip(context.prompts(), more, strict=True)]
        scores = engine.score(engine.prefill(rows, context=context), answers)
        assert any(context.cached_tokens)
        torch.testing.assert_close(scores, engine.score(rows, answers), atol=5e-3, rtol=5e-3)


@pytest.mark.gpu
def test_captured_rounds_go_on():
    model = tiny.model("llama", **WIDE).cuda()
    engine = engine_of(model, block_size=16, budget_tokens=96, verify_every=3)
    for rows, results in talk(engine, tiny.prompts(90, 37), turns([11, 30], [5, 4], [3, 3])):
        same_as_fresh(results, engine, rows)
