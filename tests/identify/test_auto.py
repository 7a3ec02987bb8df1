"""Plans without a plan: bundled, kept, or found now."""

from dataclasses import replace

import pytest
import tiny
import torch
from typer.testing import CliRunner

from lycheedecode import Engine, HeadPlan, HybridConfig
from lycheedecode.cli import app
from lycheedecode.identify import Cell, IdentifySettings, auto
from lycheedecode.identify.auto import auto_plan, cache_folder
from lycheedecode.integrations.transformers import hybrid
from lycheedecode.plan import bundled_plan_of, bundled_plans

SETTINGS = IdentifySettings(calibrate_cells=(Cell("prose", 150, "continuation", 8),), calibrate_prompts=2, draws=2)
CONFIG = HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=8)


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Settings that take no time, a cache of our own, and what was identified."""
    seen, identify = [], auto.identify
    monkeypatch.setenv("LYCHEEDECODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(auto, "IdentifySettings", lambda: SETTINGS)
    monkeypatch.setattr(auto, "identify", lambda *given, **named: seen.append(given) or identify(*given, **named))
    return seen


def test_a_plan_is_found_kept_and_found_again(found, llama, byte_tokenizer, tmp_path, capsys):
    engine = Engine(llama, byte_tokenizer, plan="auto", config=CONFIG)
    said = capsys.readouterr().err
    [path] = (tmp_path / "cache").glob("*.json")
    assert str(path) in said
    assert "1 of 1" in said
    plan = engine.attention.plan
    assert plan == HeadPlan.load(path)
    assert plan.provenance["settings"]["config"]["budget_tokens"] == 64
    assert auto_plan(llama, byte_tokenizer, replace(CONFIG, refresh_every=4)).donors == plan.donors
    assert len(found) == 1
    assert capsys.readouterr().err == ""
    auto_plan(llama, byte_tokenizer, replace(CONFIG, budget_tokens=48))  # for other settings, another plan
    assert len(found) == 2
    other = tiny.model()
    other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    auto_plan(other, byte_tokenizer, CONFIG)  # and for other weights
    assert len(found) == 3


def test_a_spoilt_file_is_made_anew(found, llama, byte_tokenizer, tmp_path):
    auto_plan(llama, byte_tokenizer, CONFIG)
    [path] = (tmp_path / "cache").glob("*.json")
    path.write_text("{", encoding="utf-8")
    said = []
    plan = auto_plan(llama, byte_tokenizer, CONFIG, say=said.append)
    assert "not valid JSON" in said[0]
    assert HeadPlan.load(path) == plan


def test_a_folder_that_cannot_be_written(found, llama, byte_tokenizer, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    said = []
    plan = auto_plan(llama, byte_tokenizer, CONFIG, folder=tmp_path / "file" / "cache", say=said.append)
    assert plan.retrieval
    [one] = said  # before the work, not after it
    assert "is identified now, but" in one
    assert "cannot be written, so the next call does it again." in one


def test_hybrid_and_names(found, llama, byte_tokenizer, tmp_path):
    ids = torch.tensor(tiny.prompts(100))
    with hybrid(llama, "auto", CONFIG, tokenizer=byte_tokenizer):
        one = llama.generate(ids, max_new_tokens=4)
    [path] = (tmp_path / "cache").glob("*.json")
    with hybrid(llama, str(path), CONFIG):
        assert torch.equal(llama.generate(ids, max_new_tokens=4), one)
    with pytest.raises(ValueError, match="give the tokenizer"):
        auto_plan(llama, None, replace(CONFIG, budget_tokens=72))


def test_the_cache_is_where_the_system_wants_it(monkeypatch, tmp_path):
    monkeypatch.delenv("LYCHEEDECODE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lycheedecode"


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "/models/SmolLM2-135M.Q4_1.gguf"]
)
def test_bundled_plans_are_found_by_the_models_name(name):
    assert bundled_plan_of(name) == HeadPlan.load("smollm2-135m")


def test_plans_that_ship_say_how_they_were_made_and_how_faithful_they_are():
    plan = HeadPlan.load("Qwen/Qwen2.5-Coder-1.5B-Instruct")
    plan.check_fits(num_layers=28, num_kv_heads=2, architecture="Qwen2ForCausalLM")
    assert len(plan.retrieval) == 14
    assert plan.completion is not None
    assert plan.provenance["command"].startswith("python -m experiments.continuations")
    assert all(score["kl_mean"] < 0.02 for score in plan.provenance["fidelity"].values() if isinstance(score, dict))
    assert bundled_plan_of("Qwen/Qwen2.5-1.5B-Instruct") is None
    half = bundled_plan_of("Qwen/Qwen2.5-Coder-0.5B-Instruct")
    half.check_fits(num_layers=24, num_kv_heads=2, architecture="Qwen2ForCausalLM")
    assert len(half.retrieval) == 12
    assert half.provenance["command"].startswith("lycheedecode identify")
    assert all(score["kl_mean"] < 0.017 for score in half.provenance["fidelity"].values() if isinstance(score, dict))
    few = HeadPlan.load("qwen2.5-coder-1.5b-instruct-7-heads")  # of the same model, by its own name alone
    few.check_fits(num_layers=28, num_kv_heads=2, architecture="Qwen2ForCausalLM")
    assert len(few.retrieval) == 7
    assert few.provenance["command"].startswith("lycheedecode identify")
    assert all(score["kl_mean"] < 0.014 for score in few.provenance["fidelity"].values() if isinstance(score, dict))


@pytest.mark.parametrize("name", ["smollm2-1350m", "asmollm2-135m", "smollm2", "", "/models/plain"])
def test_other_names_have_none(name):
    assert bundled_plan_of(name) is None


def test_names_of_hubs_load_but_missing_files_do_not(tmp_path):
    assert HeadPlan.load("HuggingFaceTB/SmolLM2-135M-Instruct") == HeadPlan.load("smollm2-135m")
    for name in (str(tmp_path / "smollm2-135m"), "smollm2-135m.json"):
        with pytest.raises(ValueError, match="no head plan file"):
            HeadPlan.load(name)


def test_a_bundled_plan_that_does_not_fit_is_not_taken(found, llama, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(llama.config, "name_or_path", "smollm2-135m", raising=False)
    assert auto_plan(llama, byte_tokenizer, CONFIG).num_layers == tiny.LAYERS
    assert "smollm2-135m" in bundled_plans()


def test_generate_knows_auto(found, llama, byte_tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    call = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "float32", "--plan", "auto"]
    done = CliRunner().invoke(app, [*call, "--budget-tokens", "96", "-n", "4", "A prompt."])
    assert done.exit_code == 0, done.output
    assert len(found) == 1
    assert "one is identified now, and kept in" in " ".join(done.stderr.split())
