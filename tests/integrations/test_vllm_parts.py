"""What the plugin relies on in vLLM, and that it leaves everybody else alone; a failure names the version."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")

import vllm
from vllm.v1.worker import cpu_worker, gpu_worker

from lycheedecode.integrations import vllm as plugin
from lycheedecode.integrations.vllm import parts, settings

HERE = f"vLLM {vllm.__version__}"


def test_every_field_of_the_metadata_is_known():
    """Of each must be known whether it has an entry for each row: mixed steps cut rows off."""
    theirs = {field.name for field in fields(parts.CommonAttentionMetadata)}
    known = parts.FIELDS_OF_ROWS | parts.FIELDS_OF_TOKENS | parts.FIELDS_OF_BATCH | parts.FIELDS_NOT_MET
    unknown = theirs - known
    assert not unknown, f"{HERE} has new fields in CommonAttentionMetadata: {sorted(unknown)}."
    needed = {"seq_lens", "block_table_tensor", "is_prefilling", "query_start_loc_cpu", "causal", "mm_req_doc_ranges"}
    assert needed <= theirs, f"{HERE} has lost fields of CommonAttentionMetadata: {sorted(needed - theirs)}."


def test_builders_and_layers_are_called_as_we_override_them():
    from vllm.v1.attention.backends import cpu_attn, flash_attn

    for module, name in ((cpu_attn, "CPUAttention"), (flash_attn, "FlashAttention")):
        builder = getattr(module, f"{name}MetadataBuilder")
        layer = getattr(module, "CPUAttentionBackendImpl" if name == "CPUAttention" else "FlashAttentionImpl")
        calls = {
            builder.__init__: ["self", "kv_cache_spec", "layer_names", "vllm_config", "device"],
            builder.build: ["self", "common_prefix_len", "common_attn_metadata", "fast_build"],
            layer.forward: ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"],
        }
        for function, expected in calls.items():
            found = list(inspect.signature(function).parameters)[: len(expected)]
            assert found == expected, f"{HERE}: {function.__qualname__} takes {found}."


def test_drafters_are_called_as_we_override_them():
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    from lycheedecode.integrations.vllm.drafter_v1 import TargetDrafter

    drafters = [(TargetDrafter, DraftModelProposer)]
    if settings.drafts_in_v2(vllm.__version__):
        from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

        from lycheedecode.integrations.vllm.drafter_v2 import TargetSpeculator

        drafters.append((TargetSpeculator, DraftModelSpeculator))
    for ours, theirs in drafters:
        overridden = [name for name in vars(ours) if name[0] != "_" and hasattr(theirs, name)]
        assert len(overridden) == 5
        for name in overridden:
            expected, found = (list(inspect.signature(getattr(x, name)).parameters) for x in (ours, theirs))
            assert found == expected, f"{HERE}: {theirs.__name__}.{name} takes {found}."


def test_every_worker_leaves_room_beside_its_cache(monkeypatch):
    """Also where vLLM has decorated the method: GPUs once kept all memory for the cache."""
    workers = [gpu_worker.Worker, cpu_worker.CPUWorker]
    for worker in workers:
        assert "determine_available_memory" in vars(worker), f"{HERE}: {worker.__name__} takes it from another class."
        stock = inspect.unwrap(worker.determine_available_memory)
        assert list(inspect.signature(stock).parameters) == ["self"]
        monkeypatch.setattr(worker, "determine_available_memory", torch.inference_mode()(lambda self: 1000))
    for _ in range(2):
        parts.reserve(lambda worker: 0.75)
    assert [worker.determine_available_memory(object()) for worker in workers] == [750, 750]


SELECTED = """
import json, sys, torch
import lycheedecode.integrations.vllm as plugin
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
from vllm.v1.attention.selector import AttentionSelectorConfig
before = dict(vars(type(current_platform)))
if "register" in sys.argv:
    plugin.register()
    plugin.register()
config = AttentionSelectorConfig(head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=None)
paths = {}
for name in (None, "CPU_ATTN", "FLASH_ATTN", "CUSTOM"):
    backend = name and Backends[name]
    paths[str(name)] = current_platform.get_attn_backend_cls(backend, attn_selector_config=config)
loaded = [name for name in sys.modules if name.startswith("lycheedecode.integrations.vllm.")]
print(json.dumps({"paths": paths, "overridden": [b.name for b in Backends if b.is_overridden()], "loaded": loaded}))
"""


def selected(*arguments):
    command = [sys.executable, "-c", SELECTED, *arguments]
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_who_does_not_ask_for_it_gets_what_vllm_has():
    stock, ours = selected(), selected("register")
    assert ours["paths"].pop("CUSTOM") == "lycheedecode.integrations.vllm.cpu.HybridBackend"
    stock["paths"].pop("CUSTOM")
    assert ours["paths"] == stock["paths"]
    assert ours["overridden"] == ["CUSTOM"]
    assert ours["loaded"] == ["lycheedecode.integrations.vllm.wrap"]


def test_an_unknown_version_is_refused_by_who_asks_for_it(monkeypatch):
    code = "import vllm; vllm.__version__ = '0.99.0'; import lycheedecode.integrations.vllm.cpu"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("LycheeDecode works in vLLM 0.26 to 0.33, not in 0.99.0.")
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    plugin.register()
