"""Result files become one document and its pictures."""

import runpy
import subprocess
import sys

import pytest
from report_files import part, score, write

from experiments.report import draw, front_table, render
from experiments.report.sources import read


def test_every_kind_of_result_becomes_a_table(tmp_path):
    environment = {
        "date": "2026-01-02T03:04:05Z",
        "machine": {"gpus": ["NVIDIA X"], "cpu": "Y", "cores": 2},
        "versions": {"torch": "2.13.0", "python": "3.11"},
        "commit": "0123456789abcdef",
    }
    one = {"kl_mean": 0.012345, "top1_agreement": 0.987, "kv_bytes_per_token": 2.5e6}
    kernels = [{"name": f"k|{i}", "launches": 2.0, "us": 10.0 - i} for i in range(10)]
    profiles = [{"form": "hybrid", "batch": 2, "context": 512, "kernels": kernels}]
    files = {
        "a": {"command": "evaluate fidelity", "result": {"cells": {"2048 tokens": {"hybrid": one}}, "kl_mean": 0.5}},
        "b": {"command": "bench ops", "result": {"rows": [{"op": "scan", "ms": 1.5, "share": 0.5}, {"op": "all"}]}},
        "d": {"command": "bench step", "result": {"rows": [], "profiles": profiles}},
        "c": {"what": "ways", "variants": {"x": {"retrieval_heads": 4, "kl_mean": 0.2, "kl": {"noise": 0.1}}}},
    }
    write(tmp_path, **{name: {**report, "environment": environment} for name, report in files.items()})
    text = render(tmp_path)
    assert "1 x NVIDIA X; torch 2.13.0; commit 0123456789; 2026-01-02" in text
    assert "| hybrid | 0.01235 | 98.7% | 2.50 MB |" in text
    assert "- kl mean: 0.5" in text
    assert "| op | ms | share |\n| --- | ---: | ---: |\n| scan | 1.5 | 50.0% |\n| all |  |  |" in text
    assert "|  | retrieval heads | kl mean | noise |\n| --- | ---: | ---: | ---: |\n| x | 4 | 0.2 | 0.1 |" in text
    assert "**Kernels of a step: hybrid, batch 2, 512 tokens**" in text
    assert "| others | 4 | 3 |" in text
    assert render(tmp_path / "none").endswith("There are no result files yet.\n")


def test_what_is_better_is_said_first(tmp_path):
    along = [{"first": 0, "last": 63, "kl_mean": 0.01}, {"first": 64, "last": 99, "kl_mean": 0.04}]
    fidelity = {
        "short": {
            "full": score("full", 0, 9),
            "hybrid": score("hybrid", 0.02, 3, by_position=along),
            "quest": score("quest", 0.015, 2.5),
            "duo": score("duo", 0.5, 3),
            "kascade": {"policy": "kascade", "left_out": "It reads too much."},
        },
    }
    variants = {
        "sensitivity": {"retrieval_heads": 4, "kl_mean": 0.2, "kl": {"a": 0.1, "b": 0.3}},
        "gates": {"retrieval_heads": 4, "kl_mean": 0.3, "kl": {"a": 0.4, "b": 0.2}},
        "every head its own": {"retrieval_heads": 8, "kl_mean": 0.1, "kl": {"a": 0.1, "b": 0.1}},
    }
    study = {
        "k": {"512 tokens: hybrid, 7 heads": score("x", 0.02, 1), "512 tokens: paper, 7 heads": score("x", 0.01, 1)}
    }
    steps = [step(form, 1, 4096, size, speedup) for form, size, speedup in (("full", 9, 1.0), ("hybrid", 8, 0.9))]
    resident, host = ({"batch": 1, "context": 4096, "store_percent": percent, "bytes_on_gpu": size, "ms": ms}
                      for percent, size, ms in ((None, 4e9, 5.0), (200, 1e9, 6.0)))  # fmt: skip
    write(
        tmp_path,
        f={"result": {"cells": fidelity}},
        i={"variants": variants},
        s={"command": "bench step", "result": {"rows": steps}},
        m={"command": "bench memory", "result": {"rows": [resident, host]}},
        c={"command": "continuations", "result": {"cells": study}},
    )
    text = render(tmp_path)
    lost = [line for line in part(text, "## How faithful").splitlines() if line.startswith("- ")]
    assert "In 1 of 1 comparisons the paper's form" in lost[0]
    assert "7 heads, 512 tokens on k, KL 0.01 (hybrid: 0.02)." in lost[0]
    assert "In 1 of 2 comparisons" in lost[1]
    assert "quest on short, KL 0.015 at 2.50 MB a token" in lost[1]
    assert "On 1 of 2 kinds of prompts" in lost[2]
    assert "average none of 1" in lost[2]
    assert "hybrid, 1 x 4K, 0.90x" in part(text, "## How fast")
    assert "a store of 200%, 6.00 ms (resident: 5.00)." in part(text, "## How much memory")
    assert "| mean KL after tokens | 0 to 63 | 64 to 99 |\n| --- | ---: | ---: |\n| hybrid | 0.01 | 0.04 |" in text
    assert "It reads too much. |" in text


def step(form, batch, context, size, speedup, ms=1.0):
    return {"form": form, "batch": batch, "context": context, "bytes": size, "ms": ms, "fast_ms": ms, "slow_ms": ms,
            "speedup": speedup}  # fmt: skip


def test_every_speed_says_what_is_in_it(tmp_path):
    gpu = {"environment": {"machine": {"gpus": ["NVIDIA H200"]}, "versions": {"vllm": "0.26.0"}}}
    steps = [step(form, 1, context, 100, 1.0, ms) for form, context, ms in (
        ("full", 4096, 4.0), ("hybrid", 4096, 4.0), ("full", 8192, 8.0), ("hybrid", 8192, 5.0), ("full", 16384, 9.0),
        ("hybrid", 16384, 3.0))]  # fmt: skip
    whole = {"batch": 1, "context": 4096, "prefill_seconds": 9.0, "steps": 63}
    made = [{**whole, "way": way, "decode_seconds": ms * 0.063, "ms": ms}
            for way, ms in (("full", 8.0), ("hybrid", 4.0), ("transformers", 20.0))]  # fmt: skip
    served = [{"way": way, "batch": 4, "context": 4096, "ms": ms, "fast_ms": ms, "slow_ms": ms + 1, "speedup": 1.0}
              for way, ms in (("stock", 20.0), ("hybrid", 10.0))]  # fmt: skip
    served += [{**row, "context": 8192, "ms": None} for row in served[1:]] + [{**served[0], "context": 8192}]
    case = {"part": "rounds", "batch": 1, "context": 4096, "drafts": 8, "refresh": 1, "tokens_per_round": 7.4}
    rounds = [{**case, "full_ms": 8.0, "ms_per_token": 5.0}]
    real = [{"part": "real", "way": way, "batch": 2, "context": 4096, "tokens": 64, "tokens_per_second": speed,
             "gained": 7.0} for way, speed in (("full", 100.0), ("8", 150.0))]  # fmt: skip
    texts = [{"way": way, "batch": 2, "context": 4096, "tokens": 64, "tokens_per_second": speed, "tokens_a_round": 7.0}
             for way, speed in (("stock", 100.0), ("lossless", 200.0))]  # fmt: skip
    texts += [{**row, "context": 8192, "tokens_per_second": None} for row in texts]  # too short to measure
    asked = {"budget_tokens": 1024, "drafts": 8}
    write(
        tmp_path,
        e={"command": "experiments serving-lossless", "settings": asked, "result": {"rows": texts}, **gpu},
        g={"command": "bench generate", "settings": {"tokens": 64}, "result": {"rows": made}, **gpu},
        s={"command": "bench step", "settings": {"steps": 60}, "result": {"rows": steps, "weight_bytes": 20}, **gpu},
        v={"command": "bench serving", "settings": {"repeats": 3}, "result": {"rows": served}, **gpu},
        l={"command": "bench lossless", "settings": {"steps": 20}, "result": {"rows": rounds + real}, **gpu},
    )
    text = part(render(tmp_path), "## How fast")
    shown, every = text.split("<details>")
    cells = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert [(row[0][2:], row[3], row[4], row[5]) for row in cells] == [
        ("prefill and 64 tokens, whole", "9.50 s", "9.25 s (prefill 9.00 s)", "1.03x"),
        ("decode of the same, a token", "8.00 ms", "4.00 ms", "2.00x"),
        ("decode step", "4.00 ms", "4.00 ms (4.00 to 4.00)", "1.00x"),
        ("decode step", "9.00 ms", "3.00 ms (3.00 to 3.00)", "3.00x"),
        (
            "lossless decode (8 drafts, reselect every token; assumes 7.4 tokens per round)",
            "8.00 ms",
            "5.00 ms",
            "1.60x",
        ),
        ("lossless decode of texts (8 drafts; 7.0 tokens per round)", "20.00 ms", "13.33 ms", "1.50x"),
        ("vLLM 0.26, decode", "20.00 ms", "10.00 ms (10.00 to 11.00)", "2.00x"),
        (
            "vLLM 0.26, lossless decode of texts (budget 1024, 8 drafts; 7.0 tokens per round)",
            "20.00 ms",
            "10.00 ms",
            "2.00x",
        ),
    ]
    assert "8.00 ms | 5.00 ms" in every
    assert "transformers 10.26 s | 1 | 1 x H200 | [g](" in shown
    assert "read by a decode step | SmolLM2-135M | 1 x 4K | 0.0 MB" in part(render(tmp_path), "## How much memory")


def test_the_front_row_of_vllm_is_of_its_own_cache(tmp_path):
    def served(day, ms, **asked):
        rows = [{"way": way, "batch": 4, "context": 131072, "ms": spent, "fast_ms": spent, "slow_ms": spent}
                for way, spent in (("stock", 20.0), ("hybrid", ms))]  # fmt: skip
        settings = {"model": "llama-3-8b", **asked}
        environment = {"date": day, "machine": {"gpus": ["NVIDIA H200"]}, "versions": {"vllm": "0.26.0"}}
        return {"command": "bench serving", "settings": settings, "environment": environment, "result": {"rows": rows}}

    write(
        tmp_path,
        a=served("2026-01-01", 9.0, kv_cache_dtype="fp8"),
        b=served("2026-01-02", 8.0),
        c=served("2026-01-03", 7.0, kv_layout="NHD"),  # as `auto`, and later
        d=served("2026-01-04", 6.0, kv_layout="HND"),
    )
    [row] = [line for line in front_table.lines(read(tmp_path)) if "vLLM" in line]
    assert row.startswith("| vLLM 0.26, decode: Llama-3-8B's shape, 4 x 128K | 20.00 ms | 7.00 ms |")
    assert "vLLM 0.26, decode, HND pages | Llama-3-8B's shape | 4 x 128K | 20.00 ms | 6.00 ms" in render(tmp_path)


def test_rounds_yield_what_they_did_on_a_real_model(tmp_path):
    case = {"part": "rounds", "batch": 1, "context": 4096, "drafts": 8, "refresh": 8, "full_ms": 16.0, "round_ms": 32.0,
            "gained": 2.0, "ms_per_token": 16.0, "speedup": 1.0}  # fmt: skip
    rounds = [{**case, "weights": "model"}, {**case, "weights": "float8"}, {**case, "refresh": 1}]
    real = [{"part": "real", "way": way, "batch": 2, "context": context, "tokens": 64, "tokens_per_second": 100.0,
             "tokens_per_round": yielded} for way, context, yielded in (
                 ("full", 300, 1.0), ("8, selected every 8", 300, 8.0), ("8, selected every 8", 200, 7.0),
                 ("auto, selected every 8", 400, 3.0), ("8, selected every 8, 8-bit drafts", 300, 6.4))]  # fmt: skip
    write(
        tmp_path,
        a={"command": "bench lossless", "settings": {"budget_tokens": 64}, "result": {"rows": rounds}},
        b={"command": "bench lossless", "settings": {"budget_tokens": 64, "model": "m"}, "result": {"rows": real}},
        c={"command": "bench lossless", "settings": {"budget_tokens": 32}, "result": {"rows": rounds[:1]}},
    )
    text = render(tmp_path)
    every = part(text, "## How fast").replace("SmolLM2-135M | 1 x 4K | ", "")
    assert (
        "(8 drafts, reselect every 8 tokens; assumes the 8 tokens per round of m) | 16.00 ms | 4.00 ms | 4.00x" in every
    )
    assert (
        "with 8-bit weights, reselect every 8 tokens; assumes the 6.4 tokens per round of m) | 16.00 ms | 5.00" in every
    )
    assert "(8 drafts, reselect every token; assumes 2 tokens per round) | 16.00 ms | 16.00 ms" in every
    assert "(8 drafts, reselect every 8 tokens; assumes 2 tokens per round) | 16.00 ms | 16.00 ms" in every  # budget 32
    assert "that `yield of` names" in part(text, "### a: bench lossless")
    assert "that `yield of` names" not in part(text, "### c: bench lossless")


def test_memory_by_store(tmp_path):
    rows = [{"batch": 1, "context": 131072, "store_percent": percent, "bytes_on_gpu": size, "ms": ms}
            for percent, size, ms in ((None, 16e9, 5.0), (100, 1.6e9, 6.0), (200, 2e9, 4.0), (300, 3.2e9, 4.5))
            ]  # fmt: skip
    write(tmp_path, m={"command": "bench memory", "settings": {"tokens": 64}, "result": {"rows": rows}})
    text = part(render(tmp_path), "## How much memory").partition("<details>")[0]
    assert "a store of 100% of a selection | SmolLM2-135M | 1 x 128K | 16.00 GB | 1.60 GB | 10.0% | 5.00, 6.00" in text
    assert "a store of 300% of a selection" in text
    assert "a store of 200% of a selection" not in text  # folded


def test_memory_of_steps_that_do_not_fit_elsewhere(tmp_path):
    def row(cache, batch, ms, near, far=0.0, percent=None):
        return {"part": "steps", "cache": cache, "batch": batch, "context": 131072, "budget_tokens": 4096, "ms": ms,
                "bytes_on_gpu": near, "bytes_on_host": far, "store_percent": percent}  # fmt: skip

    rows = [
        row("resident", 1, 5.0, 16e9), row("host", 1, 5.5, 2e9, 16e9, 200), row("full", 1, 8.0, 16e9),
        row("host", 6, 12.5, 12e9, 96e9, 200),
        {"part": "steps", "cache": "host", "batch": 1, "context": 1 << 20, "left_out": "too much"},
        {"part": "prefill", "cache": "resident", "batch": 1, "context": 131072, "prefill_seconds": 12.0},
        {"part": "prefill", "cache": "host", "batch": 1, "context": 131072, "prefill_seconds": 12.5},
    ]  # fmt: skip
    write(tmp_path, m={"command": "bench memory", "settings": {"steps": 60}, "result": {"rows": rows}})
    text = part(render(tmp_path), "## How much memory")
    alone, six = "1 x 128K | 16.00 GB | 2.00 GB | 12.5% | 5.00, 5.50", "6 x 128K | 96.00 GB | 12.00 GB | 12.5%"
    assert f"a store of 200% of a selection of 4096 tokens | SmolLM2-135M | {alone} |  | 60 |" in text
    assert f"{six} | does not fit, 12.50 |" in text
    assert "a store of 200%, 5.50 ms (resident: 5.00)." in text


@pytest.mark.parametrize("error", [0.01, None])
def test_pictures_are_the_same_every_time(tmp_path, error):
    pytest.importorskip("matplotlib")
    by_budget = {
        kind: {f"{name} {i}": score(name, 0.1 / i, i, kl_error=error) for name in ("hybrid", "quest") for i in (1, 2)}
        for kind in "ab"
    }
    equal = {"a": {name: score(name, 0.1, 1, kl_error=error) for name in ("full", "hybrid", "quest")}}
    write(
        tmp_path,
        f={"result": {"cells": by_budget}},
        equal={"result": {"cells": equal}},
        other={"result": {"rows": []}},
    )
    pictures = []
    for _ in range(2):
        paths = draw(tmp_path)
        pictures.append([path.read_bytes() for path in paths])
    assert [path.name for path in paths] == ["equal.png", "f.png"]
    assert pictures[0] == pictures[1]
    assert min(map(len, pictures[0])) > 5_000
    assert f"]({tmp_path.name}/f.png)" in part(render(tmp_path), "### f: f")


def test_pictures_of_speed(tmp_path):
    pytest.importorskip("matplotlib")
    operations = [{"op": op, "bytes": 10**7, "ms": 0.01, "share": 0.5, "batch": 1, "context": 4096}
                  for op in ("full, ours", "full, sdpa", "attend")]  # fmt: skip
    steps = [step(form, 1, context, 100, 1.0) for form in ("full", "hybrid") for context in (4096, 8192)]
    machine = {"environment": {"machine": {"gpus": ["NVIDIA H200"]}}}
    equal = {"7 tokens of prose, 1 passkey": {name: score(name, 0.1, 1) for name in ("hybrid", "quest")}}
    write(
        tmp_path,
        ops={"result": {"read_tb_s": 4.0, "rows": operations}},
        step={"command": "bench step", "settings": {"model": "llama-3-8b"}, "result": {"rows": steps}, **machine},
        dot={"command": "bench step", "settings": {"model": "qwen3-8b"}, "result": {"rows": steps[::2]}},
        elsewhere={"result": {"read_tb_s": None, "rows": operations}},
        peers={"settings": {"match_bytes": True}, "result": {"cells": equal}},
    )
    assert [path.name for path in draw(tmp_path)] == ["front.png", "ms-llama-3-8b-1x-h200.png", "ops.png", "peers.png"]
    assert "ms-llama-3-8b-1x-h200.png)" in part(render(tmp_path), "## Pictures")


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder, a={"result": {"rows": [{"op": "scan", "ms": 2}]}})
    done = subprocess.run([sys.executable, "-m", "experiments.report", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| scan | 2 |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("experiments.report", run_name="__main__")
    assert left.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


def test_long_files_begin_with_an_overview(tmp_path):
    cells = {
        "short": {"full": score("full", 0, 9), "hybrid": score("hybrid", 0.01, 3), "quest": score("quest", 0.02, 3)},
        "long": {"hybrid": score("hybrid", 0.01, 3), "quest": score("quest", 0.08, 3), "duo": {"left_out": "Why."}},
    }
    write(tmp_path, f={"result": {"cells": cells}})
    text = part(render(tmp_path), "### f: f")
    assert "| quest | 0.02 | 0.08 | 4 |" in text  # the geometric mean of 2 and 8
    assert "| duo |  |  |  |" in text
    assert text.index("geometric mean") < text.index("<summary>All numbers</summary>")


def test_texts_that_should_be_equal_are_counted(tmp_path):
    row = {"part": "exact", "dtype": "bfloat16", "way": "8", "weights": "float8", "budget_tokens": 64, "case": "greedy"}
    row |= {
        "tokens": [50, 30],
        "same": [50, 7],
        "in_the_shape_of_the_pass": [True, True],
        "tie_token": [7],
        "wrong": [],
    }
    other = {**row, "case": "seed 1", "same": [50, 30], "tie_token": [], "in_the_shape_of_the_pass": [True, False]}
    other |= {"wrong": ["seed 1: sequence 1 is not full attention's in the shape of the pass"]}
    write(tmp_path, texts={"command": "bench lossless", "settings": {}, "result": {"rows": [row, other]}})
    shown = part(render(tmp_path), "### texts: bench lossless")
    assert "| bfloat16, 8 drafts with 8-bit weights, budget 64 | 2 | 160 | 3 of 4 | 1 | 3 of 4 | 1 |" in shown
