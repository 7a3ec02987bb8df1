"""What can be said of the benchmark of operations without a GPU: it verifies, refuses, counts bytes and reports."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lycheedecode import HybridConfig, ops
from lycheedecode.bench import ops as bench
from lycheedecode.bench import read, timing
from lycheedecode.bench.harness import measure
from lycheedecode.bench.settings import OpsSettings
from lycheedecode.bench.verify import relative_error, verify
from lycheedecode.bench.workload import ROOM, Shape, Workload, make_pool, spread_plan
from lycheedecode.cli import app
from lycheedecode.errors import MismatchError

runner = CliRunner()
SMALL = Shape(query_heads=4, kv_heads=2, dim=16, layers=4, retrieval_heads=4, dtype=torch.float32)
CONFIG = HybridConfig(budget_tokens=64, block_size=8, recent_tokens=8)


@pytest.fixture
def work():
    return Workload(SMALL, make_pool(SMALL, 3000, "cpu"), batch=2, context=200)


def test_caches_are_cut_out_of_one_pool(work):
    assert len(work.caches) == 2  # of 1424 tokens each
    assert work.caches[0].keys.shape == (2, 2, 200 + ROOM, 16)
    assert work.full_caches[0].keys.shape == (2, 2, 200, 16)
    assert len(work.full_caches) >= len(work.caches)
    pointers = {kv.keys.data_ptr() for kv in work.caches} | {kv.values.data_ptr() for kv in work.caches}
    assert len(pointers) == 4
    assert all(work.pool.data_ptr() <= pointer < work.pool.data_ptr() + work.pool.nbytes for pointer in pointers)
    assert work.inputs(2)[1] is work.caches[0]


def test_bytes():
    """The figures of the 8B shape at 128K tokens: half a gigabyte a layer, 1.6 GB a hybrid step."""
    work = Workload(Shape(), torch.empty(0), 1, 131072)
    config = HybridConfig()
    assert work.dense_bytes == 2 * 8 * 131072 * 128 * 2
    assert work.sparse_bytes(config) == work.dense_bytes // 32
    assert work.step_bytes(config) == 32 * (131072 * 256 + work.sparse_bytes(config))
    assert Workload(Shape(), torch.empty(0), 1, 1024).sparse_bytes(config) == 2 * 8 * 1024 * 256


def test_retrieval_heads_are_spread_out():
    plan = spread_plan(Shape())
    assert len(plan.retrieval) == 32
    assert plan.retrieval_heads(0) == tuple(range(8))
    assert sum(bool(plan.retrieval_heads(layer)) for layer in range(1, 32)) >= 15
    assert len({donor for row in plan.donors for donor in row}) == 32


def test_selections_are_full_and_without_repeats(work):
    selections, rows = work.random_selections(CONFIG)
    assert (selections.counts == 8).all()
    assert all(len(set(row.tolist())) == 8 for row in selections.blocks.flatten(0, 1))
    assert all(len(set(row.tolist())) == 2 for row in rows)
    assert work.some_heads(0, 1) != work.some_heads(2, 1)


def test_verify_passes_and_every_call_runs(work):
    assert max(verify(work, CONFIG).values()) < 1e-5
    for calls in (work.scans(3, 1, CONFIG), work.scan_selects(3, 2, CONFIG), work.attends(3, CONFIG)):
        for call in calls:
            call()
    work.step(CONFIG)()


@pytest.mark.parametrize("op", ["attend", "attend_blocks", "scan_blocks"])
def test_a_wrong_operation_is_refused(work, op, monkeypatch):
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *arguments: right(*arguments) * 1.05)
    with pytest.raises(MismatchError, match=rf"^{op} \(batch 2, context 200, blocks of 8\) differs"):
        verify(work, CONFIG)


@pytest.mark.parametrize("op", ["select_blocks", "scan_select"])
def test_other_blocks_are_refused(work, op, monkeypatch):
    monkeypatch.setattr(ops, op, lambda *arguments: arguments[-1].counts.fill_(1))
    with pytest.raises(MismatchError, match=f"^{op} .* selects other blocks"):
        verify(work, CONFIG)


def test_not_a_number_is_a_mismatch():
    assert not relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) <= 1


def test_smoke_writes_its_report(tmp_path):
    path = tmp_path / "new" / "ops.json"
    done = runner.invoke(app, ["bench", "ops", "--smoke", "--json", str(path)])
    assert (done.exit_code, done.stdout) == (0, "verified 8 workloads\n")
    report = json.loads(path.read_text())
    assert report["command"] == "bench ops"
    assert report["settings"]["smoke"]
    assert {"machine", "versions", "commit"} <= set(report["environment"])
    assert len(report["result"]["errors"]) == 8


def test_smoke_says_no(monkeypatch):
    monkeypatch.setattr(ops, "attend", lambda query, *_: query * 0)
    done = runner.invoke(app, ["bench", "ops", "--smoke"])
    assert done.exit_code == 1
    assert "attend" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="This machine has a GPU.")
def test_without_a_gpu_one_line_says_so():
    done = runner.invoke(app, ["bench", "ops"])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "no CUDA GPU" in done.stderr
    assert "--smoke verifies" in done.stderr


def test_every_row_of_the_table(monkeypatch, capsys):
    """The whole benchmark with a clock that always says a millisecond."""

    def time_calls(calls, _):
        for call in calls:
            call()
        return timing.Timing(1.0, 1.0, 1.0, 7)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "make_pool", lambda shape, tokens, _: make_pool(shape, tokens, "cpu"))
    monkeypatch.setattr(bench, "read_bandwidth", lambda _: 1e12)
    monkeypatch.setattr(bench, "rotations", lambda *_: 2)
    monkeypatch.setattr(bench, "time_calls", time_calls)
    monkeypatch.setattr(read, "read_all", lambda words, out, way: words.nbytes)
    shape = Shape(query_heads=4, kv_heads=2, dim=16, layers=4, retrieval_heads=4)
    settings = OpsSettings(batches=(1, 2), contexts=(200,), block_sizes=(8, 16), budget_tokens=64, pool_gib=0.001)
    found = measure("bench ops", settings, lambda settings, _: bench.run(settings, "cpu", shape))
    result, (out, err) = found.to_json()["result"], capsys.readouterr()
    speed, header, *table = out.splitlines()
    names = {row["op"] for row in found.rows}
    assert {
        "read only, keys and values",
        "full, ours",
        "scan, 1 head",
        "scan + select, 2 heads",
        "select, 2 heads",
        "attend",
        "all of a step",
    } <= names
    assert len(result["errors"]) == 4
    assert (speed, header, err) == ("This GPU reads 1.00 TB/s.", bench.HEADER, "")
    assert len(table) == len(found.rows) + len(result["notes"])  # each once
    assert any("flashinfer" in line for line in table)
    json.dumps(result)
    step = next(row for row in result["rows"] if row["op"] == "all of a step")
    assert step["speedup"] == 4  # layers, each as long as the whole step


def test_rotations_exceed_the_l2(monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda: 60 << 20)
    assert timing.rotations(16 << 20) * (16 << 20) >= timing.L2_TIMES * (60 << 20)
    assert timing.rotations(10**10, least=4) == 4
    assert timing.rotations(1, most=64) == 64


def test_rows_line_up():
    row = bench.OpRow("attend", 8, 131072, 32, 0.0321, 1.01, 134217728, 0.899, 28.9)
    line = bench.format_row(row)
    assert "4.18" in line
    assert "89.9%" in line
    assert line.endswith("28.90x")
    assert len(line) == len(bench.HEADER)
    assert bench.format_row(bench.OpRow("select", 1, 1024, 32, 0.005, 1.0, 0, None, None)).endswith("0.0050")
