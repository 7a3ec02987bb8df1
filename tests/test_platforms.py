"""Without a GPU the library is plain Python: nothing misses Triton, nor what of POSIX macOS and Windows lack."""

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import tiny

import lycheedecode

LIKE_WINDOWS = """
import builtins, io, os, sys

sys.modules["triton"] = None  # `import triton` fails as if it were not there
from transformers import GenerationMixin  # what torch, transformers and psutil need of this system is theirs

for name in ("sysconf", "sched_getaffinity", "fork", "mkfifo"):
    delattr(os, name)
opened, imported = builtins.open, builtins.__import__

def found(path, *arguments, **options):
    if str(path).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(path)
    return opened(path, *arguments, **options)

def importing(name, globals=None, *more, **options):
    ours = (globals or {}).get("__name__", "").startswith("lycheedecode")
    if ours and name in ("fcntl", "resource", "pwd", "grp", "termios"):
        raise ModuleNotFoundError(name)
    return imported(name, globals, *more, **options)

builtins.open, io.open, builtins.__import__ = found, found, importing
"""
KERNELS = ("triton", "ops.operators", "ops.kernel_common", "ops.merge", "bench.read", "bench.lossless")
"""What imports Triton, and is imported where kernels run."""


def modules():
    """All of the package but what extends vLLM, which is for Linux."""
    found = pkgutil.walk_packages(lycheedecode.__path__, "lycheedecode.", onerror=lambda name: None)
    return [module.name for module in found if "vllm" not in module.name and not module.name.endswith("__main__")]


DECODES = """
import importlib, json, shlex
from typer.testing import CliRunner
from lycheedecode import Engine, HeadPlan, HybridConfig, hybrid
from lycheedecode.cli import app
from lycheedecode.models import load_model

commands, modules = json.loads(sys.argv[1])
model, tokenizer = load_model("model")
plan, config = HeadPlan.load("plan.json"), HybridConfig(budget_tokens=32, block_size=8, sink_tokens=4, recent_tokens=8)
text = "A text that is longer than the budget. " * 5
completed = {"completion": "centroid", "completion_chunk": 8}
for more in {}, completed, {"scan_keys": "float8"}, {"scan_keys": "int4"}, {"verify_every": 2}:
    engine = Engine(model, tokenizer, plan=plan, config={**config.to_dict(), **more})
    [made] = engine.generate(text, 8, sampling={"temperature": 0.7, "seed": 1}, ignore_eos=True)
    assert len(made.token_ids) == 8
[made] = Engine(model, tokenizer, plan=plan, config=config, cache="host").generate(text, 8, ignore_eos=True)
with hybrid(model, plan, config):
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
assert output[0, -8:].tolist() == list(made.token_ids)
said, missing = [], {}
for line in commands:
    done = CliRunner().invoke(app, shlex.split(line))
    said.append([done.exit_code, done.stderr if done.exit_code else ""])
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name
print(json.dumps([said, missing]))
"""


def test_models_decode_commands_run_and_every_module_but_kernels_imports(tmp_path):
    """In one process: torch and transformers take seconds to import."""
    small = "--budget-tokens 32 --block-size 8 --sink-tokens 4 --recent-tokens 8"
    prompt = "A prompt that is longer than the budget."
    commands = [
        "--help",
        "bench lossless --help",
        f"generate '{prompt}' --model model -p plan.json -n 4 --json made.json {small}",
        f"generate '{prompt}' --model model -p plan.json -n 4 --html view.html {small}",
        f"identify found.json --model model --calibrate noise:300:passkey:1 --calibrate-prompts 1 {small}",
        "inspect plan.json --html plan.html",
        "memory --model model --context 4096",
        "bench lossless",
    ]
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    tiny.plan().save(tmp_path / "plan.json")
    needed = [name for name in modules() if importlib.util.find_spec("lm_eval") or "lm_eval" not in name]
    sources = os.pathsep.join([str(Path(lycheedecode.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIKE_WINDOWS + DECODES, json.dumps([commands, needed])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (*fine, (code, last)), missing = json.loads(done.stdout.splitlines()[-1])
    assert fine == [[0, ""]] * (len(commands) - 1), done.stdout
    assert code == 2
    assert "Triton" in last
    for name in ("made.json", "view.html", "found.json", "plan.html"):
        assert (tmp_path / name).stat().st_size > 100
    assert set(missing.values()) == {"triton"}, missing
    assert all(name.endswith(KERNELS) or ".triton_" in name for name in missing), missing
