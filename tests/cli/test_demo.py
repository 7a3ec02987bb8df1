"""Both ways of decoding from one prefill, and the demo that shows them."""

import math
import random
import sys

import pytest
import tiny
import torch

from lycheedecode import Engine, HybridConfig, demo
from lycheedecode.evaluate.side_by_side import Parting, compare
from lycheedecode.results import Result

SMALL = HybridConfig(budget_tokens=48, block_size=8, sink_tokens=4, recent_tokens=8)


@pytest.fixture
def engines(llama, byte_tokenizer):
    return Engine(llama, byte_tokenizer), Engine(llama, byte_tokenizer, plan=tiny.plan(), config=SMALL)


def test_each_side_is_what_its_engine_generates(engines):
    full, hybrid = engines
    [prompt] = tiny.prompts(150)
    comparison = compare(full, hybrid, prompt, 10, timed_tokens=14, repeats=2)
    for engine, run in ((full, comparison.full), (hybrid, comparison.hybrid)):
        [expected] = engine.generate([prompt], 10)
        assert run.token_ids == expected.token_ids
        assert run.answer == expected.text
        assert run.tokens_per_second > 0
    assert comparison.kl_mean > 0
    assert comparison.hybrid.kv_bytes_per_token < comparison.full.kv_bytes_per_token
    assert comparison.prompt_tokens == 150


def test_where_answers_part_both_candidates_are_measured(engines):
    full, hybrid = engines
    [prompt] = tiny.prompts(150)
    comparison = compare(full, hybrid, prompt, 40)
    at, parting = comparison.equal_tokens, comparison.parting
    chosen = [run.token_ids[at] for run in (comparison.full, comparison.hybrid)]
    for engine, found in ((full, parting.full), (hybrid, parting.hybrid)):
        context = engine.prefill([prompt], room=40)
        logits = context.logits
        for token_id in comparison.full.token_ids[:at]:
            logits = engine.decode_one_token(context, torch.tensor([token_id]))
        assert found == pytest.approx(logits[0].softmax(-1)[chosen].tolist(), rel=1e-4)
    assert parting.full[0] > parting.full[1]
    assert parting.hybrid[0] < parting.hybrid[1]
    assert parting.nats == pytest.approx(math.log(parting.full[0]) - math.log(parting.full[1]))


def test_a_near_tie_is_said_to_be_one_and_nothing_else_is():
    near = str(Parting(" a", " the", (0.21, 0.2), (0.2, 0.21)))
    assert near == (
        "full attention finds ' a' 21.0% and ' the' 20.0% probable (0.05 nats apart, a near tie), "
        "hybrid 20.0% and 21.0%"
    )
    assert "(0.69 nats apart), hybrid" in str(Parting(" a", " the", (0.4, 0.2), (0.2, 0.21)))
    assert "inf nats apart" in str(Parting(" a", " the", (1.0, 0.0), (0.2, 0.21)))


def test_a_budget_that_covers_all_agrees_in_everything(llama, byte_tokenizer):
    full, hybrid = Engine(llama, byte_tokenizer), Engine(llama, byte_tokenizer, plan=tiny.plan())
    comparison = compare(full, hybrid, tiny.prompts(90)[0], 12)
    assert comparison.full.token_ids == comparison.hybrid.token_ids
    assert (comparison.equal_tokens, comparison.parting, comparison.top1_agreement) == (12, None, 1.0)
    assert comparison.kl_mean == pytest.approx(0, abs=1e-6)


def test_an_answer_ends_at_its_end_token(engines, monkeypatch):
    full, hybrid = engines
    [prompt] = tiny.prompts(60)
    token_ids = compare(full, hybrid, prompt, 8).full.token_ids
    end = next(i for i in range(1, 8) if token_ids[i] not in token_ids[:i])
    monkeypatch.setattr("lycheedecode.evaluate.side_by_side.stop_token_ids", lambda *_: {token_ids[end]})
    assert compare(full, hybrid, prompt, 8, timed_tokens=12).full.token_ids == token_ids[: end + 1]
    assert compare(full, hybrid, prompt, 8, ignore_eos=True).full.token_ids == token_ids
    monkeypatch.setattr("lycheedecode.evaluate.side_by_side.stop_token_ids", lambda *_: {token_ids[0]})
    short = compare(full, hybrid, prompt, 8)
    assert (short.full.token_ids, short.top1_agreement, short.kl_mean) == (token_ids[:1], 1.0, 0.0)


def test_a_comparison_needs_a_decode_step(engines):
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        compare(*engines, tiny.prompts(9)[0], 1)


def test_the_pass_key_is_hidden_once_more_or_less_anywhere(byte_tokenizer):
    for seed in range(5):
        key, prompt_ids = demo.hide(byte_tokenizer, 400, random.Random(seed))
        text = byte_tokenizer.decode(prompt_ids)
        assert len(prompt_ids) == 400
        assert text.count(f"{demo.FACT} {key}.") == 2
        assert text.endswith(f"\n\n{demo.FACT}")
    with pytest.raises(ValueError, match="100 tokens have no room"):
        demo.hide(byte_tokenizer, 100, random.Random(0))


def test_the_demo_writes_what_it_found(byte_tokenizer, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    tiny.model().save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    tiny.plan().save(tmp_path / "plan.json")
    monkeypatch.setattr(demo, "CONFIG", SMALL)
    arguments = ["--model", f"{tmp_path}/model", "--plan", f"{tmp_path}/plan.json", "--tokens", "400"]
    monkeypatch.setattr(sys, "argv", ["demo", *arguments, "--out", f"{tmp_path}/build"])
    demo.main()
    record = Result.load(tmp_path / "build" / "demo.json").summary
    for name in ("full", "hybrid"):
        assert set(record[name]) == {"answer", "tokens_per_second", "kv_bytes_per_token"}
    assert {"top1_agreement", "kl_mean", "speedup", "plan"} <= set(record)
    assert (tmp_path / "build" / "demo.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert record["pass_key"] in said
    continued = record["continuation"]
    assert f"alike for {continued['equal_tokens']} of 64 tokens" in said
    assert f"Where they part, {Parting(**continued['parting'])}." in said
    assert (continued["prompt_tokens"], set(record) - set(continued)) == (400, {"pass_key", "continuation", "plan"})

    monkeypatch.setattr(sys, "argv", ["demo", "--plan", "nothing"])
    with pytest.raises(SystemExit, match="no head plan file"):
        demo.main()
