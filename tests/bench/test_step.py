"""Benchmarks of whole steps on a tiny model: they verify, refuse, report; times mean nothing here."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from lycheedecode.bench import generate, step
from lycheedecode.bench.models import build, plan_for, random_context, weight_bytes
from lycheedecode.bench.profile import Kernel, add_up, format_kernels
from lycheedecode.engine.engine import Engine


def test_smoke_writes_its_report(tmp_path, capsys):
    path = tmp_path / "step.json"
    arguments = ["--smoke", "--batches", "1", "2", "--forms", *step.FORMS, "--json", str(path)]
    assert step.main(arguments) == 0
    report = json.loads(path.read_text())
    assert report["command"] == "bench step"
    rows = report["result"]["rows"]
    assert [(row["form"], row["batch"]) for row in rows] == [(form, batch) for batch in (1, 2) for form in step.FORMS]
    rounding = 2e-2 if torch.cuda.is_available() else 1e-4  # bfloat16 there, float32 here
    assert all(row["error"] < rounding and row["ms"] > 0 for row in rows)
    assert rows[1]["bytes"] < rows[0]["bytes"]
    assert report["result"]["left_out"] == []
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(step.FORMS)


def test_what_does_not_fit_is_left_out(monkeypatch, tmp_path):
    path = tmp_path / "step.json"
    monkeypatch.setattr(step, "_missing_bytes", lambda model, batch, length: (batch - 1) * 5e9)
    assert step.main(["--smoke", "--batches", "1", "2", "--forms", "full", "--json", str(path)]) == 0
    result = json.loads(path.read_text())["result"]
    assert [row["batch"] for row in result["rows"]] == [1]
    assert result["left_out"] == ["batch 2, context 300: 5 GB of memory are missing"]


def test_a_wrong_step_is_refused(monkeypatch, capsys):
    right = Engine.decode_one_token
    wrong = lambda engine, *arguments: right(engine, *arguments) * (1.0 if engine.way == "eager" else 1.3)  # noqa: E731
    monkeypatch.setattr(Engine, "decode_one_token", wrong)
    assert step.main(["--smoke"]) == 1
    assert "full (batch 1, context 300): logits differ" in capsys.readouterr().err


def test_profiles_add_up():
    def event(name, us, device=DeviceType.CUDA):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: us))

    events = [event("a", 2.0), event("b", 9.0), event("a", 4.0), event("host", 50.0, DeviceType.CPU)]
    kernels = add_up(events, 2)
    assert kernels == [Kernel("b", 0.5, 4.5), Kernel("a", 1.0, 3.0)]
    assert [line.split()[-1] for line in format_kernels(kernels).splitlines()] == ["b", "a"]
    many = format_kernels([Kernel(str(i), 1.0, 1.0) for i in range(20)])
    assert "6.0 others" in many.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="This machine has a GPU.")
def test_a_profile_needs_a_gpu(capsys):
    assert step.main(["--smoke", "--profile"]) == 2
    assert "--profile needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Kernels run on a GPU.")
def test_a_profile_is_reported(tmp_path):
    path = tmp_path / "step.json"
    assert step.main(["--smoke", "--profile", "--forms", "hybrid", "--json", str(path)]) == 0
    (profile,) = json.loads(path.read_text())["result"]["profiles"]
    assert any("attend_blocks" in kernel["name"] for kernel in profile["kernels"])


def test_another_choice_is_no_tie():
    logits = torch.tensor([[0.0, 1.0, 0.999], [3.0, 1.0, 0.0]])
    assert step._same_choice(logits, torch.tensor([[0.0, 1.0, 1.1], [3.0, 1.0, 0.0]]), 0.15)
    assert not step._same_choice(logits, torch.tensor([[0.0, 1.0, 0.9], [1.0, 3.0, 0.0]]), 0.15)


def test_random_models():
    model = build("tiny", layers=8, device="cpu", dtype=torch.float32)
    plan = plan_for(model)
    assert len(plan.retrieval) == 2
    assert plan.retrieval_heads(0) == (0, 1)
    table = model.get_input_embeddings().weight
    assert weight_bytes(model) == sum(weight.nbytes for weight in model.parameters()) - table.nbytes
    context = random_context(model, 2, 100, 30)
    assert context.cache.length == 100
    assert Engine(model).decode_one_token(context, torch.tensor([1, 2])).isfinite().all()


def test_generations_are_compared(tmp_path, capsys):
    path = tmp_path / "generate.json"
    assert generate.main(["--smoke", "--json", str(path), "--batches", "2"]) == 0
    rows = {row["way"]: row for row in json.loads(path.read_text())["result"]["rows"]}
    assert rows["full"]["same_tokens"] == rows["transformers"]["same_tokens"] == 6
    assert rows["transformers"]["speedup"] == 1
    assert "hybrid" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="This machine has a GPU.")
@pytest.mark.parametrize("bench", [step, generate])
def test_without_a_gpu_one_line_says_so(bench, capsys):
    assert bench.main([]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "no CUDA GPU" in message
