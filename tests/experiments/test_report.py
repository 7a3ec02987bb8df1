"""Result files become one document and its pictures."""

import json
import subprocess
import sys

import pytest

from experiments.report import draw, render


def test_every_kind_of_result_becomes_a_table(tmp_path):
    environment = {
        "date": "2026-01-02T03:04:05Z",
        "machine": {"gpus": ["NVIDIA X"], "cpu": "Y", "cores": 2},
        "versions": {"torch": "2.13.0", "python": "3.11"},
        "commit": "0123456789abcdef",
    }
    score = {"kl_mean": 0.012345, "top1_agreement": 0.987, "kv_bytes_per_token": 2.5e6}
    kernels = [{"name": f"k|{i}", "launches": 2.0, "us": 10.0 - i} for i in range(10)]
    files = {
        "a": {"command": "evaluate fidelity", "result": {"cells": {"2048 tokens": {"hybrid": score}}, "kl_mean": 0.5}},
        "b": {"command": "bench ops", "result": {"rows": [{"op": "scan", "ms": 1.5, "share": 0.5}, {"op": "all"}]}},
        "d": {
            "command": "bench step",
            "result": {
                "rows": [],
                "profiles": [{"form": "hybrid", "batch": 2, "context": 512, "kernels": kernels}],
            },
        },
        "c": {"what": "ways", "variants": {"x": {"retrieval_heads": 4, "kl_mean": 0.2, "kl": {"noise": 0.1}}}},
    }
    for name, report in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**report, "environment": environment}), encoding="utf-8")
    text = render(tmp_path)
    assert "1 x NVIDIA X; torch 2.13.0; commit 0123456789; 2026-01-02" in text
    assert "| hybrid | 0.01235 | 98.7% | 2.50 MB |" in text
    assert "- kl mean: 0.5" in text
    assert "| op | ms | share |\n| --- | ---: | ---: |\n| scan | 1.5 | 50.0% |\n| all |  |  |" in text
    assert "|  | retrieval heads | kl mean | noise |\n| --- | ---: | ---: | ---: |\n| x | 4 | 0.2 | 0.1 |" in text
    assert "**Kernels of a step: hybrid, batch 2, 512 tokens**" in text
    assert "| others | 4 | 3 |" in text
    assert "There is nothing to compare yet." in text
    assert render(tmp_path / "none").endswith("There are no result files yet.\n")


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
    files["t"] = {"result": {"rows": rows[1:]}}
    for name, report in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")
    text = render(tmp_path)
    assert text.split("\n\n")[2] == "**Where something else is better**: in 3 of 4 result files that compare."
    assert text.split("\n\n")[3].splitlines() == [
        "- **f**: A policy that reads no more KV bytes than hybrid (up to 2%) is at least as close to full attention "
        "in 1 of 2 comparisons: quest on short, KL 0.015 at 2.50 MB a token, hybrid KL 0.02 at 3.00 MB a token.",
        "- **i**: A mean KL as low as sensitivity's have none of 1 other ways. On 1 of 2 kinds of prompts some other "
        "way has.",
        "- **s**: Slower than what they are compared with are 1 of 2 rows: hybrid, batch 1, context 4096 0.90x.",
    ]
    assert "| mean KL after tokens | 0 to 63 | 64 to 99 |\n| --- | ---: | ---: |\n| hybrid | 0.01 | 0.04 |" in text
    assert "| kascade |  |  | It reads too much. |" in text
    assert f"]({tmp_path.name}/f.png)" in text


def test_tasks_that_something_else_does_better(tmp_path):
    def row(policy, score, read, high=None):
        difference = {} if high is None else {"difference_value": score - 0.9, "difference_high": high}
        return {"task": "vt", "length": 4096, "policy": policy, "metric": "recall", "score": score,
                "kv_bytes_per_token": read, **difference}  # fmt: skip

    rows = [
        row("full", 0.9, 9e6),
        row("hybrid, 256 tokens", 0.5, 2e6, -0.2),
        row("hybrid, 512 tokens", 0.8, 3e6, 0.1),
        row("quest, 512 tokens", 0.6, 2e6, -0.1),
        row("duo, 512 tokens", 0.95, 4e6, 0.2),
    ]
    report = {"command": "evaluate tasks", "result": {"rows": rows, "averages": {}, "tasks": []}}
    (tmp_path / "t.json").write_text(json.dumps(report), encoding="utf-8")
    assert render(tmp_path).split("\n\n")[3].rstrip() == (
        "- **t**: Beyond its 95% interval, hybrid scores lower than full attention in 1 of 2 comparisons: hybrid, 256 "
        "tokens on vt, 4096, recall -0.4. A policy that reads no more KV bytes than hybrid (up to 2%) "
        "scores higher in 1 of 2 comparisons: quest, 512 tokens 0.6 on vt, 4096, recall, hybrid, 256 tokens 0.5."
    )
    assert "| vt | 4096 | hybrid, 256 tokens | recall | 0.5 | 2.00 MB |" in render(tmp_path)


def test_pictures_are_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    cells = {
        kind: {f"{name} {i}": score(name, 0.1 / i, i) for name in ("hybrid", "quest") for i in (1, 2)} for kind in "ab"
    }
    (tmp_path / "f.json").write_text(json.dumps({"result": {"cells": cells}}), encoding="utf-8")
    (tmp_path / "other.json").write_text(json.dumps({"result": {"rows": []}}), encoding="utf-8")
    pictures = []
    for _ in range(2):
        [path] = draw(tmp_path)
        pictures.append(path.read_bytes())
    assert path.name == "f.png"
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 10_000


def step(form, batch, context, size, speedup):
    return {"form": form, "batch": batch, "context": context, "bytes": size, "ms": 1.0, "speedup": speedup}


def test_pictures_of_speed(tmp_path):
    pytest.importorskip("matplotlib")
    operations = [{"op": op, "bytes": 10**7, "ms": 0.01} for op in ("full, ours", "scan, 8 heads", "attend", "strange")]
    operations.append({"op": "select, 8 heads", "bytes": 0, "ms": 0.005})
    steps = [step("full", 1, 4096, 100, 1.0), step("hybrid", 1, 4096, 60, 1.5), step("paper", 1, 4096, 80, 1.2)]
    results = {
        "ops": {"read_tb_s": 4.0, "rows": operations},
        "step": {"rows": steps},
        "alone": {"rows": [step("full", 1, 4096, 100, 1.0)]},
        "elsewhere": {"read_tb_s": None, "rows": operations},
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"result": result}), encoding="utf-8")
    assert [path.name for path in draw(tmp_path)] == ["ops.png", "step.png"]
    text = render(tmp_path)
    assert f"![What operations read a second, over what they must read]({tmp_path.name}/ops.png)" in text
    assert f"![Speed-up of a decode step over full attention]({tmp_path.name}/step.png)" in text


def test_on_the_command_line(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"result": {"rows": [{"op": "scan", "ms": 2}]}}), encoding="utf-8")
    command = [sys.executable, "-m", "experiments.report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| scan | 2 |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    done = subprocess.run([*command[:-1], str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no folder" in done.stderr


def test_long_files_begin_with_an_overview(tmp_path):
    cells = {
        "short": {"full": score("full", 0, 9), "hybrid": score("hybrid", 0.01, 3), "quest": score("quest", 0.02, 3)},
        "long": {"hybrid": score("hybrid", 0.01, 3), "quest": score("quest", 0.08, 3), "duo": {"left_out": "Why."}},
    }
    rows = [
        {"task": task, "length": 4096, "policy": policy, "metric": "recall", "score": value}
        for task, scores in {"easy": (0.9, 0.8), "hard": (0.1, 0.3)}.items()
        for policy, value in zip(("full", "hybrid"), scores, strict=True)
    ]
    averages = {"ruler, 4096 tokens": {"full": 0.5, "hybrid": 0.55}}
    files = {"f": {"cells": cells}, "t": {"rows": rows, "averages": averages}}
    for name, result in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"result": result}), encoding="utf-8")
    text = render(tmp_path)
    assert "| quest | 0.02 | 0.08 | 4 |" in text  # the geometric mean of 2 and 8
    assert "| duo |  |  |  |" in text
    assert "| hard, 4096 tokens, recall | 0.1 | 0.3 |" in text
    assert "| average: ruler, 4096 tokens | 0.5 | 0.55 |" in text
    assert "| average: 1 tasks that full attention solves (50% or more) | 0.9 | 0.8 |" in text
    assert text.count("<summary>All numbers</summary>") == 2
