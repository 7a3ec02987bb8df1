"""Without a GPU the library is plain Python: nothing misses Triton, nor what of POSIX macOS and Windows lack."""

import importlib.util
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import lycheedecode

LIKE_WINDOWS = """
import builtins, io, os, sys

sys.modules["triton"] = None  # `import triton` fails as if it were not there
from transformers import GenerationMixin  # what torch, transformers and psutil need of this system is theirs

for name in ("sysconf", "sched_getaffinity", "statvfs", "getuid", "fork", "mkfifo"):
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
KERNELS = ("triton", "ops.operators", "ops.kernel_common", "bench.read", "bench.lossless")
"""What imports Triton, and is imported where kernels run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("small")
    tiny.model().save_pretrained(place)
    tiny.byte_tokenizer().save_pretrained(place)
    tiny.plan().save(place / "plan.json")
    return place


def python(script, *arguments):
    sources = os.pathsep.join([str(Path(lycheedecode.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-W", "ignore", "-c", LIKE_WINDOWS + script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def modules():
    """All of the package but what extends vLLM, which is for Linux."""
    found = pkgutil.walk_packages(lycheedecode.__path__, "lycheedecode.", onerror=lambda name: None)
    return [module.name for module in found if "vllm" not in module.name and not module.name.endswith("__main__")]


def test_every_module_but_kernels_imports():
    script = """
import importlib
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, error.name)
"""
    needed = [name for name in modules() if importlib.util.find_spec("lm_eval") or "lm_eval" not in name]
    done = python(script, *needed)
    assert done.returncode == 0, done.stderr[-2000:]
    missing = dict(line.split() for line in done.stdout.splitlines())
    assert set(missing.values()) == {"triton"}, missing
    assert all(name.split(".", 1)[1].endswith(KERNELS) or ".triton_" in name for name in missing), missing


def test_models_are_read_decoded_and_routed(folder):
    script = """
from lycheedecode import Engine, HeadPlan, HybridConfig, hybrid
from lycheedecode.models import load_model

model, tokenizer = load_model(sys.argv[1])
plan, config = HeadPlan.load(sys.argv[1] + "/plan.json"), HybridConfig(budget_tokens=32, block_size=8, sink_tokens=4)
text = "A text that is longer than the budget. " * 5
for more in {}, {"completion": "centroid", "completion_chunk": 8}, {"scan_keys": "float8"}, {"verify_every": 2}:
    engine = Engine(model, tokenizer, plan=plan, config={**config.to_dict(), **more})
    [made] = engine.generate(text, 8, sampling={"temperature": 0.7, "seed": 1}, ignore_eos=True)
    print(len(made.token_ids))
[made] = Engine(model, tokenizer, plan=plan, config=config, cache="host").generate(text, 8, ignore_eos=True)
inputs = tokenizer(text, return_tensors="pt")
with hybrid(model, plan, config):
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(output[0, inputs["input_ids"].shape[1]:].tolist() == list(made.token_ids))
"""
    done = python(script, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["8"] * 4 + ["True"]


COMMANDS = {
    "help": ["--help"],
    "help of bench": ["bench", "lossless", "--help"],
    "generate": ["generate", "A prompt. " * 12, "--model", "MODEL", "-p", "PLAN", "-n", "4", "--html", "OUT.html"],
    "identify": ["identify", "OUT.json", "--model", "MODEL", "--calibrate", "noise:300:passkey:1"],
    "inspect": ["inspect", "PLAN", "--html", "OUT.html"],
    "memory": ["memory", "--model", "MODEL", "--context", "4096"],
    "a result": ["generate", "A prompt.", "--model", "MODEL", "-p", "PLAN", "-n", "4", "--json", "OUT.json"],
}
MORE = {"identify": ["--calibrate-prompts", "1", "--budget-tokens", "64", "--block-size", "8", "--recent-tokens", "8"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_run(name, folder, tmp_path):
    out = {word: tmp_path / word for word in COMMANDS[name] if word.startswith("OUT")}
    names = {"MODEL": folder, "PLAN": folder / "plan.json", **out}
    words = [str(names.get(word, word)) for word in COMMANDS[name] + MORE.get(name, [])]
    done = python("from lycheedecode.cli import main\nmain()", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.stat().st_size > 100 for path in out.values())


def test_what_times_kernels_says_what_is_missing():
    done = python("from lycheedecode.cli import main\nmain()", "bench", "lossless")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == (
        "lycheedecode: bench lossless times kernels of Triton, which comes with PyTorch on Linux and is not there."
    )
