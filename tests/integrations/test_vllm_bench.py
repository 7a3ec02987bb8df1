"""`bench serving` on a CPU: both ways of a tiny shape, and its plan for several ranks."""

import json
import os
from contextlib import contextmanager
from math import isfinite
from types import SimpleNamespace

import pytest

from lycheedecode.bench import serving


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_plan_divides_over_ranks(ranks):
    config = SimpleNamespace(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    plan = serving.plan_of(config, ranks)
    assert len(plan.retrieval) == 32
    for rank in range(ranks):
        plan.shard(rank, ranks)


def test_what_cannot_be_timed_is_refused(capsys):
    assert serving.main(["--smoke", "--tensor-parallel-size", "3"]) == 2
    with pytest.raises(SystemExit) as stop:
        serving.main(["--cases", "4*1000"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "over 3 ranks" in printed or "needs vLLM" in printed
    assert "not a batch and a context, like 4x131072" in printed


def test_a_plugin_that_vllm_cannot_find_is_said_before_an_engine_starts(monkeypatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: True)
    monkeypatch.setattr(serving, "entry_points", lambda **which: ())
    assert serving.main(["--smoke"]) == 2
    assert "vLLM does not find the plugin" in capsys.readouterr().err


def test_both_ways_get_the_same_prompts_and_generations(monkeypatch):
    """Also where the engine, which sets the seed, is in a process of its own; the short ones are a third."""
    sent = {way: [] for way in serving.WAYS}

    @contextmanager
    def engine(folder, way, *_):
        yield way

    def generate(way, prompts, count):
        sent[way].append((prompts, count))
        return float(count), list(range(count))

    monkeypatch.setattr(serving, "find_spec", lambda name: True)
    monkeypatch.setattr(serving, "entry_points", lambda **which: (which,))
    monkeypatch.setattr(serving, "_engine", engine)
    monkeypatch.setattr(serving, "_generate", generate)
    assert serving.main(["--smoke"]) == 0
    assert sent["stock"] == sent["hybrid"]
    assert [(len(prompts), count) for prompts, count in sent["stock"]] == [
        (batch, count) for batch in (1, 2) for count in (1, 12, 4, 12)
    ]


@pytest.mark.parametrize("fill", [[], ["--fill"]], ids=["prefilled", "filled"])
def test_a_tiny_shape_is_timed_both_ways(tmp_path, monkeypatch, capfd, fill):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    assert serving.main(["--smoke", *fill, "--json", str(tmp_path / "result.json")]) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    rows = report["result"]["rows"]
    assert [(row["way"], row["batch"]) for row in rows] == [(way, batch) for way in serving.WAYS for batch in (1, 2)]
    assert all(row["prefill_seconds"] > 0 and isfinite(row["ms"]) for row in rows)  # ms: a difference of short times
    assert [row["same_tokens"] for row in rows[:2]] == [12, 12]
    assert "vs stock" in capfd.readouterr().out
