"""The study of linear layers of many rows, with tiny ones and without a GPU; and commands run with what it finds."""

import json

import pytest
import torch
from test_linear_study import run, without_gpu

pytest.importorskip("triton", reason="Launches are described with Triton's kernel.")
from experiments import linear_rows, with_rows
from lycheedecode.fusion import operator, reference, triton
from lycheedecode.fusion.graph import use_linear
from lycheedecode.fusion.launches import Kind, LinearTuning


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(linear_rows, "SHAPES", {"llama-3-8b": linear_rows.LayerShape(64, 128, (64, 16, 16), 100, 2)})
    without_gpu(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


def test_study_and_its_launches(tiny, tmp_path, capsys):
    path = tmp_path / "result.json"
    run("linear-rows", "--models", "llama-3-8b", "--rows", "18,36", "--json", str(path))
    rows = json.loads(path.read_text())["result"]["rows"]
    assert [row["projection"] for row in rows] == [
        *[name for name in ("qkv", "o", "gate_up", "down", "head") for _ in range(2)], "2 layers", "2 layers"
    ]  # fmt: skip
    said = capsys.readouterr()
    assert (said.out.count("llama-3-8b"), said.out.count("a pass gains"), said.err) == (12, 2, "")
    assert all(row["ours_us"] == min(row["launches"].values()) for row in rows[:10])
    launches = with_rows.launches_of(rows)
    assert len(launches) == 2 * (5 + 2)  # with norms inside and apart
    assert launches[Kind(36, (128, 128), 64, torch.bfloat16, True, True)] == LinearTuning(**rows[5]["launch"])


def test_wrong_results_are_not_timed(tiny, monkeypatch, capsys):
    monkeypatch.setattr(triton, "linear", lambda *arguments, tuning=None: reference(*arguments) * 1.1)
    run("linear-rows", "--models", "llama-3-8b", "--rows", "18", status=1)
    assert "differs from the reference" in capsys.readouterr().err


def test_bad_rows(tiny, capsys):
    run("linear-rows", "--models", "llama-3-8b", "--rows", "16", status=2)
    assert "17 to 64" in capsys.readouterr().err


@pytest.mark.parametrize(("way", "calls", "left"), [("cublas", 0, 4), ("ours", 8, 0), ("norms_apart", 8, 4)])
def test_each_way_compiles_layers_as_it_says(way, calls, left):
    seen = []
    rows, norms = linear_rows.WAYS[way]

    def compiler(gm, example_inputs):
        seen.append(use_linear(gm, norms, everywhere=True))
        gm.recompile()
        seen.append(sum(getattr(node.target, "__name__", "") == "rsqrt" for node in gm.graph.nodes))
        return gm.forward

    shape = linear_rows.LayerShape(64, 128, (64, 16, 16), 100, 2)
    weights = [torch.randn(size) / 8 for size in [(64,), (64, 64), (16, 64), (16, 64), (64, 64), (64,), (128, 64),
                                                  (128, 64), (64, 128)]] * 2  # fmt: skip
    x = torch.randn(1, 36, shape.hidden)
    torch._dynamo.reset()
    with torch.inference_mode(), with_rows.linear_rows_up_to(rows):
        results = torch.compile(linear_rows.layers, fullgraph=True, dynamic=False, backend=compiler)(x, weights)
    assert seen == [calls, left]
    for result, right in zip(results, linear_rows.layers(x, weights), strict=True):
        torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-4)
    assert operator.MAX_ROWS == 64


def test_candidates_share_columns_evenly():
    for shape in linear_rows.SHAPES.values():
        for projection in shape.projections().values():
            found = linear_rows.candidates(projection)
            assert 4 <= len(found) <= 12
            assert all(projection.columns % (t.depth * t.splits) == 0 for t in found)
            assert all(t.splits == 1 for t in found if projection.gated)


def test_a_command_runs_with_rows(monkeypatch, tmp_path, capsys):
    """Options after the command's name are its own."""
    seen = []
    monkeypatch.setattr("lycheedecode.cli.app", lambda command: seen.append((operator.MAX_ROWS, command)))
    command = ["bench", "lossless", "--parts", "rounds", "--json", "a.json"]
    with pytest.raises(SystemExit) as stop:
        with_rows.main(["48", *command])
    assert stop.value.code == 0
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        with_rows.main(["--launches", str(tmp_path / "other.json"), "64", "bench"])
    assert stop.value.code == 2
    assert "no launches" in capsys.readouterr().err
    assert seen == [(48, command)]
    assert operator.MAX_ROWS == 64
