"""Benchmarks of whole steps on a tiny model: they verify, refuse, report; times mean nothing here."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lycheedecode.attention import HybridAttention
from lycheedecode.bench import step
from lycheedecode.bench.models import build, build_from, plan_for, random_config, random_context, weight_bytes
from lycheedecode.bench.settings import FORMS, ServingSettings, StepSettings
from lycheedecode.bench.verify import rounded_otherwise
from lycheedecode.cli import app
from lycheedecode.cli.bench import as_of_now
from lycheedecode.engine.engine import Engine
from lycheedecode.errors import ConfigError, MismatchError

pytestmark = pytest.mark.usefixtures("benchmarks_collect_little")


def run(name, *arguments, status=0):
    done = CliRunner().invoke(app, ["bench", name, *arguments])
    assert done.exit_code == status, done.output
    return done


def test_smoke_writes_its_report(tmp_path):
    path = tmp_path / "step.json"
    done = run("step", "--smoke", "--batches", "1,2", "--forms", ",".join(FORMS), "--json", str(path))
    report = json.loads(path.read_text())
    assert report["command"] == "bench step"
    rows = report["result"]["rows"]
    assert [(row["form"], row["batch"]) for row in rows] == [(form, batch) for batch in (1, 2) for form in FORMS]
    rounding = 2e-2 if torch.cuda.is_available() else 1e-4  # bfloat16 there, float32 here
    assert all(row["error"] < rounding and row["ms"] > 0 for row in rows)
    assert rows[1]["bytes"] < rows[0]["bytes"]
    assert report["result"]["left_out"] == []
    assert len(done.stdout.splitlines()) == 2 + 2 * len(FORMS)
    assert done.stderr == ""  # a terminal shows each row once
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_result_on_stdout_is_alone_there():
    done = run("step", "--smoke", "--forms", "full", "--json", "-")
    assert json.loads(done.stdout)["command"] == "bench step"
    assert done.stderr.splitlines()[0] == step.HEADER


def test_what_does_not_fit_is_left_out(monkeypatch, tmp_path):
    path = tmp_path / "step.json"
    monkeypatch.setattr(step, "missing_bytes", lambda model, batch, length: (batch - 1) * 5e9)
    assert (
        "5 GB of memory are missing"
        in run("step", "--smoke", "--batches", "1,2", "--forms", "full", "--json", str(path)).stdout
    )
    result = json.loads(path.read_text())["result"]
    assert [row["batch"] for row in result["rows"]] == [1]
    assert result["left_out"] == ["batch 2, context 300: 5 GB of memory are missing"]


def test_a_cpus_memory_has_an_end_as_well():
    done = run("step", "--smoke", "--batches", "2147483647", "--forms", "full")
    assert "left out: batch 2147483647, context 300: " in done.stdout
    assert "GB of memory are missing" in done.stdout


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("generate", "--contexts 8000"),
        ("memory", "--cases 1x8000 --parts texts"),
        ("lossless", "--contexts 8000 --parts real"),
    ],
)
def test_a_generation_that_would_end_early_is_refused(name, asked):
    done = run(name, "--model", "smollm2-135m", *asked.split(), "--tokens", "1000", status=2)
    said = "lycheedecode: 8000 tokens and 1000 new ones do not fit the model's 8192 positions: ask for fewer."
    assert done.stderr.splitlines()[-1] == said
    assert "tokens must be at least 2: the first one comes from" in run(name, "--tokens", "1", status=2).stderr


def test_a_wrong_step_is_refused(monkeypatch):
    right = Engine.decode_one_token
    wrong = lambda engine, *arguments: right(engine, *arguments) * (1.0 if engine.way == "eager" else 1.3)  # noqa: E731
    monkeypatch.setattr(Engine, "decode_one_token", wrong)
    assert "full (batch 1, context 300): logits differ" in run("step", "--smoke", status=1).stderr


class WrongScale(HybridAttention):
    def __call__(self, layer, query, kv, state, scale, *rest, **named):
        return super().__call__(layer, query, kv, state, 1.1 * scale, *rest, **named)


class WrongSelection(HybridAttention):
    """The block before each one that was chosen."""

    def select(self, layer, query, kv, heads, scale, out, **more):
        super().select(layer, query, kv, heads, scale, out, **more)
        out.blocks.copy_(torch.where(out.blocks > 0, out.blocks - 1, out.blocks))


@pytest.mark.parametrize("form", ["hybrid", "hybrid+budgets"])
def test_rounding_is_told_from_wrong_kernels(monkeypatch, form):
    """In 16 bits, many layers and small selections."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    model = build_from(random_config("tiny", 8, **sizes), "cpu", torch.bfloat16)
    context = random_context(model, 1, 8192, 8)
    settings = StepSettings(budget_tokens=4096, block_size=32)
    eager, other = (step.make_engine(model, form, settings, "eager") for _ in range(2))
    right = other.decode_one_token

    def rounded(*arguments):
        with rounded_otherwise(seed=7):
            return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(other, "decode_one_token", rounded)
        assert 1e-2 < step._verify(other, eager, context, form) < 0.1
    for wrong in (WrongScale, WrongSelection):
        other.attention.__class__ = wrong
        with pytest.raises(MismatchError, match=r"differ from the eager step's by (\d.\de\+00|[4-9].\de-01)"):
            step._verify(other, eager, context, form)


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


def test_generations_are_compared(tmp_path):
    path = tmp_path / "generate.json"
    done = run("generate", "--smoke", "--json", str(path), "--batches", "2")
    rows = {row["way"]: row for row in json.loads(path.read_text())["result"]["rows"]}
    assert rows["full"]["same_tokens"] == rows["transformers"]["same_tokens"] == 6
    assert rows["transformers"]["speedup"] == 1
    assert {way: row.get("retrieval_heads") for way, row in rows.items()} == {
        "full": None, "hybrid": 2, "transformers": None
    }  # fmt: skip
    assert "hybrid" in done.stdout
    assert "transformers: eager, sdpa" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="This machine has a GPU.")
@pytest.mark.parametrize(
    ("name", "instead"), [("step", "--smoke verifies."), ("generate", "smollm2"), ("lossless", "--parts real or exact")]
)
def test_without_a_gpu_one_line_says_so_and_what_runs(name, instead):
    message = run(name, status=2).stderr
    assert message.count("\n") == 1
    assert "no CUDA GPU" in message
    assert instead in message


def test_options_as_they_were_still_do():
    old = ["--batches", "1", "4", "--budget", "512", "--forms", "full", "hybrid", "--smoke", "--blocks", "16"]
    new = ["--batches", "1,4", "--budget-tokens", "512", "--forms", "full,hybrid", "--smoke", "--block-sizes", "16"]
    assert as_of_now(old) == as_of_now(new) == new
    done = run("step", "--smoke", "--batches", "1", "2", "--forms", "full")
    assert "write --smoke --batches 1,2 --forms full" in done.stderr


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (StepSettings, {"forms": ("full", "ful")}, "forms must be of full, hybrid, .*, not 'ful'"),
        (StepSettings, {"batches": (1, 0)}, r"batches must be above 0, not \(1, 0\)"),
        (StepSettings, {"contexts": ()}, "contexts must be above 0"),
        (ServingSettings, {"cases": ("4*1000",)}, "'4\\*1000' is not a batch and a context, like 4x131072"),
        (ServingSettings, {"tokens": 2}, "tokens must be at least 6, not 2"),
    ],
)
def test_settings_that_make_no_sense(kind, settings, said):
    with pytest.raises(ConfigError, match=said):
        kind(**settings)
