"""`bench lossless` on a tiny model: it verifies, refuses, reports; times mean nothing here."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from typer.testing import CliRunner

from lycheedecode import Sampling
from lycheedecode.bench import lossless, lossless_exact, lossless_texts
from lycheedecode.cli import app

pytestmark = pytest.mark.usefixtures("benchmarks_collect_little")


def run(*arguments, status=0):
    done = CliRunner().invoke(app, ["bench", "lossless", *arguments])
    assert done.exit_code == status, done.output
    return done


def test_smoke_writes_its_report(tmp_path):
    path = tmp_path / "lossless.json"
    arguments = ["--smoke", "--batches", "1,2", "--drafts", "3", "--refresh", "1,8", "--tokens-per-round", "3.5"]
    arguments += ["--weights", "model,float8"]
    done = run(*arguments, "--json", str(path))
    rows = json.loads(path.read_text())["result"]["rows"]
    assert [(row["batch"], row["weights"], row["refresh"]) for row in rows] == [
        (batch, weights, refresh) for batch in (1, 2) for weights in ("model", "float8") for refresh in (1, 3)
    ]
    assert all(row["error"] < (2e-2 if torch.cuda.is_available() else 1e-4) for row in rows)
    assert all(row["ms_per_token"] == row["round_ms"] / 3.5 for row in rows)
    assert ["keep_ms" in row for row in rows] == [False, True] * 4
    assert "if a round yields 3.5 tokens" in done.stdout


def test_rounds_yield_what_was_measured_unless_told(tmp_path):
    path = tmp_path / "lossless.json"
    run("--smoke", "--weights", "model,float8", "--json", str(path))
    rows = json.loads(path.read_text())["result"]["rows"]
    assert [(row["weights"], row["tokens_per_round"]) for row in rows] == [("model", 8.5), ("float8", 8.13)]
    assert rows[0]["speedup"] == pytest.approx(rows[0]["full_ms"] / rows[0]["ms_per_token"])
    unknown = run("--smoke", "--drafts", "3", status=2).stderr
    assert "What a round of 3 drafts yields was not measured: give tokens_per_round." in unknown
    too_many = run("--smoke", "--drafts", "3", "--tokens-per-round", "4.5", status=2).stderr
    assert "A round of 3 drafts yields 1 to 4 tokens, not 4.5." in too_many


def test_a_wrong_pass_is_refused(monkeypatch):
    monkeypatch.setattr(
        lossless.Rounds, "verify_logits", lambda self, ids: torch.randn(*ids.shape, 512, device=ids.device)
    )
    assert "pass of 9 tokens differ from the eager step" in run("--smoke", status=1).stderr


@pytest.fixture
def mine(monkeypatch, tmp_path):
    """Arguments that name a tiny model, its plan and its texts."""
    path = tmp_path / "plan.json"
    tiny.plan().save(path)
    model = tiny.model().to("cuda" if torch.cuda.is_available() else "cpu")
    for module in (lossless_texts, lossless_exact):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: (model, tiny.byte_tokenizer()))
    monkeypatch.setattr(lossless_texts, "load_text", lambda source: source * 100)
    return ["--model", "mine", "--plan", str(path), "--contexts", "120", "--batches", "3", "--block-size", "8"]


def test_real_models_are_compared_token_by_token(mine, tmp_path):
    settings = ["--budget-tokens", "96", "--tokens", "30", "--ways", "hybrid,4,auto", "--weights", "model,float8"]
    path = tmp_path / "out.json"
    done = run("--parts", "real", *mine, *settings, "--temperature", "1.0", "--json", str(path))
    rows = json.loads(path.read_text())["result"]["rows"]
    names = [f"{way}, selected every 1{eight}" for way in ("hybrid", "4", "auto") for eight in ("", ", 8-bit drafts")]
    assert [row["way"] for row in rows] == ["full", *names]
    for row in rows:
        if not row["way"].startswith("hybrid"):
            assert row["same"] == [30] * 3
    assert rows[3]["tokens_per_round"] >= 1
    assert "of drafts accepted" in done.stdout


def rows_of(path):
    return json.loads(path.read_text())["result"]["rows"]


def test_texts_are_full_attentions(mine, tmp_path):
    path, settings = tmp_path / "out.json", ["--budgets", "80,96", "--tokens", "30", "--ways", "4", "--seeds", "1,2"]
    done = run("--parts", "exact", *mine, *settings, "--json", str(path))
    rows = rows_of(path)
    cases = [
        "greedy",
        "temperature 0.7, seed 1",
        "temperature 0.7, top_p 0.9, min_p 0.02, seed 2",
        "temperature 0.7, top_p 0.9, min_p 0.02, seed 2, with stops",
    ]
    assert [(row["budget_tokens"], row["case"]) for row in rows] == [(b, case) for b in (80, 96) for case in cases]
    for row in rows:
        assert (row["same"], row["tie_token"], row["wrong"]) == (row["tokens"], [], [])
        assert row["prompts"] == [120, 100, 80]
        if not row["case"].endswith("with stops"):
            assert 0 < row["accepted_share"] < 1
            assert row["tokens"] == [30] * 3
        else:
            assert row["finish_reasons"][0] == "eos"
            assert row["tokens"][0] < 30
    assert "3 of 3 texts (90 tokens) are full attention's" in done.stdout


@pytest.fixture
def in_16_bits(monkeypatch):
    model = tiny.model(dtype=torch.bfloat16).to("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(lossless_exact, "load_model", lambda *_, **__: (model, tiny.byte_tokenizer()))


def test_in_16_bits_texts_have_the_shape_of_the_pass(mine, in_16_bits, tmp_path):
    """They may leave full attention's at ties."""
    path, settings = tmp_path / "out.json", ["--budgets", "80", "--tokens", "16", "--ways", "4,auto", "--seeds", "1"]
    run("--parts", "exact", *mine, *settings, "--weights", "float8", "--json", str(path))
    rows = rows_of(path)
    assert [row["in_the_shape_of_the_pass"] for row in rows] == [[True] * 3] * 3 + [None] * 3
    for row in rows:
        for within, rounding in zip(row["tie_within"], row["tie_rounding"], strict=True):
            assert 0 <= within <= rounding < 1


def written(monkeypatch, change):
    """Lossless texts as `change` makes them."""
    generate = lossless_exact.Engine.generate

    def wrong(self, *arguments, **options):
        results = generate(self, *arguments, **options)
        return [change(one) for one in results] if self.config.verify_every else results

    monkeypatch.setattr(lossless_exact.Engine, "generate", wrong)


def other_token(one):
    return replace(one, token_ids=(*one.token_ids[:4], 255 - one.token_ids[4], *one.token_ids[5:]))


def shorter(one):
    return replace(one, token_ids=one.token_ids[:-1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(other_token, "sequence 0 at token 4 has"), (shorter, "ends after 7 tokens (length), not 8 (length)")],
)
def test_another_text_is_refused(mine, monkeypatch, tmp_path, change, sentence):
    """And its row stays in the file."""
    path, settings = tmp_path / "out.json", ["--budgets", "80", "--tokens", "8", "--ways", "4", "--seeds", "1"]
    written(monkeypatch, change)
    done = run("--parts", "exact", *mine, *settings, "--json", str(path), status=1)
    assert sentence in done.stderr
    assert "texts are not what they should be" in done.stderr
    assert len(rows_of(path)[0]["wrong"]) == 3


def tied(monkeypatch):
    """Every other token ties."""
    written(monkeypatch, other_token)
    near = {"found": 0, "right": 1, "gap_in_steps": 1e-9, "gap_in_prefill": 1e-9, "within": 1e-9, "rounding": 1e-8}
    monkeypatch.setattr(lossless_exact.Truth, "_measure", lambda *_: near)
    return ["--budgets", "80", "--tokens", "8", "--ways", "4", "--seeds", "1"]


def test_in_float32_a_tie_is_no_excuse(mine, monkeypatch):
    done = run("--parts", "exact", *mine, *tied(monkeypatch), status=1)
    assert "leaves full attention's text, at a tie within 1.0e-09" in done.stderr


def test_in_16_bits_it_is(mine, in_16_bits, monkeypatch):
    done = run("--parts", "exact", *mine, *tied(monkeypatch))
    assert "sequence 2 leaves at token 4: a tie within 1.0e-09 where rounding is 1.0e-08" in done.stdout


def test_a_tie_is_as_wide_as_the_smallest_move_that_changes_the_token(mine):
    """Against the logits themselves: greedy, half of their gap."""
    model, prompts = tiny.model(), tiny.prompts(60, 37)
    full = lossless_exact.Engine(model)
    truth = lossless_exact.Truth(full, prompts, full.prefill(prompts, room=20), 12)
    truth.write({"greedy": Sampling()})
    [case, _] = truth.texts
    row = truth.texts[case][1].token_ids
    logits = full.prefill([prompts[1] + list(row[:9])]).logits[0]
    right, found = logits.topk(2).indices.tolist()
    assert right == row[9]
    gap = float(logits[right] - logits[found])
    tie = truth._measure(case, 1, 9, found, right)
    assert [tie["gap_in_steps"], tie["gap_in_prefill"]] == pytest.approx([gap, gap], abs=1e-3)
    assert "wrong" in tie  # rounding in float32 does not reach so far
    logits_of = truth._steps
    truth._steps = lambda *_: logits_of(case, 9) + torch.linspace(0, 2 * gap, 260)
    moved = truth._measure(case, 1, 9, found, right)
    assert moved["within"] == pytest.approx(min(gap / 2, (gap + 2 * gap * (right - found) / 259) / 2), abs=1e-3 * gap)


def test_what_it_needs_is_said():
    assert "No plan ships for someone/else" in run("--parts", "real", "--model", "someone/else", status=2).stderr
    assert "parts must be of" in run("--parts", "all", status=2).stderr
    assert "ways must be" in run("--ways", "some", status=2).stderr
    assert "hybrid alone does not write" in run("--parts", "exact", "--ways", "hybrid", status=2).stderr
