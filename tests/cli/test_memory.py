"""`lycheedecode memory`: its numbers are those of a cache that is made; what it advises fits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from lycheedecode import Engine, HybridConfig
from lycheedecode.attention import HybridAttention
from lycheedecode.cli import app
from lycheedecode.cli import memory as module
from lycheedecode.engine.offload.size import offloaded_size, resident_size
from lycheedecode.results import Result

RESULTS = Path(__file__).parents[2] / "docs" / "results"
LLAMA = ["memory", "--model", "llama-3-8b"]


def run(*arguments, status=0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == status, done.output
    return done


def found(*arguments, status=0):
    return json.loads(run(*arguments, "--json", "-", status=status).stdout)["result"]


@pytest.mark.filterwarnings("ignore:Without a GPU")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"scan_keys": "float8"}, {"scan_keys": "int4"}, {"completion": "centroid", "completion_chunk": 8},
     {"refresh_every": 7}, {"budget_tokens": None, "budget_ratio": 0.3}],
    ids=["plain", "8 bits", "4 bits", "completed", "refresh", "ratio"],
)  # fmt: skip
def test_sizes_are_those_of_a_cache(family, changes):
    model, plan = tiny.model(family), tiny.plan_for(family)
    config = HybridConfig(**{**{"budget_tokens": 64, "block_size": 4, "completion": "none"}, **changes})
    engine = Engine(model, plan=plan, config=config, cache="host", store_ratio=1.5)
    context = engine.prefill(tiny.prompts(60, 37), room=9)
    engine.decode_one_token(context, torch.tensor([5, 6]))
    retrieval = sum(len(plan.retrieval_heads(layer)) for layer in engine.shape.global_layers)
    size = offloaded_size(engine.shape, 2, 69, 4, config, retrieval, 1.5)
    rows = 4 * 2 * (len(plan.retrieval) - retrieval)  # layers with a window have rows that nobody writes
    assert size.limited == (0 if family == "llama" else 2 * 2 * 2 * 2 * 256 * 16 * 4)
    near, far = context.cache.memory()
    assert far == size.host
    assert near - size.gpu == rows * (size.tables // (4 * 2 * retrieval))
    full = Engine(model)
    context = full.prefill(tiny.prompts(60, 37), room=9)
    assert context.cache.memory() == (resident_size(full.shape, 2, 69, 4).gpu, 0)


def test_the_numbers_of_llama():
    result = found(*LLAMA, "--context", "131072", "--batch", "3", "--budget-tokens", "4096", "--completion", "none")
    ways = {row["way"]: row for row in result["rows"]}
    cache = 3 * 131072 * 131072  # 128 KiB for a token
    assert ways["full attention"]["gpu_bytes"] == ways["host"]["host_bytes"] == cache
    assert ways["host"]["gpu_bytes"] <= cache / 8
    assert ways["host, 8-bit scan"]["gpu_bytes"] < cache / 10
    # A key of 128 channels takes 128 bytes in 8 bits, 68 in 4.
    less = ways["host, 8-bit scan"]["gpu_bytes"] - ways["host, 4-bit scan"]["gpu_bytes"]
    assert less == 3 * 131072 * 32 * 60
    assert result["weight_bytes"] == 2 * 8030261248
    assert (result["retrieval_heads"], result["fits"]) == (32, "hybrid")


def test_the_time_of_a_step_is_that_of_what_it_reads():
    """Bounds of an H200 for Llama-3-8B at 128K, with an eighth of the heads at a budget of 4096."""
    given = (*LLAMA, "--context", "131072", "--budget-tokens", "4096", "--completion", "none")
    ways = {row["way"]: row for row in found(*given)["rows"]}
    weights, cache = 15.0e9, 131072 * 131072
    assert ways["full attention"]["step_ms"] == pytest.approx((weights + cache) / 4.67e9, rel=0.01)
    assert ways["hybrid"]["step_ms"] == pytest.approx((weights + cache / 16 + cache / 32) / 4.67e9, rel=0.01)
    # Of 256 heads, 32 wait for the values that they lack; a fifth of the time of all other fetches is lost as well.
    link = cache / 32 / 49e6
    assert ways["host"]["step_ms"] == pytest.approx(ways["hybrid"]["step_ms"] + 0.135 * link * (16 + 0.2 * 224) / 256)
    assert ways["host, least"]["misses"] == 0.262
    slow = {row["way"]: row for row in found(*given, "--link", "1", "--misses", "0.5")["rows"]}
    assert slow["host"]["step_ms"] == pytest.approx(cache / 32 / 2 / 1e6 * 15 / 16)
    assert slow["host, 8-bit scan"]["step_ms"] == pytest.approx(cache / 32 / 2 / 1e6)
    assert slow["hybrid"]["step_ms"] == ways["hybrid"]["step_ms"]


def test_the_usual_misses_are_those_of_the_result():
    rows = Result.load(RESULTS / "h100-memory-qwen2.5-coder-1.5b.json").rows
    measured = {row["store_percent"] / 100: row["later_miss_rate"] for row in rows
                if row["cache"] == "host" and row["budget_tokens"] == 1024}  # fmt: skip
    assert pytest.approx(measured, abs=5e-4) == module.MISSES


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3-8b-float8", "llama-3-8b-1m"])
def test_steps_take_up_to_a_fifth_more_than_predicted(name):
    """Those of an H100, whose memory gives full attention's steps 2.9 TB/s; measured misses."""
    shape, weights, table = module._model("llama-3-8b", None)
    config = HybridConfig(budget_tokens=4096, block_size=32, completion="none")
    rows = Result.load(RESULTS / f"h100-memory-{name}.json").rows
    for row in rows:
        eight = "float8" in row.get("form", "")
        given = replace(config, scan_keys="float8") if eight else config
        ways = module._ways(shape, row["batch"], row["context"], given, 32, row.get("store_percent", 200) / 100)
        named = {"full": "full attention", "resident": "hybrid"}.get(row["cache"], "host")
        way = next(way for way in ways if way.name == named)
        way = module._fetching(way, shape, None, 32, eight, row["miss_rate"])
        predicted = way.step_ms(weights - table, 2.9e9, 49e6)
        assert predicted < row["mean_ms"] < 1.2 * predicted, (row["cache"], row["batch"], row["context"])
    assert len(rows) in (1, 14)


def test_budgets_of_heads_are_resident(tmp_path):
    """Rows and bytes are those of the state that decodes; ways with host memory are left out, which is said."""
    model, plan = tiny.model(), replace(tiny.plan(), budgets=((0.5, 2.0), (1.0, 2.0), (0.25, 0.5), (1.0, 1.0)))
    model.save_pretrained(tmp_path)
    plan.save(tmp_path / "plan.json")
    settings = {"budget_tokens": 32, "block_size": 4, "sink_tokens": 4, "recent_tokens": 4}
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    call = "memory", "--model", str(tmp_path), "--context", "256", "--plan", str(tmp_path / "plan.json"), *options
    hybrid, full = found(*call)["rows"]
    assert (hybrid["way"], full["way"]) == ("hybrid", "full attention")
    state = HybridAttention(plan, HybridConfig(**settings)).allocate(1, 256, "cpu")
    assert hybrid["tables"] == state.selections.blocks.nbytes + state.selections.counts.nbytes
    assert hybrid["selected"] == 2 * 2 * 16 * 4 * (4 + 16 + 8 + 16 + 3 + 4 + 8 + 8)
    done = run(*call)
    assert "Left out: host memory, where all heads have room for equally many blocks." in done.stdout
    assert "selection must be 'top_k'" in run(*call[:-8], "--budget-ratio", "0.5", status=2).stderr


def test_it_says_which_setting_fits():
    six = [*LLAMA, "--context", "131072", "--batch", "6"]
    done = run(*six)
    assert "Fits: host (--cache host), " in done.stdout
    assert "Full attention (--full) does not fit: 25.3 ms, 96.00 GiB of cache." in " ".join(done.stdout.split())
    one = found(*LLAMA, "--context", "131072")
    assert [row["way"] for row in one["rows"] if row["fits"]][:: len(one["rows"]) - 1] == ["hybrid", "full attention"]
    said = run(*LLAMA, "--context", "131072").stdout
    alone = run(*LLAMA, "--context", "131072", "--gpu", "31", "--host", "1").stdout
    assert "Fits: full attention (--full) alone, 6.9 ms a step at least." in alone
    assert said.index("Fits: hybrid, ") < said.index("Full attention (--full) also fits: 6.9 ms")
    assert found(*six, "--gpu", "26")["fits"] == "host, 8-bit scan"
    result = found(*six, "--gpu", "17", status=1)
    assert (result["fits"], result["most"]) == (None, 2)
    assert "Nothing fits: 2 sequences of 131072 tokens would." in run(*six, "--gpu", "17", status=1).stdout
    assert "Not even one sequence fits." in run(*LLAMA, "--context", "1000", "--gpu", "8", status=1).stdout
    assert found(*six, "--host", "64", "--gpu", "30", status=1)["most"] > 0


def test_a_config_is_enough(tmp_path):
    tiny.model().config.save_pretrained(tmp_path)
    plan = tmp_path / "plan.json"
    tiny.plan().save(plan)
    result = found("memory", "--model", str(tmp_path), "--context", "5000", "--plan", str(plan))
    assert result["retrieval_heads"] == 4
    beyond = "But this model has 512 positions, and refuses longer texts."
    for context, said in (("512", False), ("513", True)):
        assert (beyond in run("memory", "--model", str(tmp_path), "--context", context).stdout) == said
    given = ("memory", "--model", "smollm2-135m", "--context", "5000")
    result, unplanned = found(*given, "--plan", "smollm2-135m"), found(*given)
    assert result["rows"][1]["own"] > result["retrieval_heads"] / 2 / 90  # of some donors, heads of their layer read
    assert unplanned["rows"][1]["own"] == unplanned["retrieval_heads"] / 2 / 90
    assert 2 * 130e6 < result["weight_bytes"] < 2 * 140e6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--context", "0"], "--context must be a whole number of at least 1"),
        (["--context", "9", "--batch", "0"], "--batch must be a whole number of at least 1"),
        (["--context", "9", "--gpu", "-1"], "--gpu and --host are GiB"),
        (["--context", "9", "--gpu", "nan"], "--gpu and --host are GiB"),
        (["--context", "9", "--link", "0"], "--bandwidth and --link must be above 0"),
        (["--context", "9", "--misses", "2"], "--misses a share from 0 to 1"),
        (["--context", "9", "--store-ratio", "0"], "store_ratio must be at least 1"),
        (["--context", "9", "--retrieval-attention", "full"], "reads the whole cache"),
        (["--context", "9", "--plan", "smollm2-135m"], "30 layers"),
    ],
)
def test_bad_input_is_one_sentence(more, words):
    done = CliRunner().invoke(app, [*LLAMA, *more])
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
