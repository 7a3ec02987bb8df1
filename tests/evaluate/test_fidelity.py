"""Fidelity against straightforward recomputation, on tiny models."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch

from lycheedecode import Engine, HeadPlan, HybridConfig
from lycheedecode.errors import ConfigError
from lycheedecode.evaluate import fidelity
from lycheedecode.evaluate.engines import Coverage, coverage_for
from lycheedecode.evaluate.fidelity import Choice, Long, measure_fidelity
from lycheedecode.evaluate.scores import Sums, overall
from lycheedecode.evaluate.variants import variants
from lycheedecode.identify import Cell
from lycheedecode.policies import PolicyError
from lycheedecode.prompts.makers import makers_for

CONFIG = HybridConfig(budget_tokens=48, block_size=8, sink_tokens=4, recent_tokens=8)
PLANS = {"tiny": tiny.plan()}
CELL = Cell("noise", 300)
LONG = Long("prose", 300, 14)
CONTINUED = Cell("code", 300, "continuation", 10)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_tokenizer()


def measure(llama, tokenizer, names, cells, **options):
    return measure_fidelity(llama, tokenizer, variants(names, PLANS, CONFIG), cells, **{"prompts": 3, **options})


def drawn(tokenizer, cell, number=3):
    return cell.make(makers_for(tokenizer, [cell], "evaluate"), number, random.Random(f"fidelity/0/{cell}"))


def engines(llama, tokenizer):
    return Engine(llama, tokenizer), Engine(llama, tokenizer, plan=tiny.plan(), config=CONFIG)


def test_scores_are_what_two_engines_say(llama, tokenizer):
    found = measure(llama, tokenizer, ["hybrid"], [CELL])[str(CELL)]
    kl, agreed, diverged, kv_bytes = [], [], [], []
    full, hybrid = engines(llama, tokenizer)
    for prompt in drawn(tokenizer, CELL):
        fed = [prompt.answer_ids[:-1]]
        expected, actual = (e.score([prompt.prompt_ids], fed)[0].log_softmax(-1) for e in (full, hybrid))
        kl += (expected.exp() * (expected - actual)).sum(-1).tolist()
        agreed += (expected.argmax(-1) == actual.argmax(-1)).tolist()
        length = len(prompt.answer_ids)
        one, two = (e.generate([prompt.prompt_ids], length, ignore_eos=True)[0] for e in (full, hybrid))
        pairs = zip(one.token_ids, two.token_ids, strict=True)
        diverged.append(next((i for i, (a, b) in enumerate(pairs) if a != b), length))
        kv_bytes.append(two.kv_bytes_per_token)
    score = found["hybrid"]
    assert score["prompts"] == 3
    assert score["tokens"] == len(kl)
    assert score["kl_mean"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert score["kl_p99"] == pytest.approx(float(torch.tensor(kl).double().quantile(0.99)), rel=1e-3)
    assert score["top1_agreement"] == pytest.approx(sum(agreed) / len(agreed))
    assert score["first_divergence"] == pytest.approx(sum(diverged) / 3)
    assert score["kv_bytes_per_token"] == pytest.approx(sum(kv_bytes) / 3)
    assert (score["policy"], score["plan"], score["retrieval_heads"], score["budget_tokens"]) == (
        "hybrid",
        "tiny",
        4,
        48,
    )
    assert found["full"]["kl_mean"] == 0
    assert found["full"]["same_answer"] == 1


@pytest.mark.parametrize("cell", [CELL, LONG], ids=["task", "long"])
def test_batches_change_nothing(llama, tokenizer, cell):
    one, all_three = (
        measure(llama, tokenizer, ["hybrid", "quest"], [cell], batch_size=size, temperature=0)[str(cell)]
        for size in (1, 3)
    )
    for label in one:
        for name in ("kl_mean", "kl_p99", "top1_agreement", "first_divergence", "kv_bytes_per_token"):
            assert one[label][name] == pytest.approx(all_three[label][name], rel=1e-2, abs=1e-5), (label, name)


def test_a_long_answers_divergence_is_that_of_generating(llama, tokenizer):
    found = measure(llama, tokenizer, ["hybrid", "hybrid+correction"], [LONG], temperature=0)[str(LONG)]
    full, hybrid = engines(llama, tokenizer)
    same = []
    for prompt in drawn(tokenizer, LONG):
        one, two = (e.generate([prompt.prompt_ids], 14, ignore_eos=True)[0].token_ids for e in (full, hybrid))
        same.append(next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), 14))
    assert min(same) < 14
    assert found["hybrid"]["first_divergence"] == pytest.approx(sum(same) / 3)
    assert found["hybrid"]["tokens"] == 3 * 13
    assert found["hybrid"]["exact_match"] is None
    assert found["hybrid+correction"]["correction_every"] == 32


def test_drawn_answers_are_continued_with_the_same_random_numbers(llama, tokenizer):
    """Policies that are exact draw what full attention draws, however hot."""
    roomy = HybridConfig(block_size=8, sink_tokens=4, recent_tokens=8)
    compared = variants(["hybrid", "streaming"], PLANS, roomy)
    found = measure_fidelity(llama, tokenizer, compared, [LONG], prompts=2, batch_size=2, temperature=1.5)[str(LONG)]
    assert [score["same_answer"] for score in found.values()] == [1, 1, 1, 1]


def test_choices_are_those_of_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).repeat(20_000, 1)
    counts = Choice(0.7, "x")(logits, 3).bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, (logits[0] / 0.7).softmax(-1), atol=0.02, rtol=0)
    assert torch.equal(Choice(0.7, "x")(logits, 3), Choice(0.7, "x")(logits, 3))
    assert not torch.equal(Choice(0.7, "x")(logits, 3), Choice(0.7, "x")(logits, 4))


def test_answers_that_are_followed_are_not_decoded_again(llama, tokenizer, monkeypatch):
    """The true answers are made those of the model, so full attention and its equals never generate."""
    full, _ = engines(llama, tokenizer)
    cells = Cell.make

    def make(cell, makers, number, rng):
        prompts = cells(cell, makers, number, rng)
        own = [full.generate([prompt.prompt_ids], 12, ignore_eos=True)[0].token_ids for prompt in prompts]
        return [
            type(prompt)(prompt.prompt_ids, ids, (tokenizer.decode(ids),))
            for prompt, ids in zip(prompts, own, strict=True)
        ]

    monkeypatch.setattr(Cell, "make", make)
    generated = []
    generate = fidelity._generate
    monkeypatch.setattr(fidelity, "_generate", lambda *given: generated.append(1) or generate(*given))
    roomy = HybridConfig(block_size=8, sink_tokens=4, recent_tokens=8)
    compared = variants(["hybrid", "own-topk"], PLANS, roomy)
    found = measure_fidelity(llama, tokenizer, compared, [CELL], prompts=2, batch_size=2)[str(CELL)]
    assert not generated
    assert {(score["exact_match"], score["same_answer"], score["first_divergence"]) for score in found.values()} == {
        (1, 1, 12)
    }
    tight = measure(llama, tokenizer, ["streaming"], [CELL], prompts=2)[str(CELL)]
    assert generated
    assert tight["streaming"]["exact_match"] < 1


def test_kascade_is_calibrated_on_the_same_kinds_of_prompts(llama, tokenizer):
    cells = [Cell("noise", 250), Long("noise", 250, 5)]
    compared = variants(["hybrid", "kascade"], PLANS, CONFIG)
    coverage = coverage_for(llama, tokenizer, compared, cells)
    assert coverage_for(llama, tokenizer, compared[:2], cells) is None
    table = coverage(CONFIG)
    assert table.shape == (8, 8)
    assert table.diagonal().mean() > table[6:, :2].mean()
    assert coverage(CONFIG) is table
    assert coverage(replace(CONFIG, budget_tokens=96)).mean() > table.mean()
    found = measure(llama, tokenizer, ["kascade"], cells, prompts=1)
    assert all(scores["kascade"]["kl_mean"] > 0 for scores in found.values())


def test_kascade_is_calibrated_at_the_budget_that_decodes(llama, tokenizer, monkeypatch):
    asked = []
    measured = Coverage.__call__
    monkeypatch.setattr(Coverage, "__call__", lambda self, config: asked.append(config) or measured(self, config))
    found = measure(llama, tokenizer, ["hybrid", "kascade"], [CONTINUED], prompts=1, match_bytes=True)[str(CONTINUED)]
    assert [config.budget_tokens for config in asked] == [found["kascade"]["budget_tokens"]]
    assert found["kascade"]["kv_bytes_per_token"] <= found["hybrid"]["kv_bytes_per_token"]


def test_continuations_are_drawn_fed_and_accepted(llama, tokenizer):
    """Against two engines: full attention draws, hybrid is fed."""
    found = measure(llama, tokenizer, ["hybrid"], [CONTINUED], temperature=0.9)[str(CONTINUED)]
    full, hybrid = engines(llama, tokenizer)
    kl, accepted, same = [], [], []
    for start, prompt in enumerate(drawn(tokenizer, CONTINUED)):
        context = full.prefill([prompt.prompt_ids], room=10)
        choose = Choice(0.9, f"fidelity/0/{CONTINUED}/{start}")
        ids = [int(choose(context.logits, 0))]
        for step in range(1, 10):
            ids.append(int(choose(full.decode_one_token(context, torch.tensor(ids[-1:])), step)))
        p, q = (engine.score([prompt.prompt_ids], [ids[:-1]])[0] for engine in (full, hybrid))
        kl += (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).tolist()
        accepted += torch.minimum((p / 0.9).softmax(-1), (q / 0.9).softmax(-1)).sum(-1).tolist()
        own = [ids[0], *(int(choose(logits[None], step)) for step, logits in enumerate(q, start=1))]
        same.append(next((i for i, (a, b) in enumerate(zip(own, ids, strict=True)) if a != b), 10))
    score = found["hybrid"]
    assert score["kl_mean"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert score["acceptance"] == pytest.approx(sum(accepted) / len(accepted), rel=1e-3)
    assert score["first_divergence"] == pytest.approx(sum(same) / 3)
    assert score["exact_match"] is None
    floor = found[fidelity.ROUNDING]
    assert floor["kl_mean"] < 1e-5
    assert floor["acceptance"] == pytest.approx(1, abs=1e-4)


def test_finished_cells_are_kept(llama, tokenizer):
    seen = []
    options = {"finished": {str(CELL): {"full": "kept"}}, "on_cell": lambda cell, scores: seen.append(cell)}
    found = measure(llama, tokenizer, ["hybrid"], [CELL, LONG], prompts=1, **options)
    assert found[str(CELL)] == {"full": "kept"}
    assert seen == [str(LONG)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("papre@tiny", "did you mean paper"),
        ("quest@tiny", "'quest' has no plan: leave '@tiny' away"),
        ("hybrid@other", "no plan 'other' among tiny"),
    ],
)
def test_a_policy_goes_with_a_plan_that_there_is(name, message):
    with pytest.raises(PolicyError, match=message):
        variants([name], PLANS, CONFIG)


def test_all_read_what_the_first_plan_reads(llama, tokenizer):
    config, cell = replace(CONFIG, budget_tokens=96), Cell("noise", 400)
    half = HeadPlan.from_donors([[(0, 0), (0, 1)], *[[(0, 0), (0, 0)]] * 3])
    compared = variants(["hybrid", "paper"], {"tiny": tiny.plan(), "half": half}, config, match_bytes=True)
    found = measure_fidelity(llama, tokenizer, compared, [cell], prompts=1, match_bytes=True)[str(cell)]
    most = found["hybrid, plan tiny"]["kv_bytes_per_token"]
    assert found["hybrid, plan tiny"]["budget_tokens"] == 96
    assert found["hybrid, plan half"]["budget_tokens"] > 96  # it scans with half as many heads
    for label in ("hybrid, plan half", "paper, plan half"):
        assert 0.9 * most < found[label]["kv_bytes_per_token"] <= most
    assert "reads at least" in found["paper, plan tiny"]["left_out"]


def test_kinds_share_the_time_and_say_how_far_they_came(llama, tokenizer, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fidelity.time, "perf_counter", lambda: now[0])

    def a_minute_each(*_):
        now[0] += 60

    short, long = Cell("noise", 200, "continuation", 4), Cell("noise", 400, "continuation", 4)
    found = measure(
        llama, tokenizer, ["hybrid"], [short, long], prompts=20, minutes=8.5, report=a_minute_each
    )  # 8.5 in all: 2.8, and then what is left
    assert [found[str(cell)]["hybrid"]["prompts"] for cell in (short, long)] == [3, 6]
    found = measure(llama, tokenizer, ["hybrid"], [short], prompts=20, batch_size=2, minutes=0)
    assert found[str(short)]["hybrid"]["prompts"] == 2


def test_kinds_of_one_name_are_refused(llama, tokenizer, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("Some words in a row. " * 300)
    cells = [Cell(str(tmp_path / name / "text.txt"), 300, "continuation", 4) for name in ("one", "two")]
    assert str(cells[0]) == "300 tokens of text.txt, 4 tokens continued"
    with pytest.raises(ConfigError, match="2 kinds of prompts would be called"):
        measure(llama, tokenizer, ["hybrid"], cells)


def test_positions_add_up():
    sums, mask = Sums(), torch.arange(20) < torch.tensor([[20], [7]])
    kl = torch.rand(2, 20)
    sums.add_tokens(kl, kl < 0.5, 1 - kl, mask, [1.0, 3.0])
    sums.add_answers([20, 3], [20, 7], [True, False])
    score = sums.score()
    assert [(bucket.first, bucket.last, bucket.tokens) for bucket in score.by_position] == [
        (0, 3, 8), (4, 7, 7), (8, 15, 8), (16, 19, 4)
    ]  # fmt: skip
    assert all(one.last < two.first for one, two in pairwise(score.by_position))
    weighted = sum(bucket.kl_mean * bucket.tokens for bucket in score.by_position)
    assert weighted / score.tokens == pytest.approx(score.kl_mean) == pytest.approx(float(kl[mask].mean()))
    assert (score.first_divergence, score.same_answer, score.exact_match, score.kv_bytes_per_token) == (
        11.5,
        0.5,
        0.5,
        2,
    )
    assert score.kl_p99 == pytest.approx(float(kl[mask].double().quantile(0.99)))
    assert score.acceptance == pytest.approx(1 - score.kl_mean)
    two = torch.stack([kl[0].mean(), kl[1, :7].mean()]).double()
    assert score.kl_error == pytest.approx(float(two.std() / 2**0.5))


def test_means_are_of_what_was_measured_everywhere():
    score = {"kl_mean": 1.0, "acceptance": 1.0, "top1_agreement": 1.0, "same_answer": 1.0, "kv_bytes_per_token": 2.0}
    measured = {"a": {"x": score, "y": score}, "b": {"x": {**score, "kl_mean": 3.0}, "y": {"left_out": "why"}}}
    assert overall(measured) == {"x": {**score, "kl_mean": 2.0}}
    assert overall({}) == {}


def test_variants_are_those_that_make_a_difference():
    two = {"a": tiny.plan(), "b": HeadPlan.all_retrieval(4, 2)}
    names = ["hybrid", "tidaldecode", "full", "full+correction"]
    labels = [each.label for each in variants(names, two, CONFIG, [64, 128], [8, 16])]
    assert labels[0] == "full"
    assert labels[1] == "hybrid, plan a, 64 tokens, blocks of 8"
    assert labels[9:] == ["tidaldecode, 64 tokens", "tidaldecode, 128 tokens", "full+correction"]
    assert len(labels) == len(set(labels)) == 12
    labels = [each.label for each in variants(["hybrid@b", "paper@a", "duo"], two, CONFIG)]
    assert labels == ["full", "hybrid, plan b", "paper, plan a", "duo, plan a", "duo, plan b"]
    matched = variants(["streaming", "duo"], two, CONFIG, match_bytes=True)
    assert [each.label for each in matched] == ["full", "streaming", "duo, plan a", "duo, plan b"]
    assert {each.like for each in matched[1:]} == {two["a"]}
    assert [each.label for each in variants(["streaming", "quest"], {}, CONFIG)] == ["full", "streaming", "quest"]
