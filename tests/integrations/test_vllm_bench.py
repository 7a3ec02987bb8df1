"""`bench serving` on a CPU: both ways of a tiny shape, and its plan for several ranks."""

import json
import os
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


def test_a_tiny_shape_is_timed_both_ways(tmp_path, monkeypatch, capfd):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    assert serving.main(["--smoke", "--json", str(tmp_path / "result.json")]) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    rows = report["result"]["rows"]
    assert [(row["way"], row["batch"]) for row in rows] == [(way, batch) for way in serving.WAYS for batch in (1, 2)]
    assert all(row["ms"] > 0 for row in rows)
    assert [row["same_tokens"] for row in rows[:2]] == [12, 12]
    assert "vs stock" in capfd.readouterr().out
