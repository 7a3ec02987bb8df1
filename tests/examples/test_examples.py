"""Every example runs, with a tiny random model in the place of a real one."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = {
    "chat.py": "--model MODEL --plan PLAN --document DOCUMENT --max-new-tokens 4",
    "stream.py": "hello --model MODEL --plan PLAN --max-new-tokens 4",
    "transformers_generate.py": "--model MODEL --plan PLAN --max-new-tokens 4",
    "identify_and_check.py": "OUT --model MODEL --tokens 256 --prompts 1 --budget-tokens 64",
    "evaluate.sh": "MODEL PLAN",
}
SHOWN = {"chat.py": "[41 of ", "identify_and_check.py": "retrieval heads", "evaluate.sh": "hybrid"}
NEEDS_A_SERVER = {"serve_and_ask.sh"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    tiny.model(max_position_embeddings=1024).save_pretrained(folder / "model")
    tiny.byte_tokenizer().save_pretrained(folder / "model")
    tiny.plan().save(folder / "plan.json")
    (folder / "document.txt").write_text("A short text.", encoding="utf-8")
    return {
        "MODEL": folder / "model",
        "PLAN": folder / "plan.json",
        "DOCUMENT": folder / "document.txt",
        "OUT": folder / "found.json",
    }


def words_of(name, places):
    return [str(places.get(word, word)) for word in shlex.split(RUNS[name])]


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith(".py")])
def test_python_example_runs(name, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words_of(name, places)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SHOWN.get(name, "") in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith(".sh")])
def test_shell_example_runs(name, places, tmp_path):
    small = {"BUDGET_TOKENS": "64", "CELL": "prose:256:continuation:16", "PROMPTS": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", EXAMPLES / name, *words_of(name, places)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **small, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert SHOWN[name] in done.stdout


def test_every_example_is_tried():
    assert {path.name for path in EXAMPLES.iterdir()} == {*RUNS, *NEEDS_A_SERVER}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.sh")))
def test_shell_examples_parse(name):
    subprocess.run(["bash", "-n", EXAMPLES / name], check=True)
