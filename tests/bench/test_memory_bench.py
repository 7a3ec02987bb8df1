"""`bench memory` on a tiny model: it compares tokens, counts misses, refuses; times mean nothing here."""

import json

import pytest
from typer.testing import CliRunner

from lycheedecode.bench import memory
from lycheedecode.cli import app

pytestmark = pytest.mark.filterwarnings("ignore:Without a GPU")


def run(*arguments, status=0):
    done = CliRunner().invoke(app, ["bench", "memory", *arguments])
    assert done.exit_code == status, done.output
    return done


def test_smoke_writes_its_report(tmp_path):
    path = tmp_path / "memory.json"
    done = run("--smoke", "--batches", "1,2", "--store-percents", "100,300", "--json", str(path))
    rows = json.loads(path.read_text())["result"]["rows"]
    assert [(row["batch"], row["store_percent"]) for row in rows[:6]] == [
        (batch, percent) for batch in (1, 2) for percent in (None, 100, 300)
    ]
    for resident, small, large in (rows[:3], rows[3:6]):
        assert resident["miss_rate"] == resident["bytes_on_host"] == 0
        assert small["bytes_on_host"] == large["bytes_on_host"] == resident["bytes_on_gpu"]
        assert small["bytes_on_gpu"] <= large["bytes_on_gpu"]
        assert 0 < large["miss_rate"] <= small["miss_rate"] < 1
    assert "share of selected blocks" in done.stdout


def test_other_tokens_are_no_measurement(monkeypatch):
    made = iter([({}, [(1, 2)]), ({}, [(1, 3)])])
    monkeypatch.setattr(memory, "_generated", lambda *_: next(made))
    assert "With a store of 100% of a selection, tokens differ" in run("--smoke", status=1).stderr


def test_a_store_below_a_selection_is_refused():
    assert "store_percents must be at least 100" in run("--store-percents", "50", status=2).stderr
