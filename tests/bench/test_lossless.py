"""`bench lossless` on a tiny model: it verifies, refuses, reports; times mean nothing here."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from typer.testing import CliRunner

from lycheedecode.bench import lossless, lossless_texts
from lycheedecode.cli import app


def run(*arguments, status=0):
    done = CliRunner().invoke(app, ["bench", "lossless", *arguments])
    assert done.exit_code == status, done.output
    return done


def test_smoke_writes_its_report(tmp_path):
    path = tmp_path / "lossless.json"
    arguments = ["--smoke", "--batches", "1,2", "--drafts", "3", "--refresh", "1,8", "--gained", "3.5"]
    arguments += ["--weights", "model,float8"]
    done = run(*arguments, "--json", str(path))
    rows = json.loads(path.read_text())["result"]["rows"]
    assert [(row["batch"], row["weights"], row["refresh"]) for row in rows] == [
        (batch, weights, refresh) for batch in (1, 2) for weights in ("model", "float8") for refresh in (1, 3)
    ]
    assert all(row["error"] < (2e-2 if torch.cuda.is_available() else 1e-4) for row in rows)
    assert all(row["ms_per_token"] == row["round_ms"] / 3.5 for row in rows)
    assert ["keep_ms" in row for row in rows] == [False, True] * 4
    assert "if 3.5 tokens are gained a round" in done.stdout


def test_a_wrong_pass_is_refused(monkeypatch):
    monkeypatch.setattr(
        lossless.Rounds, "verify_logits", lambda self, ids: torch.randn(*ids.shape, 512, device=ids.device)
    )
    assert "differs from full steps" in run("--smoke", status=1).stderr


@pytest.fixture
def mine(monkeypatch, tmp_path):
    """Arguments that name a tiny model, its plan and its texts."""
    path = tmp_path / "plan.json"
    tiny.plan().save(path)
    model = tiny.model().to("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(lossless_texts, "load_model", lambda *_, **__: (model, tiny.byte_tokenizer()))
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
    assert rows[3]["gained"] >= 1
    assert "of drafts accepted" in done.stdout


def test_texts_are_full_attentions(mine, tmp_path):
    path, settings = tmp_path / "out.json", ["--budgets", "80,96", "--tokens", "30", "--ways", "4", "--seeds", "1,2"]
    done = run("--parts", "exact", *mine, *settings, "--json", str(path))
    rows = json.loads(path.read_text())["result"]["rows"]
    assert [(row["budget_tokens"], row["seed"]) for row in rows] == [(b, s) for b in (80, 96) for s in (None, 1, 2)]
    for row in rows:
        assert (row["same"], row["near_ties"]) == ([30] * 3, [])
        assert 0 < row["stood"] < 1
    assert "3 of 3 texts of 30 tokens are full attention's" in done.stdout


def test_another_text_is_refused_unless_rounding_explains_it(mine, monkeypatch):
    """A text whose fifth token is another one."""
    settings = ["--budgets", "80", "--tokens", "8", "--ways", "4", "--seeds", "1"]
    generate = lossless_texts.Engine.generate

    def wrong(self, *arguments, **options):
        results = generate(self, *arguments, **options)
        if not self.config.verify_every:
            return results
        return [
            replace(one, token_ids=(*one.token_ids[:4], 255 - one.token_ids[4], *one.token_ids[5:])) for one in results
        ]

    monkeypatch.setattr(lossless_texts.Engine, "generate", wrong)
    assert "token 4:" in run("--parts", "exact", *mine, *settings, status=1).stderr
    monkeypatch.setattr(lossless_texts, "_NEAR", 1e9)
    assert "sequence 2 leaves at token 4: a tie within" in run("--parts", "exact", *mine, *settings).stdout


def test_what_it_needs_is_said():
    assert "No plan ships for someone/else" in run("--parts", "real", "--model", "someone/else", status=2).stderr
    assert "parts must be of" in run("--parts", "all", status=2).stderr
    assert "ways must be" in run("--ways", "some", status=2).stderr
    assert "hybrid alone does not write" in run("--parts", "exact", "--ways", "hybrid", status=2).stderr
