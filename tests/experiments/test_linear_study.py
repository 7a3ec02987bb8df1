"""The study of projections with tiny ones, without a GPU: what it verifies, times and prints."""

import json
import time

import pytest
import tiny
import torch

pytest.importorskip("triton", reason="Launches are described with Triton's kernel.")
from experiments import linear as bench
from experiments.__main__ import app
from lycheedecode.bench.timing import Timing
from lycheedecode.fusion import reference, triton


def timed(calls, seconds):
    began = time.perf_counter()
    for call in calls:
        call()
    return Timing((time.perf_counter() - began) * 1e3, 1.0, 1.0, 1)


def without_gpu(monkeypatch):
    """The study computes by the reference, on the CPU."""
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "time_calls", timed)
    monkeypatch.setattr(bench, "rotations", lambda size, least=1, most=256: 2)
    monkeypatch.setattr(bench, "measured_bandwidth", lambda: 1e12)
    monkeypatch.setattr(bench, "compile_ahead", lambda launches: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "linear", lambda *arguments, tuning=None: reference(*arguments))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    shapes = {"qkv": ((48, 16, 16), 32), "o": ((32,), 48), "gate_up": ((64, 64), 32), "down": ((32,), 64),
              "head": ((100,), 32)}  # fmt: skip
    for name, (sizes, columns) in shapes.items():
        monkeypatch.setitem(bench.LLAMA_3_8B, name, bench.LLAMA_3_8B[name]._replace(sizes=sizes, columns=columns))
    without_gpu(monkeypatch)


def run(*arguments, status=0):
    with pytest.raises(SystemExit) as stop:
        app(arguments, prog_name="experiments")
    assert stop.value.code == status


def test_bench(tmp_path, capsys):
    run("linear", "--batches", "1,3", "--json", str(tmp_path / "result.json"))
    rows = json.loads((tmp_path / "result.json").read_text())["result"]["rows"]
    assert len(rows) == 2 * (2 * len(bench.LLAMA_3_8B) + 2)
    said = capsys.readouterr()
    assert said.out.count("layer") == 4
    assert said.err == ""


def test_bench_of_weights_in_8_bits(tmp_path):
    """Only ours takes them; they are half as large."""
    run("linear", "--batches", "1,3", "--eight-bits", "--json", str(tmp_path / "result.json"))
    rows = json.loads((tmp_path / "result.json").read_text())["result"]["rows"]
    assert {row["by"] for row in rows} == {"ours"}
    assert len(rows) == 2 * (len(bench.LLAMA_3_8B) + 1)
    assert rows[0]["bytes"] == 80 * 32


def test_step(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_random_llama", lambda layers: tiny.model(num_hidden_layers=layers))
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    run("linear", "--step-layers", "1", "--batches", "2")
    assert "norms apart" in capsys.readouterr().out


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(triton, "linear", lambda *arguments, tuning=None: reference(*arguments) * 1.1)
    run("linear", "--batches", "2", status=1)
    assert "differs from the reference" in capsys.readouterr().err


def test_tune(monkeypatch, capsys):
    launches = [triton.LinearTuning(16, 32, 1, 4, stages) for stages in (1, 2, 3)]
    monkeypatch.setattr(bench, "candidates", lambda projection, batch: launches)
    run("tune-linear", "--batches", "1,4", "--names", "qkv,down")
    out = capsys.readouterr().out
    assert out.count("default") == 4
    assert "prefetch 2048" in out


def test_candidates_fit_the_gpu():
    shapes = bench.Projection((4096, 1024, 1024), 4096), bench.Projection((14336, 14336), 4096, gated=True)
    for projection in (*shapes, *(shape._replace(eight_bits=True) for shape in shapes)):
        for batch in (1, 8):
            found = bench.candidates(projection, batch)
            assert 8 <= len(found) <= 64
            assert all(t.dot or batch == 1 for t in found)
            assert all(t.splits == 1 or not projection.gated for t in found)
