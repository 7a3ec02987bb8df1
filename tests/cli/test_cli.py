"""The command line: what it prints and writes, and how it refuses."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from typer.testing import CliRunner

from lycheedecode import Engine, HeadPlan, HybridConfig
from lycheedecode.cli import COMMANDS, app, main
from lycheedecode.cli.report import Steps, quiet, show_table
from lycheedecode.errors import LycheeWarning, MismatchError
from lycheedecode.identify import IdentifySettings, pipeline
from lycheedecode.results import Result

runner = CliRunner()
PROMPT = "A prompt of some length, so that a small budget leaves something out. " * 3
BUDGET = ["--budget-tokens", "64", "--block-size", "16", "--sink-tokens", "4", "--recent-tokens", "8"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("plans") / "tiny.json"
    tiny.plan().save(path)
    return str(path)


@pytest.fixture
def base(model_folder) -> list[str]:
    return ["generate", "--model", model_folder, "--device", "cpu", "--dtype", "float32", "-n", "12", "--no-chat"]


def run(*arguments: str, **options):
    done = runner.invoke(app, list(arguments), **options)
    assert done.exit_code == 0, done.output
    return done


def refusal(*arguments: str, **options) -> str:
    """The one line on stderr of a call that must fail as bad input, before anything is printed."""
    done = runner.invoke(app, list(arguments), **options)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("Loading", "Reading", "Decoding"))]
    assert len(lines) == 1, lines
    assert lines[0].startswith("lycheedecode: ")
    return lines[0]


# ---------------------------------------------------------------------- the program


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "--version"),
        (["identify", "--help-all"], "--exchange-rounds"),
        (["evaluate", "fidelity", "--help"], "--match-bytes"),
        (["bench", "step", "--help"], "--contexts"),
    ],
    ids=" ".join,
)
def test_help_names_the_options(arguments, told):
    assert told in run(*arguments).stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name):
    assert COMMANDS[name] in " ".join(run(name, "--help").stdout.split())
    assert COMMANDS[name].split()[0] in run("--help").stdout


@pytest.mark.parametrize("name", ["generate", "identify", "memory", "evaluate fidelity", "evaluate tasks"])
def test_help_is_what_one_decides_in_brief_and_help_all_is_everything(name):
    assert len(run(*name.split(), "--help", env={"COLUMNS": "80"}).stdout.splitlines()) <= 60  # two screens
    brief, full = (run(*name.split(), option, env={"COLUMNS": "300"}).stdout for option in ("--help", "--help-all"))
    shown, known = (set(re.findall(r"^│ \*? *(--[a-z-]+)", text, re.MULTILINE)) for text in (brief, full))
    assert {"--model", "--json", "--budget-tokens", "--block-size", "--help-all"} <= shown
    assert shown < known
    assert "--completion-chunk" in known - shown
    assert "Small blocks are" in full
    assert "Small blocks are" not in brief


@pytest.mark.parametrize("name", ["ops", "step", "lossless", "memory", "generate", "serving"])
def test_help_of_a_benchmark_has_all_options_in_brief(name):
    brief, full = (run("bench", name, option, env={"COLUMNS": "300"}).stdout for option in ("--help", "--help-all"))
    shown, known = (re.findall(r"^│ (--[a-z-]+)", text, re.MULTILINE) for text in (brief, full))
    assert shown == known
    assert len("".join(brief.split())) < len("".join(full.split()))


def test_every_setting_has_an_option_with_help():
    text = run("identify", "--help-all", env={"COLUMNS": "300"}).stdout
    tables = {"config", "train_cells", "calibrate_cells", "texts", "completion_factors", "budget_scales"}
    for settings, left_out in ((HybridConfig, {"verify_every"}), (IdentifySettings, tables)):
        for name in set(settings.__dataclass_fields__) - left_out:
            flag = f"--{name.replace('_', '-')}"
            line = next(line for line in text.splitlines() if re.search(rf" {flag}[ ,]", line))
            assert len(line.strip(" │").split()) > 4, line


def test_version():
    assert run("--version").stdout.startswith("lycheedecode ")


def test_wrong_usage_takes_one_line():
    assert "'walk'" in refusal("walk")
    assert "did you mean generate?" in refusal("generat")
    assert "Did you mean 'step'?" in refusal("bench", "stp")
    assert "'PLAN'" in refusal("identify")
    assert "--budget" in refusal("generate", "--budget", "5", "x")
    assert "'--block-size'" in refusal("generate", "--block-size", "many", "x")
    assert "'--selection'" in refusal("generate", "--selection", "best", "x")


def test_a_fault_of_ours_shows_its_traceback(base, monkeypatch):
    """Even where it is a ValueError of our own code, or a file's that nobody named."""

    def fault(*_, **__):
        return list(zip([1], [], strict=True))

    monkeypatch.setattr("lycheedecode.cli.generate.load_model", fault)
    done = runner.invoke(app, [*base, "--full", "x"])
    assert done.exit_code == 70
    assert "Traceback" in done.stderr
    assert "ValueError: zip()" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lycheedecode: This is a fault of LycheeDecode")
    monkeypatch.setattr("lycheedecode.cli.generate.load_model", lambda *_, **__: Path("/nothing/here").read_text())
    assert runner.invoke(app, [*base, "--full", "x"]).exit_code == 70


def test_what_users_can_mend_takes_one_line(base, tmp_path, monkeypatch):
    def raising(error):
        def raises(*_, **__):
            raise error

        return raises

    load = "lycheedecode.cli.generate.load_model"
    monkeypatch.setattr(load, raising(torch.OutOfMemoryError("CUDA out of memory. Tried ...")))
    assert "The GPU's memory is full" in refusal(*base, "--full", "x")
    monkeypatch.setattr(load, raising(PermissionError(13, "Permission denied", str(tmp_path / "a" / "b"))))
    said = refusal(*base, "--full", "x", "--json", str(tmp_path / "a" / "b" / "c.json"))
    assert f"{str(tmp_path / 'a' / 'b')!r} cannot be used: Permission denied." in said
    monkeypatch.setattr(load, raising(MismatchError("They differ.")))
    done = runner.invoke(app, [*base, "--full", "x"])
    assert (done.exit_code, done.stderr) == (1, "lycheedecode: They differ.\n")


# ---------------------------------------------------------------------- generate


def test_generate_prints_what_the_engine_makes(base, model_folder, plan_file, tmp_path):
    out = tmp_path / "new" / "result.json"
    done = run(*base, "--plan", plan_file, *BUDGET, "--json", str(out), PROMPT)
    config = HybridConfig(budget_tokens=64, block_size=16, sink_tokens=4, recent_tokens=8)
    engine = Engine(tiny.model(), tiny.byte_tokenizer(), plan=tiny.plan(), config=config)
    [expected] = engine.generate(PROMPT, 12)
    assert done.stdout == f"{expected.text}\n"
    assert "tokens/s" in done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["command"] == "generate"
    assert report["settings"]["config"] == config.to_dict()
    assert report["result"]["token_ids"] == list(expected.token_ids)
    assert report["result"]["kv_bytes_per_token"] == expected.kv_bytes_per_token
    assert report["environment"]["machine"]["cores"] >= 1


def test_a_budget_that_covers_the_context_changes_nothing_and_says_so(base, plan_file):
    done = run(*base, "--plan", plan_file, PROMPT)
    assert done.stdout == run(*base, "--full", PROMPT).stdout
    assert "Nothing is sparse" in done.stderr
    assert "222 tokens" in done.stderr
    assert "Nothing is sparse" not in run(*base, "--plan", plan_file, *BUDGET, PROMPT).stderr


def test_standard_output_may_take_the_result_alone(base, plan_file):
    done = run(*base, "--plan", plan_file, *BUDGET, "--json", "-", PROMPT)
    assert json.loads(done.stdout)["result"]["text"] in done.stderr
    call = ["evaluate", "fidelity", *base[1:-3], "--plan", plan_file, "--prompts", "1", *BUDGET]
    done = run(*call, "--cells", "noise:300:passkey:1", "--policies", "hybrid", "--json", "-")
    assert json.loads(done.stdout)["command"] == "evaluate fidelity"
    assert "mean KL of the plan" in done.stderr
    assert json.loads(run("inspect", plan_file, "--json", "-").stdout)["command"] == "inspect"


def test_the_prompt_comes_from_wherever_it_is_given(base, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    expected = run(*base, "--full", PROMPT).stdout
    assert run(*base, "--full", input=PROMPT).stdout == expected
    assert run(*base, "--full", "--prompt-file", str(tmp_path / "prompt.txt")).stdout == expected
    assert run(*base, "--full", "--prompt-file", "-", input=PROMPT).stdout == expected


def test_sampling_with_a_seed_can_be_repeated(base):
    drawn = [*base, "--full", "--temperature", "5", "--top-p", "0.95", "--seed", "3", PROMPT]
    assert run(*drawn).stdout == run(*drawn).stdout


def test_chat_wraps_the_prompt(model_folder):
    common = ["generate", "--model", model_folder, "--device", "cpu", "--dtype", "float32", "-n", "12", "--full"]
    plain, chat = run(*common, "--no-chat", "Hello"), run(*common, "--chat", "Hello")
    assert plain.stdout != chat.stdout
    assert run(*common, "Hello").stdout == chat.stdout


def test_compare_shows_both(base, plan_file, tmp_path):
    done = run(*base, "--plan", plan_file, *BUDGET, "--compare", "full", "--json", str(tmp_path / "c.json"), PROMPT)
    assert "full attention" in done.stdout
    assert "top-1 agreement" in " ".join(done.stdout.split())
    result = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["result"]
    assert result["hybrid"]["kv_bytes_per_token"] < result["full"]["kv_bytes_per_token"]
    assert result["kl_mean"] > 0
    assert len(result["full"]["token_ids"]) == 12


@pytest.mark.parametrize("shown", ["compare", "html"])
def test_what_shows_answers_stops_at_the_models_positions_as_generation_does(base, plan_file, tmp_path, shown):
    call = [*base[:-3], "--no-chat", "-n", str(2**31 - 1), "--ignore-eos", "--plan", plan_file, *BUDGET]
    out = tmp_path / "shown.json"
    run(*call, *(["--compare", "full"] if shown == "compare" else ["--html", str(tmp_path / "a.html")]), "--json",
        str(out), "x" * 480)  # fmt: skip
    result = json.loads(out.read_text(encoding="utf-8"))["result"]
    tokens = result["full"]["token_ids"] if shown == "compare" else result["tokens"]
    assert len(tokens) == 512 - 480 + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "The prompt is empty"),
        (["  \n"], "The prompt is empty"),
        (["x" * 600], "The prompt has 600 tokens; the model has 512 positions"),
        (["x", "-n", "0"], "--max-new-tokens must be a whole number of at least 1, not 0"),
        (["x", "--budget-tokens", "0"], "budget_tokens must be a whole number of at least 1, not 0"),
        (["x", "--budget-ratio", "-0.5"], "budget_ratio must be in (0, 1]"),
        (["x", "--scan-keys", "int8"], "'--scan-keys': 'int8' is not one of 'cache', 'float8', 'int4'"),
        (["x", "--block-size", "24"], "block_size must be a power of two"),
        (["x", "--selection", "top_p"], "needs top_p"),
        (["x", "--temperature", "-1"], "temperature must be 0, which is greedy"),
        (["x", "--top-p", "2"], "top_p must be in (0, 1]"),
        (["x", "--compare", "full", "--temperature", "1"], "leave out --full, --stop and sampling options"),
        (["x", "--compare", "full", "-n", "1"], "--max-new-tokens must be a whole number of at least 2, not 1"),
        (["x", "--store-ratio", "nan"], "store_ratio must be at least 1, so that the store holds a whole selection"),
        (["x", "--full"], "--full decodes without a plan and a budget"),
        (["x", "--verify-every", "often"], "verify_every must be 'auto' or a whole number from 0 to 31, not 'often'"),
        (["x", "--verify-every", "40"], "verify_every must be 'auto' or a whole number from 0 to 31"),
        (["x", "--lossless", "--verify-every", "0"], "--verify-every must be at least 1, not 0"),
        (["x", "--lossless", "--compare", "full"], "--compare shows what hybrid attention changes"),
        (["x", "--lossless", "--correction-every", "8"], "leave out correction_every"),
        (["x", "--lossless", "--html", "page.html"], "leave out --lossless"),
        (["x", "--stop", ""], "Stop strings must not be empty"),
        (["x", "--prompt-file", "f"], "not both"),
        (["x", "--device", "toaster"], "is not a device"),
        (["x", "--dtype", "int4"], "dtype must be one of"),
    ],
)
def test_generate_refuses_in_one_sentence(base, plan_file, arguments, said):
    assert said in refusal(*base, "--plan", plan_file, *arguments)


def test_a_plan_with_budgets_of_heads_needs_one_budget_and_a_resident_cache(base, tmp_path, monkeypatch):
    plan = str(tmp_path / "plan.json")
    replace(tiny.plan(), budgets=((1.0, 2.0),) * 4).save(plan)
    call = [*base, "--plan", plan, *BUDGET, PROMPT]
    assert run(*call).stdout
    monkeypatch.setattr("lycheedecode.cli.generate.load_model", None)  # refused before the model is loaded
    assert "selection must be 'top_k', not 'ratio'" in refusal(*base, "--plan", plan, "--budget-ratio", "0.5", "x")
    assert "take a head plan without budgets of heads" in refusal(*call, "--cache", "host")


@pytest.mark.parametrize("drafts", [["--lossless"], ["--verify-every", "auto"], ["--verify-every", "3"]], ids=str)
def test_lossless_generation_is_full_attentions(base, plan_file, drafts, tmp_path):
    drawing = ["--temperature", "0.9", "--seed", "3", "-n", "30"]
    expected = run(*base, "--full", *drawing, PROMPT).stdout
    done = run(*base, "--plan", plan_file, *BUDGET, *drawing, *drafts, "--json", str(tmp_path / "out.json"), PROMPT)
    assert done.stdout == expected
    assert "rounds" in done.stderr
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["settings"]["config"]["verify_every"] == (3 if "3" in drafts else "auto")
    assert report["result"]["accepted"] <= report["result"]["drafted"]


def test_generate_refuses_files_it_cannot_use(base, model_folder, plan_file, tmp_path):
    name = Path(model_folder).name
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "is not UTF-8 text" in refusal(*base, "--full", "--prompt-file", str(tmp_path / "latin.txt"))
    assert "There is no file" in refusal(*base, "--full", "--prompt-file", str(tmp_path / "missing"))
    assert "cannot be read" in refusal(*base, "--full", "--prompt-file", str(tmp_path))
    assert "cannot be written" in refusal(*base, "--full", "--json", str(tmp_path), "x")
    assert "Standard input is not UTF-8" in refusal(*base, "--full", input=b"\xff\xfe")
    assert "no head plan file" in refusal(*base, "--plan", str(tmp_path / "missing.json"), "x")
    HeadPlan.all_retrieval(4, 3, model={"name": "other"}).save(tmp_path / "other.json")
    said = refusal(*base, "--plan", str(tmp_path / "other.json"), "x")
    assert "3 KV heads" in said
    said = refusal(*base, "x")
    assert f"`lycheedecode identify {name}-plan.json --model {model_folder}`" in said
    assert f"--plan {name}-plan.json" in said
    assert "--plan auto" in said
    typo = model_folder[:-1] + "_"
    for full in ([], ["--full"]):
        said = refusal("generate", "--model", typo, *full, "x")
        assert f"There is no model at {typo!r}: did you mean {model_folder!r}?" in said
    assert f"there is no folder {str(tmp_path / 'a')!r}" in refusal("identify", "p", "--model", f"{tmp_path}/a/b")
    assert "no head plan for 'somebody/model'" in refusal("generate", "-m", "somebody/model", "x")
    missing = str(tmp_path / "no-model")
    assert "There is no model at" in refusal("generate", "--model", missing, "--plan", plan_file, "x")
    Path(missing).mkdir()
    said = refusal("generate", "--model", missing, "--plan", plan_file, "x")
    assert "is not a whole model: it has no config.json" in said


def test_a_missing_extra_is_named(plan_file, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refusal("generate", "--model", str(tmp_path / "model.gguf"), "--plan", plan_file, "x")
    assert "pip install 'lycheedecode[gguf]'" in said


# ---------------------------------------------------------------------- identify

QUICK = [
    "--train", "noise:400:passkey:1", "--calibrate", "noise:400:passkey:1", "--calibrate-prompts", "2",
    "--batch-size", "1", "--roles", "gates", "--steps", "3", "--exchange-rounds", "1", *BUDGET,
]  # fmt: skip


def test_identify_writes_a_plan_that_generate_takes(base, model_folder, tmp_path):
    pytest.importorskip("matplotlib")
    names = ("plan.json", "report.json", "plan.png", "gates.png")
    out, report, picture, gates = (str(tmp_path / name) for name in names)
    chosen = ["--model", model_folder, "--device", "cpu", "--dtype", "float32", "--num-retrieval-heads", "4"]
    done = run("identify", out, *chosen, *QUICK, "--json", report, "--png", picture, "--gates-png", gates)
    plan = HeadPlan.load(out)
    assert len(plan.retrieval) == 4
    assert f"{out}: 4 of 4 x 2 KV heads retrieve" in done.stdout
    assert plan.provenance["settings"]["steps"] == 3
    assert plan.provenance["settings"]["config"]["budget_tokens"] == 64
    assert not (tmp_path / "plan.json.state").exists()
    result = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["result"]
    assert result["retrieval_heads"] == 4
    assert [state["step"] for state in result["history"]] == [1, 2, 3]
    assert len(result["history"][0]["gate_means"]) == 4
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    run(*base, "--plan", out, *BUDGET, PROMPT)


def test_identify_refuses_in_one_sentence(model_folder, tmp_path):
    out = str(tmp_path / "plan.json")
    call = ["identify", out, "--model", model_folder, "--device", "cpu", *QUICK]
    assert "is not TEXT:TOKENS:TASK:COUNT" in refusal(*call, "--train", "noise:many:passkey:1")
    assert "must be continuation, passkey or multi_hop" in refusal(*call, "--train", "noise:400:sums:1")
    assert "do not fit the model's 512 positions" in refusal(*call, "--train", "noise:4000:passkey:1")
    assert "There is no text file" in refusal(*call, "--train", "missing.txt:400:passkey:1")
    assert "steps must be at least 1" in refusal(*call, "--steps", "0")
    assert "num_retrieval_heads" in refusal(*call, "--num-retrieval-heads", "99")
    assert "head_budgets needs roles='sensitivity', not 'coverage'" in refusal(
        *call, "--roles", "coverage", *["--head-budgets"]
    )
    assert "add --roles gates" in refusal(*call, "--roles", "sensitivity", "--gates-png", str(tmp_path / "g.png"))


def test_an_interrupted_identification_goes_on_with_its_options(model_folder, tmp_path, monkeypatch):
    """Ctrl-C after any batch loses nothing that was measured."""
    out, measured, straight = tmp_path / "plan.json", [], tmp_path / "straight.json"
    call = ["--model", model_folder, "--device", "cpu", "--dtype", "float32", "--num-retrieval-heads", "4", *BUDGET]
    call += ["--calibrate", "noise:300:passkey:1", "--calibrate-prompts", "4", "--batch-size", "1", "--draws", "2"]
    run("identify", str(straight), *call)
    real = pipeline.measure_sensitivity

    def measure(*arguments):
        measured.append(arguments)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(pipeline, "measure_sensitivity", measure)
    interrupted = runner.invoke(app, ["identify", str(out), *call, "--resume"])  # nothing is there: it starts
    assert interrupted.exit_code == 130
    assert f"There is nothing to resume in {out}.state: this call begins anew." in interrupted.stderr
    assert f"{out}.state: --resume" in interrupted.stderr
    assert "add --resume" in refusal("identify", str(out), *call)
    said = "The interrupted call had another --draws (2, not 3)"
    assert said in refusal("identify", str(out), "--resume", "--draws", "3")
    assert "had no --train" in refusal("identify", str(out), "--resume", "--train", "noise:300:passkey:1")
    assert "nothing to resume" not in run("identify", str(out), "--resume", "--draws", "2").stderr
    assert len(measured) == 2 + 1 + 2
    assert HeadPlan.load(out).donors == HeadPlan.load(straight).donors
    assert not (tmp_path / "plan.json.state").exists()
    whole = out.read_bytes()
    again = run("identify", str(out), *call, "--resume")
    assert "is whole: 4 of 4 x 2 KV heads retrieve" in again.stderr
    assert "leave --resume out" in again.stderr
    assert (len(measured), out.read_bytes()) == (2 + 1 + 2, whole)
    out.write_text("{}", encoding="utf-8")
    assert "not a head plan (it has no 'donors')" in refusal("identify", str(out), *call, "--resume")


def test_what_happens_in_place_of_what_was_asked_for_is_said_once(model_folder, tmp_path):
    path = tmp_path / "plan.json"
    made = {"completion": {"chunk": 64, "budget_tokens": 1024}}
    replace(tiny.plan(), completion=((0.5, 0.5),) * tiny.LAYERS, provenance=made).save(path)
    call = ["--model", model_folder, "--device", "cpu", "--dtype", "float32", "-n", "3", "--no-chat", *BUDGET]
    done = run("generate", *call, "--plan", str(path), "--cache", "host", "A prompt. " * 20)
    said = (
        "lycheedecode: The head plan's completion was fitted for chunk = 64, not 128 and budget_tokens = 1024, not 64;"
    )
    assert done.stderr.count(said) == 1
    assert done.stderr.count("lycheedecode: Without a GPU the KV cache is in host memory anyway") == 1
    assert "UserWarning" not in done.stderr


def test_a_call_that_found_nothing_leaves_nothing_in_the_way(model_folder, tmp_path):
    short, out = tmp_path / "short.txt", tmp_path / "plan.json"
    short.write_text("A few words. " * 40, encoding="utf-8")
    call = ["identify", str(out), "--model", model_folder, "--device", "cpu", "--dtype", "float32", *BUDGET]
    said = refusal(*call, "--calibrate", f"{short}:400:continuation:8", "--calibrate-prompts", "1")
    assert "A prompt needs" in said
    assert "would fit" in said
    run(*call, "--calibrate", "noise:300:passkey:1", "--calibrate-prompts", "1", "--draws", "1")
    assert HeadPlan.load(out).retrieval


def test_options_replace_a_presets_budget_as_a_whole():
    from lycheedecode.cli.identify import _settings

    paper = _settings("paper", {"seed": 7}, {"block_size": 32}, None, None, None)
    assert (paper.seed, paper.donors, paper.config.budget_ratio) == (7, "same_index", 0.3)
    assert (paper.config.block_size, paper.config.retrieval_attention) == (32, "full")
    changed = _settings("paper", {}, {"budget_tokens": 1024}, "a.txt", ["noise:9:passkey:1"], None)
    assert (changed.config.selection, changed.config.budget_ratio) == ("top_k", None)
    assert [cell.text for cell in changed.train_cells] == ["noise"]
    assert (changed.texts, changed.calibrate_cells) == (("a.txt",), None)


# ---------------------------------------------------------------------- evaluate


def test_fidelity_measures_the_plan_and_its_controls(model_folder, plan_file, tmp_path):
    out = str(tmp_path / "fidelity.json")
    call = ["evaluate", "fidelity", "--model", model_folder, "--plan", plan_file, "--device", "cpu", "--json", out]
    call += ["--dtype", "float32", "--prompts", "2", *BUDGET, "--cells", "noise:400:passkey:1"]
    done = run(*call)
    assert "mean KL of the plan: " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    first = json.loads((tmp_path / "fidelity.json").read_text(encoding="utf-8"))
    [(cell, scores)] = Result.load(out).cells.items()
    assert cell == "400 tokens of noise, 1 passkey"
    assert list(scores) == list(first["result"]["overall"])
    assert scores.pop("full, other kernel")["kl_mean"] < 1e-6
    assert {"full", "hybrid", "paper", "same-index", "random", "own-topk"} == set(scores)
    assert first["settings"]["policies"] == list(scores)
    assert scores["full"]["kl_mean"] == 0
    assert scores["hybrid"]["kl_mean"] == first["result"]["kl_mean"] > 0
    assert scores["hybrid"]["kv_bytes_per_token"] < scores["full"]["kv_bytes_per_token"]

    begun = "There is nothing to resume in "
    resumed = run(*call, "--resume")
    assert resumed.stdout == done.stdout
    assert begun not in done.stderr + resumed.stderr
    (tmp_path / "fidelity.json").rename(tmp_path / "kept.json")
    anew = run(*call, "--resume")
    assert f"{begun}{out}: this call begins anew." in anew.stderr
    assert anew.stdout == done.stdout
    (tmp_path / "kept.json").rename(out)
    again = ["evaluate", "fidelity", "--json", out, "--resume"]
    assert run(*again).stdout == done.stdout  # with the options of the first call
    said = "The interrupted call had another --seed (0, not 1): leave it out, or start again without --resume."
    assert said in refusal(*again, "--seed", "1")
    said = f"{out!r} holds a result of 'evaluate fidelity', not of 'evaluate tasks': name another file."
    assert said in refusal("evaluate", "tasks", "--json", out, "--resume")
    assert "--cells (noise:400:passkey:1, not" in refusal(*again, "--cells", "noise:300:passkey:1")
    network = tiny.model()
    network.lm_head.weight.mul_(2)
    network.save_pretrained(model_folder)
    try:
        assert "weights differ" in refusal(*again)
    finally:
        tiny.model().save_pretrained(model_folder)
    tiny.plan(sliding=(1,)).save(plan_file)
    try:
        assert "was made with another plan (tiny)" in refusal(*again)
    finally:
        tiny.plan().save(plan_file)
    few = [*call, "--policies", "hybrid"]
    assert runner.invoke(app, [*few, "--max-kl", "1000"]).exit_code == 0
    done = runner.invoke(app, [*few, "--max-kl", "1e-9"])
    assert done.exit_code == 1
    assert "exceeds 1e-09" in done.stderr
    assert json.loads((tmp_path / "fidelity.json").read_text(encoding="utf-8"))["result"]["faithful"] is False


def test_fidelity_sweeps_budgets_block_sizes_and_plans(model_folder, plan_file, tmp_path):
    HeadPlan.all_retrieval(tiny.LAYERS, tiny.KV_HEADS).save(tmp_path / "all.json")
    out, every = tmp_path / "fidelity.json", str(tmp_path / "all.json")
    call = ["evaluate", "fidelity", "--model", model_folder, "--plan", plan_file, "--plan", every, "--device", "cpu"]
    call += ["--dtype", "float32", "--prompts", "1", "--sink-tokens", "4", "--recent-tokens", "8", "--json", str(out)]
    done = run(
        *call, "--cells", "noise:300:passkey:1", "--cells", "noise:300:long:6", "--policies",
        "hybrid,full+correction,tidaldecode,streaming", "--budgets", "64,128", "--block-sizes", "8,16",
    )  # fmt: skip
    assert "all kinds of prompts" in done.stdout
    result = json.loads(out.read_text(encoding="utf-8"))["result"]
    passkey, long = Result.load(out).cells.values()
    assert list(passkey) == list(long) == list(result["overall"])
    kinds = [score["policy"] for score in passkey.values()]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == {
        "full": 1, "rounding": 1, "hybrid": 8, "full+correction": 1, "tidaldecode": 2, "streaming": 4
    }  # fmt: skip
    label = "hybrid, plan all, 64 tokens, blocks of 8"
    assert [passkey[label][name] for name in ("retrieval_heads", "budget_tokens", "block_size")] == [8, 64, 8]
    assert long[label]["exact_match"] is None
    assert long["full"]["first_divergence"] == 6
    assert len(long[label]["by_position"]) == 2


def test_fidelity_matches_bytes_or_says_why_not(model_folder, plan_file, tmp_path):
    out = tmp_path / "fidelity.json"
    done = run(
        "evaluate", "fidelity", "--model", model_folder, "--plan", plan_file, "--device", "cpu", "--dtype", "float32",
        "--prompts", "1", *BUDGET, "--cells", "noise:400:long:4", "--policies", "hybrid,streaming,duo", "--match-bytes",
        "--json", str(out),
    )  # fmt: skip
    assert "duo is left out" in " ".join(done.stderr.split())
    result = json.loads(out.read_text(encoding="utf-8"))["result"]
    [scores] = Result.load(out).cells.values()
    assert scores["hybrid"]["budget_tokens"] == 64 < scores["streaming"]["budget_tokens"]
    assert scores["streaming"]["kv_bytes_per_token"] == pytest.approx(scores["hybrid"]["kv_bytes_per_token"], rel=0.1)
    assert list(result["overall"]) == ["full", "full, other kernel", "hybrid", "streaming"]


def test_fidelity_refuses_in_one_sentence(model_folder, plan_file, tmp_path):
    call = ["evaluate", "fidelity", "--model", model_folder, "--plan", plan_file]
    assert "There is no policy 'qest': did you mean quest" in refusal(*call, "--policies", "hybrid,qest")
    assert "--budgets must be whole numbers" in refusal(*call, "--budgets", "128,many")
    assert "Give --budget-tokens or several" in refusal(*call, "--budgets", "128", "--budget-tokens", "128")
    assert "block_size must be a power of two" in refusal(*call, "--block-sizes", "16,24")
    assert "with at least 2 tokens" in refusal(*call, "--cells", "noise:300:long:1")
    assert "do not fit the model's 512 positions" in refusal(*call, "--cells", "noise:300:long:300", "--device", "cpu")
    assert "is about hybrid" in refusal(*call, "--policies", "quest", "--max-kl", "1")
    for unreachable in ("nan", "-1"):
        assert "--max-kl must be at least 0, not " in refusal(*call, "--max-kl", unreachable)
    assert "needs a budget" in refusal(*call, "--match-bytes", "--selection", "top_p", "--top-p", "0.9")
    for wrong in ("-1", "nan", "1e-30"):
        assert "--temperature must be 0, which is greedy, or from" in refusal(*call, "--temperature", wrong)
    assert "--resume needs --json FILE" in refusal(*call, "--resume")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    assert "is not a result file" in refusal(*call, "--resume", "--json", str(tmp_path / "other.json"))
    assert "--prompts must be a whole number of at least 1" in refusal(*call, "--prompts", "0")
    assert "is not TEXT:TOKENS:TASK:COUNT" in refusal(*call, "--cells", "noise")


def test_wide_tables_come_in_parts_and_names_are_kept(capsys):
    headings = ["", *(f"number\n{i}" for i in range(12))]
    rows = [[f"a policy with a long name, {i}", *("1234.5678" for _ in range(12))] for i in range(2)]
    show_table(Console(width=80), "What was found", headings, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("1234.5678") for line in lines) == 24
    titles = [line for line in lines if line.startswith("What was found")]
    assert titles == ["What was found", *["What was found (more columns)"] * (len(titles) - 1)]
    assert len(titles) == sum("a policy with a long" in line for line in lines) // 2 > 1


def test_progress_says_how_long_the_rest_takes(capsys, monkeypatch):
    clock = iter([0.0, 100.0, 130.0, 131.0, 200.0, *range(201, 260)])
    monkeypatch.setattr("lycheedecode.cli.report.time.perf_counter", lambda: next(clock))
    with Steps("measure") as steps:
        steps.show("measure", 1, 11)
        steps.show("measure", 2, 11, "score 0.5")
        steps.show("measure", 11, 11)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["measure: 1 of 11", "measure: 11 of 11"]
    assert lines[0].endswith("5 min left")


def test_what_came_before_a_stage_does_not_count(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 500.0, 502.0, *range(503, 560)])
    monkeypatch.setattr("lycheedecode.cli.report.time.perf_counter", lambda: next(clock))
    with Steps("answer") as steps:
        steps.show("look", 0, 41)
        steps.show("look", 1, 41)
    assert capsys.readouterr().err.splitlines() == ["look: 1 of 41, 80 s left"]


def test_what_the_harness_refuses_is_one_sentence(monkeypatch):
    main = pytest.importorskip("lm_eval.__main__", reason="lm-evaluation-harness is not installed.")
    refuses = {"__name__": "lm_eval.config"}
    exec("def cli_evaluate():\n    raise ValueError('Tasks not found: nope')", refuses)
    monkeypatch.setattr(main, "cli_evaluate", refuses["cli_evaluate"])
    said = refusal("evaluate", "harness", "run", "--tasks", "nope")
    assert said.endswith("lm-evaluation-harness cannot do this: Tasks not found: nope.")
    refuses["__name__"] = "elsewhere"
    assert runner.invoke(app, ["evaluate", "harness", "run"]).exit_code == 70


def test_what_the_hub_tries_again_is_shown_on_request_alone():
    hub = logging.getLogger("huggingface_hub.utils._http")
    before = hub.getEffectiveLevel()
    with quiet(verbose=False):
        assert hub.getEffectiveLevel() == logging.ERROR
    assert hub.getEffectiveLevel() == before < logging.ERROR
    with quiet(verbose=True):
        assert hub.getEffectiveLevel() == before


def test_the_harness_knows_the_model_class():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed.")
    from lm_eval.api.registry import get_model

    before = list(sys.argv)
    done = runner.invoke(app, ["evaluate", "harness", "ls", "--help"])
    assert done.exit_code == 0, done.output
    assert get_model("lycheedecode").__name__ == "LycheeLM"
    assert sys.argv == before


# ---------------------------------------------------------------------- bench


def test_bench_hands_its_options_on(tmp_path):
    run("bench", "ops", "--smoke", "--json", str(tmp_path / "ops.json"))
    assert json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))["command"] == "bench ops"
    assert runner.invoke(app, ["bench", "ops", "--nothing"]).exit_code == 2


# ---------------------------------------------------------------------- as a process


def start(*arguments: str) -> subprocess.Popen:
    """The program, which can be interrupted even where these tests run in the background of a shell."""
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    return subprocess.Popen(
        [sys.executable, "-c", f"{script}; from lycheedecode.cli import main; main()", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_program_ends_with_status_and_one_line(base, plan_file, tmp_path, monkeypatch, capsys):
    call = ["lycheedecode", *base, "--plan", plan_file, "--prompt-file", str(tmp_path / "missing")]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"lycheedecode: There is no file {str(tmp_path / 'missing')!r}.\n")


def test_libraries_stay_silent_unless_asked(base):
    process = start(*base, "--full", "Hello")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.endswith("\n")
    lines = [line for line in errors.splitlines() if not line.endswith((" ...", " s"))]
    assert len(lines) == 1, errors
    assert "tokens/s" in lines[0]


def wait_until_idle(process: subprocess.Popen) -> None:
    """Until it has worked, and then used no processor for a second; packages that are imported may swallow a signal."""
    used, since, deadline = 0, time.monotonic(), time.monotonic() + 120
    while used < 100 or time.monotonic() - since < 1:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
        ticks = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        if ticks != used:
            used, since = ticks, time.monotonic()


def test_an_interrupted_process_says_so(base):
    process = start(*base, "--full")  # waits for its prompt on standard input
    wait_until_idle(process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (out, errors) == ("", "lycheedecode: interrupted.\n")


def test_generate_from_host_memory(base, plan_file, tmp_path):
    """The same tokens; the result says where the cache lies."""
    outs = []
    for place in ("resident", "host"):
        path = tmp_path / f"{place}.json"
        done = run(*base, "--plan", plan_file, *BUDGET, "--cache", place, "--json", str(path), PROMPT)
        outs.append(json.loads(path.read_text(encoding="utf-8")))
        assert ("in host memory" in done.stderr) == (place == "host")
        warned = (
            "lycheedecode: Without a GPU the KV cache is in host memory anyway: cache='host' works, but gains nothing."
        )
        assert done.stderr.splitlines().count(warned) == (place == "host" and not torch.cuda.is_available())
    resident, host = (out["result"] for out in outs)
    assert host["token_ids"] == resident["token_ids"]
    assert host["bytes_on_host"] == resident["bytes_on_gpu"] > 0
    assert outs[1]["settings"]["cache"] == "host"


def test_what_host_memory_does_not_go_with(base, plan_file):
    sentence = refusal(*base, "--cache", "host", "--full", PROMPT)
    assert "--cache is for hybrid decoding alone" in sentence
    sentence = refusal(*base, "--plan", plan_file, "--cache", "host", "--store-ratio", "0.5", PROMPT)
    assert "store_ratio must be at least 1" in sentence
    sentence = refusal(*base, "--plan", plan_file, "--cache", "host", "--lossless", PROMPT)
    assert "verify_every reads the whole cache" in sentence


def test_warnings_of_libraries_are_not_ours(capsys):
    with quiet(verbose=False):
        warnings.simplefilter("always")  # as some libraries do when they are imported
        warnings.warn("something of theirs", stacklevel=1)
        warnings.warn("something of ours", LycheeWarning, stacklevel=1)
    assert capsys.readouterr().err == "lycheedecode: something of ours\n"
