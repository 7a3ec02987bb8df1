"""The documents say what is so: code runs, options exist, links lead somewhere, results are current."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from lycheedecode import HeadPlan
from lycheedecode.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = runpy.run_path(str(ROOT / "docs" / "make_results.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    for line in "".join(blocks(page, "")).splitlines():
        if not line.startswith("lycheedecode "):
            continue
        words = shlex.split(line, comments=True)
        command = words[1:3] if words[1] in ("evaluate", "bench") else words[1:2]
        done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300"})
        assert done.exit_code == 0, line
        for option in [word for word in words if word.startswith("--")]:
            assert f"{option} " in done.stdout, line


def test_options_named_in_the_text_exist():
    known = "".join(
        CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300"}).stdout
        for command in (["generate"], ["identify"], ["inspect"], ["evaluate", "fidelity"])
    )
    for page in PAGES:
        for option in re.findall(r"`[^`\n]*?(--[a-z-]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            assert f"{option} " in known, f"{page.name}: {option}"


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page in PAGES:
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= set(targets)


def test_the_quick_start_runs(tmp_path, monkeypatch, capsys):
    """With a tiny model in the place of the embedded one."""
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    tiny.plan().save(tmp_path / "plan.json")
    code = "".join(blocks(ROOT / "README.md", "python"))
    code = code.replace('load_model("smollm2-135m")', f'load_model({str(tmp_path / "model")!r}, device="cpu")')
    code = code.replace('load("smollm2-135m")', f"load({str(tmp_path / 'plan.json')!r})")
    assert "smollm2-135m" not in code
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out


def test_the_example_plan_is_one(tmp_path, monkeypatch):
    page = ROOT / "docs" / "head-plans.md"
    [text] = blocks(page, "json")
    plan = HeadPlan.from_json(text)
    assert plan.retrieval == ((0, 0), (0, 1), (1, 1))
    (tmp_path / "my-plan.json").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec("".join(blocks(page, "python")), {})
    assert HeadPlan.load("copy.json") == plan


def test_the_results_are_those_of_the_result_files():
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == RESULTS["render"](), "run: make results"


def test_every_kind_of_result_becomes_a_table(tmp_path):
    environment = {
        "date": "2026-01-02T03:04:05Z",
        "machine": {"gpus": ["NVIDIA X"], "cpu": "Y", "cores": 2},
        "versions": {"torch": "2.13.0", "python": "3.11"},
        "commit": "0123456789abcdef",
    }
    score = {"kl_mean": 0.012345, "top1_agreement": 0.987, "kv_bytes_per_token": 2.5e6}
    files = {
        "a": {"command": "evaluate fidelity", "result": {"cells": {"2048 tokens": {"hybrid": score}}, "kl_mean": 0.5}},
        "b": {"command": "bench ops", "result": {"rows": [{"op": "scan", "ms": 1.5, "share": 0.5}, {"op": "all"}]}},
        "c": {"what": "ways", "variants": {"x": {"retrieval_heads": 4, "kl_mean": 0.2, "kl": {"noise": 0.1}}}},
    }
    for name, report in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**report, "environment": environment}), encoding="utf-8")
    text = RESULTS["render"](tmp_path)
    assert "1 x NVIDIA X; torch 2.13.0; commit 0123456789; 2026-01-02" in text
    assert "| hybrid | 0.01235 | 98.7% | 2.50 MB |" in text
    assert "- kl mean: 0.5" in text
    assert "| op | ms | share |\n| --- | ---: | ---: |\n| scan | 1.5 | 50.0% |\n| all |  |  |" in text
    assert "|  | retrieval heads | kl mean | noise |\n| --- | ---: | ---: | ---: |\n| x | 4 | 0.2 | 0.1 |" in text
    assert "a: no policy reads as little as hybrid." in text
    assert "b: none of 1 rows are slower" not in text
    assert RESULTS["render"](tmp_path / "none").endswith("There are no result files yet.\n")


def score(policy, kl, megabytes, **more):
    return {"policy": policy, "kl_mean": kl, "kv_bytes_per_token": megabytes * 1e6, **more}


def test_the_first_paragraph_says_what_is_not_better(tmp_path):
    along = [{"first": 0, "last": 63, "kl_mean": 0.01}, {"first": 64, "last": 99, "kl_mean": 0.04}]
    fidelity = {
        "short": {
            "full": score("full", 0, 9),
            "hybrid": score("hybrid", 0.02, 3, by_position=along),
            "quest": score("quest", 0.015, 2.5),
            "duo": score("duo", 0.5, 3),
            "paper": score("paper", 0.001, 3.5),  # closer, but it reads more
            "kascade": {"policy": "kascade", "left_out": "It reads too much."},
        },
    }
    variants = {
        "sensitivity": {"retrieval_heads": 4, "kl_mean": 0.2, "kl": {"a": 0.1, "b": 0.3}},
        "gates": {"retrieval_heads": 4, "kl_mean": 0.3, "kl": {"a": 0.4, "b": 0.2}},
        "every head its own": {"retrieval_heads": 8, "kl_mean": 0.1, "kl": {"a": 0.1, "b": 0.1}},
    }
    rows = [{"form": "hybrid", "batch": 1, "context": 4096, "speedup": speedup} for speedup in (0.9, 1.5)]
    files = {"f": {"result": {"cells": fidelity}}, "i": {"variants": variants}, "s": {"result": {"rows": rows}}}
    for name, report in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")
    text = RESULTS["render"](tmp_path)
    assert text.split("\n\n")[2] == (
        "**Where something else is better.** f: a policy that reads no more KV bytes than hybrid is at least as "
        "close to full attention in 1 of 2 comparisons: quest on short, KL 0.015 at 2.50 MB a token, hybrid KL "
        "0.02 at 3.00 MB a token. i: none of 1 other ways have a mean KL as low as sensitivity; on 1 of 2 kinds of"
        " prompts some other way does. s: 1 of 2 rows are slower than what they are compared with (hybrid, batch "
        "1, context 4096 0.90x)."
    )
    assert "| mean KL after tokens | 0 to 63 | 64 to 99 |\n| --- | ---: | ---: |\n| hybrid | 0.01 | 0.04 |" in text
    assert "| kascade |  |  | It reads too much. |" in text
    assert "](results/f.png)" in text


def test_pictures_are_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    cells = {
        kind: {f"{name} {i}": score(name, 0.1 / i, i) for name in ("hybrid", "quest") for i in (1, 2)} for kind in "ab"
    }
    (tmp_path / "f.json").write_text(json.dumps({"result": {"cells": cells}}), encoding="utf-8")
    (tmp_path / "other.json").write_text(json.dumps({"result": {"rows": []}}), encoding="utf-8")
    pictures = []
    for _ in range(2):
        [path] = RESULTS["draw"](tmp_path)
        pictures.append(path.read_bytes())
    assert path.name == "f.png"
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 10_000
