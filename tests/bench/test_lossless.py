"""`bench lossless` on a tiny model: it verifies, refuses, reports; times mean nothing here."""

import json

import tiny
import torch
from typer.testing import CliRunner

from lycheedecode.bench import lossless
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
    monkeypatch.setattr(lossless.Rounds, "logits_of_pass", lambda self, ids: torch.randn(*ids.shape, 512))
    assert "differs from full steps" in run("--smoke", status=1).stderr


def test_real_models_are_compared_token_by_token(monkeypatch, tmp_path):
    path = tmp_path / "plan.json"
    tiny.plan().save(path)
    model = tiny.model().to("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(lossless, "load_model", lambda *_, **__: (model, tiny.byte_tokenizer()))
    monkeypatch.setattr(lossless, "load_text", lambda source: source * 100)
    arguments = ["--parts", "real", "--model", "mine", "--plan", str(path), "--contexts", "120", "--batches", "3"]
    settings = ["--budget-tokens", "96", "--block-size", "8", "--tokens", "30", "--ways", "hybrid,4,auto"]
    done = run(*arguments, *settings, "--temperature", "1.0", "--json", str(tmp_path / "out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["result"]["rows"]
    assert [row["way"] for row in rows] == ["full", *(f"{way}, selected every 1" for way in ("hybrid", "4", "auto"))]
    for row in rows:
        if not row["way"].startswith("hybrid"):
            assert row["same"] == [30] * 3
    assert rows[2]["gained"] >= 1
    assert "of drafts stood" in done.stdout


def test_what_it_needs_is_said():
    assert "parts=real needs a plan" in run("--parts", "real", "--model", "smollm2-135m", status=2).stderr
    assert "parts must be of attend, rounds, real, not 'all'" in run("--parts", "all", status=2).stderr
