"""Lossless decoding writes what full attention writes, token for token, whatever is drafted and whoever samples."""

from dataclasses import replace
from functools import cache
from itertools import chain, repeat

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lycheedecode import Engine, HeadPlan, HybridConfig, Sampling, policies
from lycheedecode.engine import passes
from lycheedecode.engine.pace import Pace, Schedule
from lycheedecode.engine.step import forward
from lycheedecode.errors import ConfigError
from lycheedecode.models.shape import ModelShape
from lycheedecode.ops import KV, reference, write_means

FORMS = {
    "hybrid": {},
    "once a round": {"refresh_every": 8},
    "paper": {"retrieval_attention": "full"},
    "float8": {"scan_keys": "float8"},
    "int4": {"scan_keys": "int4"},
    "completed": {"completion": "centroid", "completion_chunk": 8},
    "ratio": {"budget_tokens": None, "budget_ratio": 0.3},
}
SAMPLERS = {
    "greedy": Sampling(),
    "hot": Sampling(temperature=1.3, seed=1),
    "top_p": Sampling(temperature=0.8, top_p=0.9, min_p=0.01, seed=2),
    "top_k": Sampling(temperature=1.0, top_k=20, seed=1 << 45),
}


def lossless(model, every=5, execution="eager", family="llama", tokenizer=None, **settings):
    config = tiny.config(**{"budget_tokens": 32, "verify_every": every, **settings})
    return Engine(model, tokenizer, plan=tiny.plan_for(family), config=config, execution=execution)


def tokens(results):
    return [result.token_ids for result in results]


@cache
def full_attentions(sampler, *lengths):
    """40 tokens of each prompt."""
    return tokens(Engine(tiny.model()).generate(tiny.prompts(*lengths), 40, sampling=SAMPLERS[sampler]))


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("form", "sampler"),
    [*(("hybrid", sampler) for sampler in SAMPLERS), *((form, "top_k") for form in FORMS if form != "hybrid")],
)
def test_the_text_is_full_attentions(llama, form, sampler):
    results = lossless(llama, **FORMS[form]).generate(tiny.prompts(60, 37, 90), 40, sampling=SAMPLERS[sampler])
    assert tokens(results) == full_attentions(sampler, 60, 37, 90)
    for result in results:
        assert result.drafted == 5 * result.rounds
        assert 0 < result.accepted < result.drafted  # some, and not all
        assert result.rounds + result.accepted >= 39


@pytest.mark.parametrize(("execution", "every"), [*(("graph", every) for every in (1, 8, 31, "auto")), ("compiled", 3)])
def test_captured_rounds_write_the_same(llama, every, execution):
    """Off a GPU nothing is captured, but it is the same code, and all of it lies on the device."""
    rows, sampling = tiny.prompts(60, 37), SAMPLERS["top_p"]
    engine = lossless(llama, every, execution, completion="centroid", completion_chunk=8)
    if execution == "compiled":
        engine._decoder._backend = "aot_eager"
    expected = Engine(llama).generate(rows, 30, sampling=sampling)
    assert tokens(engine.generate(rows, 30, sampling=sampling)) == tokens(expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family):
    """Also layers that look back a limited way."""
    model, rows = tiny.model(family), tiny.prompts(60, 5, 37)
    for sampling in (SAMPLERS["greedy"], SAMPLERS["hot"]):
        expected = Engine(model).generate(rows, 30, sampling=sampling)
        assert tokens(lossless(model, family=family).generate(rows, 30, sampling=sampling)) == tokens(expected)


@pytest.mark.parametrize("name", policies.NAMES)
def test_every_policy_drafts(llama, name):
    shape, coverage = ModelShape.of(llama), torch.rand(8, 8)
    config = tiny.config(32)
    policy = policies.make(name, shape=shape, config=config, plan=tiny.plan(), coverage=coverage)
    engine = Engine(
        llama, attention=policy.attention, config=replace(policy.config, verify_every=4, correction_every=0)
    )
    rows, sampling = tiny.prompts(60, 37), SAMPLERS["hot"]
    assert tokens(engine.generate(rows, 20, sampling=sampling)) == tokens(
        Engine(llama).generate(rows, 20, sampling=sampling)
    )


@pytest.mark.parametrize("budget", [64, 128, 256, 1024])
def test_every_budget(llama, budget):
    rows = tiny.prompts(300, 180)
    config = HybridConfig(budget_tokens=budget, block_size=16, verify_every=6)
    results = Engine(llama, plan=tiny.plan(), config=config).generate(rows, 50, sampling=SAMPLERS["hot"])
    assert tokens(results) == tokens(Engine(llama).generate(rows, 50, sampling=SAMPLERS["hot"]))
    if budget == 1024:  # it covers the context: drafts are full attention's
        assert all(result.accepted == result.drafted for result in results)
        assert all(result.rounds == 7 for result in results)


def test_full_attention_in_the_shape_of_the_pass(llama):
    """Without a plan nothing is drafted, and every token comes from the same pass, so also in 16 bits all are equal."""
    rows = tiny.prompts(60, 37)
    for model in (llama, tiny.model(dtype=torch.bfloat16)):
        for sampling in (SAMPLERS["greedy"], SAMPLERS["hot"]):
            shaped = Engine(model, config=HybridConfig(verify_every=5)).generate(rows, 30, sampling=sampling)
            assert tokens(lossless(model).generate(rows, 30, sampling=sampling)) == tokens(shaped)
            assert [(result.rounds, result.drafted) for result in shaped] == [(29, 0)] * 2
            if model is llama:
                assert tokens(shaped) == tokens(Engine(model).generate(rows, 30, sampling=sampling))


def test_in_16_bits_other_tokens_are_near_ties():
    """Where a text leaves full attention's, full attention had both tokens within its rounding."""
    model, rows = tiny.model(dtype=torch.bfloat16), tiny.prompts(60, 37, 21, 90)
    full, exact = Engine(model), Engine(tiny.model())
    results = zip(rows, lossless(model).generate(rows, 60), full.generate(rows, 60), strict=True)
    for row, one, other in results:
        for t, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
            if a != b:
                fed = row + list(one.token_ids[:t])
                logits, right = full.prefill([fed]).logits[0], exact.prefill([fed]).logits[0]
                assert (right[a] - right[b]).abs() <= 4 * (logits - right).abs().max()
                break


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(("execution", "every"), [("eager", 5), ("graph", 8), ("graph", "auto"), ("compiled", 8)])
def test_on_a_gpu(family, execution, every):
    """Captured rounds in float32 write what full attention does there; in 16 bits, what it does in the pass's shape."""
    rows = tiny.prompts(60, 37, 90)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.model(family, dtype).cuda()
        shaped = {"config": HybridConfig(verify_every=8 if every == "auto" else every), "execution": execution}
        full = Engine(model) if dtype == torch.float32 else Engine(model, **shaped)
        if dtype == torch.bfloat16 and every == "auto":
            continue  # its full steps have a shape of their own
        engine = lossless(model, every, execution, family, completion="centroid", completion_chunk=8)
        for sampling in SAMPLERS.values():
            results = engine.generate(rows, 60, sampling=sampling)
            assert tokens(results) == tokens(full.generate(rows, 60, sampling=sampling))
        if every != "auto":
            assert all(result.accepted for result in results)


# ---------------------------------------------------------------------- where a text ends


@pytest.mark.parametrize("most", [1, 2, 5, 6, 7])
def test_most_tokens(llama, most):
    rows = tiny.prompts(60, 37)
    expected = Engine(llama).generate(rows, most)
    results = lossless(llama).generate(rows, most)
    assert [(r.token_ids, r.finish_reason) for r in results] == [(r.token_ids, "length") for r in expected]


def test_the_last_position(llama):
    rows = tiny.prompts(500, 470)
    expected = Engine(llama).generate(rows, 100)
    assert tokens(lossless(llama).generate(rows, 100)) == tokens(expected)
    assert len(expected[0].token_ids) == 13


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_the_last_position_of_a_table(execution):
    """Rounds end behind it; what they compute there is dropped."""
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=48, n_layer=4, n_head=4, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for length in (40, 57, 63):
        rows = tiny.prompts(length, 9)
        expected = Engine(model).generate(rows, 30, ignore_eos=True)
        assert len(expected[0].token_ids) == min(65 - length, 30)
        for every in (1, 8, "auto"):
            drafts = tiny.config(32, verify_every=every)
            engine = Engine(model, plan=HeadPlan.all_retrieval(4, 4), config=drafts, execution=execution)
            assert tokens(engine.generate(rows, 30, ignore_eos=True)) == tokens(expected)


def test_stop_tokens_and_strings(llama, byte_tokenizer):
    rows = tiny.prompts(60, 37, 44)
    free = Engine(llama, byte_tokenizer).generate(rows, 40)
    for stop in (
        [free[0].token_ids[7], free[1].token_ids[11]],
        [free[0].text[3:6], free[2].text[9:12]],
        [free[1].text[5], free[0].token_ids[20]],
    ):
        expected = Engine(llama, byte_tokenizer).generate(rows, 40, stop=stop)
        results = lossless(llama, tokenizer=byte_tokenizer).generate(rows, 40, stop=stop)
        for one, other in zip(results, expected, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


def test_pieces_are_the_text(llama, byte_tokenizer):
    engine = lossless(llama, tokenizer=byte_tokenizer)
    pieces = list(engine.stream(tiny.prompts(60, 37), 30))
    for sequence in (0, 1):
        own = [piece for piece in pieces if piece.sequence == sequence]
        assert "".join(piece.text for piece in own) == own[-1].generation.text


def test_who_has_ended_is_not_read_any_more(llama):
    rows = tiny.prompts(90, 90)
    [first, _] = Engine(llama).generate(rows, 60)
    engine = lossless(llama)
    context = engine.prefill(rows, room=100)
    engine.generate(context, 60, stop=[first.token_ids[3]])
    early, late = context.kv_bytes.tolist()
    assert early < 0.4 * late


# ---------------------------------------------------------------------- neighbours, contexts, seeds


def test_neighbours_do_not_matter(llama):
    rows, sampling = tiny.prompts(60, 37, 90), SAMPLERS["hot"]
    together = tokens(lossless(llama).generate(rows, 30, sampling=sampling))
    assert tokens(lossless(llama).generate(rows[:1], 30, sampling=sampling)) == together[:1]
    assert tokens(lossless(llama).generate([rows[2], rows[1]], 30, sampling=sampling))[1] == together[1]


def test_one_prefill_serves_many_generations(llama):
    """Of many engines, with many seeds; what was captured for one generation serves the next."""
    engine, plain = lossless(llama, scan_keys="float8"), Engine(llama)
    context = engine.prefill(tiny.prompts(60, 37))
    for seed in (1, 2, 1):
        sampling = Sampling(temperature=1.0, seed=seed)
        expected = tokens(plain.generate(context, 20, sampling=sampling))
        assert tokens(engine.generate(context, 20, sampling=sampling)) == expected
    assert tokens(lossless(llama, 3).generate(context, 20)) == tokens(plain.generate(context, 20))
    context = engine.prefill(tiny.prompts(60, 37), room=60)
    made = []
    for seed in (1, 2):
        engine.generate(context, 20, sampling=Sampling(temperature=1.0, seed=seed))
        made.append([rounds for key, rounds in context.kept_steps.items() if "rounds" in key])
    assert len(made[0]) == 1
    assert made[0] == made[1]


def test_without_a_seed_texts_differ(llama):
    engine, sampling = lossless(llama), Sampling(temperature=1.5)
    context = engine.prefill(tiny.prompts(60), room=60)
    assert tokens(engine.generate(context, 20, sampling=sampling)) != tokens(
        engine.generate(context, 20, sampling=sampling)
    )


# ---------------------------------------------------------------------- what an attention keeps beside the cache


@pytest.mark.parametrize("form", ["float8", "int4"])
def test_what_is_kept_beside_the_cache_follows_it(llama, form):
    """Copies of keys and means of chunks are those of the accepted tokens."""
    settings = {"scan_keys": form, "completion": "centroid", "completion_chunk": 8}
    engine = lossless(llama, 4, **settings)
    context = engine.prefill(tiny.prompts(60, 37), room=100)
    engine.generate(context, 40, sampling=SAMPLERS["hot"])
    check_what_is_kept(context)


def check_what_is_kept(context):
    """For every token that was followed."""
    [rounds] = [rounds for key, rounds in context.kept_steps.items() if "rounds" in key]
    state, starts, filled = context.cache.state, context.cache.starts, rounds._followed
    for layer in range(tiny.LAYERS):
        store = context.cache.layers[layer].store
        heads = state.copy.heads[layer]
        if heads:
            copy = state.copy.of_layer(layer)
            right = copy.views(torch.zeros_like)
            reference.write_copy(right, store[0], heads, 0, store[0].shape[2])
        right_means = torch.zeros_like(torch.stack(state.means.of_layer(layer)))
        write_means(KV(*store, filled - starts, starts), 8, *right_means)
        for b, end in enumerate(filled.tolist()):
            begin = int(starts[b])
            if heads:
                own, same = (x.floats().clone()[b, :, begin:end] for x in (copy, right))
                assert torch.equal(own, same)
            chunks = (end - begin) // 8
            for mean, expected in zip(state.means.of_layer(layer), right_means, strict=True):
                torch.testing.assert_close(mean[b, :, :chunks], expected[b, :, :chunks])


def test_the_first_round_reads_no_means_that_were_not_written(llama):
    """Chunks that end among its drafts are complete when its last ones are drafted."""
    engine = lossless(llama, 16, completion="centroid", completion_chunk=8)
    context = engine.prefill(tiny.prompts(60, 37), room=100)
    engine.generate(context, 1)
    means = context.cache.state.means
    means.means.fill_(torch.nan)
    means.truncate(0)
    engine.generate(context, 1)  # the prompts' token: no round has begun
    for b, tokens in enumerate((60, 37)):
        written, complete = tokens // 8, (tokens + 16) // 8
        assert means.means[:, :, b, :, :complete].isfinite().all()
        assert complete > written + 1
        last = tokens - written * 8
        store = context.cache.layers[0].store[0][b, :, 60 - last : 60]
        torch.testing.assert_close(means.of_layer(0)[0][b, :, written], store.sum(1) / last)


@pytest.mark.parametrize(("execution", "lengths"), [("graph", (60, 37)), ("eager", (3, 2))])
def test_what_full_steps_wrote_is_followed_before_drafts(llama, monkeypatch, execution, lengths):
    """Also after more of them in a row than are followed at once, and of prompts that only a scan would have copied."""
    schedules = iter([Schedule(0, 1)] * 70 + [Schedule(8, 8)] * 2 + [Schedule(0, 1)] * 3 + [Schedule(8, 8)] * 9)
    monkeypatch.setattr(Pace, "next", lambda self: next(schedules))
    engine = lossless(
        llama, "auto", execution, budget_tokens=64, scan_keys="float8", completion="centroid", completion_chunk=8
    )
    rows, sampling = tiny.prompts(*lengths), SAMPLERS["hot"]
    context = engine.prefill(rows, room=200)
    results = engine.generate(context, 88, sampling=sampling)
    assert tokens(results) == tokens(Engine(llama).generate(rows, 88, sampling=sampling))
    check_what_is_kept(context)


def test_who_has_ended_gets_no_means(llama, monkeypatch):
    """Also where its last tokens come from full steps that nothing has followed yet."""
    schedules = chain([Schedule(0, 1)] * 20, repeat(Schedule(8, 8)))
    monkeypatch.setattr(Pace, "next", lambda self: next(schedules))
    engine = lossless(llama, "auto", budget_tokens=64, completion="centroid", completion_chunk=8)
    rows = tiny.prompts(60, 37)
    context = engine.prefill(rows, room=200)
    engine.generate(context, 1)
    last = context.cache.state.means.means[:, :, :, :, -3:]
    last.fill_(torch.nan)
    first, second = tokens(Engine(llama).generate(rows, 60))
    stop = next(token for token in first[5:18] if token not in second)
    results = engine.generate(context, 60, stop=stop)
    assert len(results[0].token_ids) <= 18 < len(results[1].token_ids)
    assert last.isnan().all()  # there are more of them than tokens


# ---------------------------------------------------------------------- passes


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("many", [1, 7, 32])
def test_a_pass_is_as_many_steps_of_full_attention(family, many):
    engine = Engine(tiny.model(family))
    rows, answers = tiny.prompts(60, 37), torch.tensor(tiny.prompts(many, many))
    context = engine.prefill(rows, room=40)
    expected = engine.score(context, answers)
    stepped = [layer.store[0].clone() for layer in context.cache.layers]
    with torch.inference_mode(), engine._decoder.route:
        one = passes.DensePass(context.cache, many, engine._full, engine._windows, context.kv_bytes)
        one.token_ids.copy_(answers)
        one.filled.fill_(context.cache.length + many)
        logits = one.run(forward, engine.model)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    filled = context.cache.length + many
    for layer, keys in zip(context.cache.layers, stepped, strict=True):
        torch.testing.assert_close(layer.store[0][0, :, :filled], keys[0, :, :filled], atol=1e-4, rtol=1e-4)


def test_cache_correction_in_longer_stretches_than_a_pass_takes(llama):
    rows, answers = tiny.prompts(60, 37), torch.tensor(tiny.prompts(45, 45))
    corrected = Engine(llama, plan=tiny.plan(), config=tiny.config(32, correction_every=45))
    logits = corrected.score(rows, answers)
    torch.testing.assert_close(logits[:, -1], Engine(llama).score(rows, answers)[:, -1], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- how many drafts


def paced(select, keep, verify, full, shares, rounds=60):
    """What a pace settles on, in seconds of its parts, where such shares of drafts are accepted for each refresh."""
    pace, drawn = Pace(8, fixed=False, refreshes=tuple(shares)), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        schedule = pace.next()
        share, drafts = shares[schedule.refresh], schedule.drafts
        accepted = [int((torch.rand(drafts, generator=drawn) < share).long().cumprod(0).sum()) for _ in range(4)]
        drafting = [keep if j % schedule.refresh else select for j in range(drafts)]
        pace.record(schedule, accepted, drafting, verify if drafts else full)
    return tuple(schedule)


def test_drafts_are_as_many_as_pay():
    assert paced(0.3, 0.3, 1, 1, {1: 0.97}) == (8, 1)
    assert 2 <= paced(0.5, 0.5, 1, 1, {1: 0.85})[0] <= 5
    assert paced(0.9, 0.9, 1.2, 1, {1: 0.9})[0] == 0  # a draft is hardly cheaper than a full step
    assert paced(0.5, 0.5, 1, 1, {1: 0.2})[0] == 0
    assert paced(0.1, 0.1, 1, 1, {1: 0.5})[0] >= 2


def test_a_pass_that_takes_longer_for_more_tokens():
    """As on a CPU: what five tokens took tells what nine will take."""
    pace = Pace(8, fixed=False)
    pace.record(pace.next(), [0], [], 1.0)
    pace.record(pace.next(), [4], [0.5] * 4, 2.6)  # 9 tokens in 0.5 * 8 + 4.2 full steps at most
    assert [pace.next().drafts for _ in range(9)] == [0] * 9
    pace.record(Schedule(4, 1), [4], [0.2] * 4, 1.2)
    assert pace.next().drafts > 4


def test_selections_are_made_as_often_as_pays():
    assert paced(0.5, 0.2, 1, 1, {1: 0.97, 8: 0.94})[1] == 8
    assert paced(0.3, 0.28, 1, 1, {1: 0.97, 8: 0.7})[1] == 1


def test_drafting_is_tried_again():
    pace = Pace(8, fixed=False)
    assert [pace.next() for _ in range(3)] == [(0, 1), (4, 1), (0, 1)]  # what these tell comes a round late
    pace.record(Schedule(0, 1), [0], [], 1.0)
    pace.record(Schedule(4, 1), [0], [1.0] * 4, 1.0)
    tried = [turn for turn in range(1, 3000) if pace.next().drafts]
    assert tried == [64, 192, 448, 960, 1984]  # the longest wait is 1024
    for _ in range(20):  # the text has changed
        pace.record(Schedule(8, 1), [8], [0.1] * 8, 1.0)
    assert [pace.next().drafts for _ in range(3)] == [8, 8, 8]
    assert Pace(6, fixed=True, refreshes=(3,)).next() == (6, 3)


def test_other_selections_are_tried_where_that_would_pay():
    for accepted, passing, tried in ((4, 1.25, False), (3, 1.25, True), (0, 2.6, False)):  # of all: nothing to gain
        pace = Pace(8, fixed=False, refreshes=(1, 8))
        pace.record(pace.next(), [0], [], 1.0)
        pace.record(pace.next(), [accepted] * 20, [0.35] + [0.3] * 3, passing)
        assert any(pace.next().refresh == 1 and pace.next().drafts for _ in range(5)) == tried


def speedup(select, keep, verify, share, tokens=256, batch=16):
    """Of a batch whose rounds are launched one ahead, over full steps of one second; all times vary by 5%."""
    drawn = torch.Generator().manual_seed(0)
    pace, shares = Pace(8, fixed=False, refreshes=(1, 8)), {1: share, 8: share - 0.03}

    def vary(seconds):
        return seconds * (1 + 0.1 * (float(torch.rand((), generator=drawn)) - 0.5))

    seconds, written, launched = 0.0, torch.ones(batch), pace.next()
    while (written < tokens).any():
        (drafts, refresh), launched = launched, pace.next()
        agrees = torch.rand(batch, drafts, generator=drawn) < shares[refresh]
        accepted = agrees.long().cumprod(1).sum(1)
        drafting = [vary(keep if j % refresh else select) for j in range(drafts)]
        passing = vary(verify if drafts else 1.0)
        pace.record(Schedule(drafts, refresh), accepted[written < tokens].tolist(), drafting, passing)
        seconds, written = seconds + sum(drafting) + passing, written + accepted + 1
    return (tokens - 1) / seconds


def test_auto_does_no_harm():
    """Rounds of a batch end with its last sequence, and trying drafts costs little where they do not pay."""
    assert speedup(0.27, 0.235, 1.11, 0.97) > 2  # about 32 x 30000, Qwen2.5-Coder-1.5B on an H100
    for select, keep, verify, share in (
        (0.8, 0.75, 1.5, 0.95),  # drafts hardly cheaper than full steps
        (0.95, 0.95, 1.5, 0.9),
        (0.6, 0.55, 1.3, 0.5),  # few accepted
        (0.9, 0.9, 2.0, 0.3),
    ):
        assert speedup(select, keep, verify, share) > 0.95


def test_auto_selects_once_a_round_where_the_budget_has_room():
    assert lossless(tiny.model(), "auto", budget_tokens=64).attention.refresh_every == 8
    assert lossless(tiny.model(), "auto", budget_tokens=12).attention.refresh_every == 1
    assert lossless(tiny.model(), 8, budget_tokens=64).attention.refresh_every == 1


def test_auto_without_a_plan_is_full_attention(llama):
    rows = tiny.prompts(60, 37)
    results = Engine(llama, config=HybridConfig(verify_every="auto")).generate(rows, 20)
    assert tokens(results) == tokens(Engine(llama).generate(rows, 20))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("every", [-1, 32, 2.5, True, "always", None])
def test_numbers_of_drafts_are_checked(every):
    with pytest.raises(ConfigError, match=r"verify_every must be 'auto' or a whole number from 0 to 31"):
        HybridConfig(verify_every=every)


def test_only_generations_verify(llama):
    engine = lossless(llama, 4)
    context = engine.prefill(tiny.prompts(30))
    for ask in (lambda: engine.score(context, [[5]]), lambda: engine.decode_one_token(context, torch.tensor([5]))):
        with pytest.raises(ConfigError, match="Only generations verify"):
            ask()


def test_cache_correction_is_not_for_rounds():
    with pytest.raises(ConfigError, match="leave out correction_every"):
        HybridConfig(verify_every=4, correction_every=32)


def test_a_long_sequence_that_has_ended_keeps_the_positions_of_the_others():
    """Positions of a batch are those of its longest text, whether that is being decoded still or not."""
    model = tiny.longrope(64)
    for shift in (1, 3, 8):
        rows = [[(token + shift) % 250 + 4 for token in row] for row in tiny.prompts(78, 39, 40)]
        engine = Engine(model, plan=tiny.plan(), config=tiny.config(32, verify_every=3))
        found = engine.generate(rows, 9, ignore_eos=True)
        expected = Engine(model).generate(rows, 9, ignore_eos=True)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
