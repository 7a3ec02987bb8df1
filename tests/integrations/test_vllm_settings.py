"""What the plugin refuses, and with which words; none of this needs vLLM."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny

from lycheedecode import HeadPlan, PlanError
from lycheedecode.integrations.vllm import settings
from lycheedecode.integrations.vllm.settings import ServingError


def vllm_config(given, backend="CUSTOM", layers=tiny.LAYERS, heads=tiny.KV_HEADS, architecture="LlamaForCausalLM"):
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: layers,
        get_total_num_kv_heads=lambda: heads,
        hf_config=SimpleNamespace(architectures=[architecture]),
    )
    attention = SimpleNamespace(backend=backend and SimpleNamespace(name=backend))
    cache = SimpleNamespace(cache_dtype="fp8")
    return SimpleNamespace(additional_config=given, model_config=model, attention_config=attention, cache_config=cache)


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    HeadPlan.from_donors(tiny.plan().donors, model={"name": "tiny", "architecture": "LlamaForCausalLM"}).save(path)
    return str(path)


def test_plan_and_settings_are_read(plan_file):
    told = settings.read(vllm_config({"lycheedecode": {"plan": plan_file, "budget_tokens": 512}, "x": 1}))
    plan, config = told.plan, told.config
    assert plan.donors == tiny.plan().donors
    assert config.budget_tokens == 512
    assert config.block_size == 32


@pytest.mark.parametrize(
    "given", [None, {}, {"lycheedecode": {}}, {"lycheedecode": "plan"}, {"lycheedecode": {"plan": 1}}]
)
def test_no_plan(given):
    with pytest.raises(ServingError, match="CUSTOM needs a head plan: --additional-config"):
        settings.read(vllm_config(given))


def test_whether_some_head_is_completed(plan_file, tmp_path):
    def completes(plan, **given):
        return settings.read(vllm_config({"lycheedecode": {"plan": plan, **given}})).completes

    fitted = str(tmp_path / "fitted.json")
    HeadPlan.from_donors(tiny.plan().donors, completion=[[0.0, 0.0], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]]).save(fitted)
    assert not completes(plan_file)
    assert completes(plan_file, completion="centroid")
    assert completes(fitted)
    assert not completes(fitted, completion="none")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"budget": 3}, "no setting 'budget'; did you mean"),
        ({"budget_tokens": -1}, "budget_tokens must be"),
        ({"refresh_every": 2}, "refresh_every must be 1 in vLLM"),
        ({"correction_every": 32}, "correction_every must be 0 in vLLM"),
        ({"step_weights": "float8"}, "step_weights must be 'model' in vLLM"),
        ({"verify_every": 4}, "in vLLM a lossless server has the setting lossless"),
        ({"scan_keys": "int4"}, "scan_keys must be 'cache' with a KV cache in FP8"),
        ({"lossless": 32}, "lossless must be how many tokens to draft, from 0 to 31, not 32"),
        ({"lossless": True}, "lossless must be how many tokens to draft, from 0 to 31, not True"),
    ],
    ids=["unknown", "senseless", "refresh", "correction", "8-bit weights", "rounds", "8-bit scan", "many", "yes"],
)
def test_settings_that_a_server_cannot_honour(plan_file, setting, words):
    with pytest.raises(ValueError, match=words):
        settings.read(vllm_config({"lycheedecode": {"plan": plan_file, **setting}}))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"layers": 5}, "4 layers; the model has 5"),
        ({"heads": 8}, "2 KV heads per layer; the model has 8"),
        ({"architecture": "Qwen3ForCausalLM"}, "architecture LlamaForCausalLM; the model has Qwen3ForCausalLM"),
    ],
    ids=["layers", "heads", "architecture"],
)
def test_a_plan_of_another_model(plan_file, shape, words):
    with pytest.raises(PlanError, match=words):
        settings.read(vllm_config({"lycheedecode": {"plan": plan_file}}, **shape))


def test_a_rank_and_stage_gets_its_part():
    plan = HeadPlan.from_donors([[(0, 0), (0, 1)], [(1, 0), (0, 1)], [(2, 0), (2, 1)], [(2, 0), (3, 1)]])
    part = settings.of_rank(plan, 1, 2, [(0, 2), (2, 4)], 1)
    assert part.donors == (((0, 0),), ((1, 0),))


@pytest.mark.parametrize(
    ("world", "stages", "words"),
    [
        (2, [(0, 4)], "is on tensor-parallel rank 1, not 0"),
        (4, [(0, 4)], "2 KV heads cannot be divided evenly over 4 ranks"),
        (1, [(0, 2), (2, 4)], "is in an earlier pipeline stage"),
    ],
    ids=["across ranks", "more ranks than heads", "across stages"],
)
def test_every_rank_refuses_a_plan_that_does_not_divide(world, stages, words):
    for rank in range(world):
        with pytest.raises(PlanError, match=words):
            settings.of_rank(tiny.plan(), rank, world, stages, 0)


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.27.1+cpu", "0.33.0rc1"])
def test_versions_that_are_known(version):
    settings.check_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.0", "dev"])
def test_versions_that_are_not(version):
    with pytest.raises(ServingError, match=r"LycheeDecode works in vLLM 0\.26 to 0\.33, not in"):
        settings.check_version(version)


def test_only_the_backend_custom_is_hybrid():
    assert settings.is_chosen(vllm_config(None))
    assert not settings.is_chosen(vllm_config(None, backend="FLASH_ATTN"))
    assert not settings.is_chosen(vllm_config(None, backend=None))
    one_kind = vllm_config(None, backend=None)
    one_kind.attention_config.backend_per_kind = {"full_attention": SimpleNamespace(name="CUSTOM")}
    assert settings.is_chosen(one_kind)


def test_what_a_server_drafts():
    assert settings.drafts(vllm_config({"lycheedecode": {"lossless": 8}})) == 8
    assert settings.drafts(vllm_config({"lycheedecode": {"lossless": 8}}, backend=None)) == 0
    assert settings.drafts(vllm_config({"lycheedecode": {"plan": "x"}})) == settings.drafts(vllm_config(None)) == 0


def test_the_plugin_is_light():
    """Every process of a server loads it, whatever attention it uses."""
    code = "import sys, lycheedecode.integrations.vllm; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_lossless_server_needs_the_first_model_runner_before_0_32():
    for is_second, version in ((False, "0.27.1"), (True, "0.32.0"), (True, "0.33.1")):
        settings.check_runner(is_second, version)
    with pytest.raises(ServingError, match=r"first model runner before vLLM 0\.32: unset"):
        settings.check_runner(True, "0.31.9")
