"""The documents say what is so: code runs, options exist, links lead somewhere, results are current."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from experiments import api, stages
from experiments.__main__ import TOOLS
from experiments.__main__ import app as experiments
from experiments.report import front_table, render
from lycheedecode import HeadPlan
from lycheedecode.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
        if anchor and not target.startswith("https://"):
            assert anchor in anchors((page.parent / target) if target else page), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links."""
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    for line in "".join(blocks(page, "")).splitlines():
        if not line.startswith("lycheedecode "):
            continue
        words = shlex.split(line, comments=True)
        command = words[1:3] if words[1] in ("evaluate", "bench") else words[1:2]
        said = help_of(*command)
        for option in [word for word in words if word.startswith("--")]:
            assert f"{option} " in said, line


def help_of(*command: str) -> str:
    """All options of a command."""
    wide = {"COLUMNS": "300"}
    done = CliRunner().invoke(app, [*command, "--help-all"], env=wide)
    if done.exit_code == 2:  # few enough for one help
        done = CliRunner().invoke(app, [*command, "--help"], env=wide)
    assert done.exit_code == 0, command
    return done.stdout


def test_options_named_in_the_text_exist():
    known = (
        "".join(
            help_of(*command.split())
            for command in (
                "generate",
                "identify",
                "inspect",
                "memory",
                "evaluate fidelity",
                "evaluate tasks",
                "bench step",
                "bench memory",
                "bench lossless",
                "bench serving",
            )
        )
        + "--only "  # of `python -m experiments.models_sweep`
        + CliRunner().invoke(experiments, ["serving-soak", "--help"], env={"COLUMNS": "300"}).stdout
    )
    for page in PAGES:
        for option in re.findall(r"`[^`\n]*?(--[a-z-]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            assert f"{option} " in known, f"{page.name}: {option}"


def test_modules_and_stages_exist():
    """`python -m experiments STAGE`, `python -m experiments.MODULE`, files of the package and of the tests."""
    tools = set(stages.STAGES) | set(TOOLS)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"python -m experiments ([a-z][a-z_-]*)", text):
            assert name in tools, f"{page.name}: {name}"
        for module in re.findall(r"python -m ((?:experiments|lycheedecode)\.[a-z_.]+[a-z])", text):
            assert find_spec(module), f"{page.name}: {module}"
        for path in re.findall(r"`((?:src|tests|docs|experiments|examples|findings)/[\w./-]*)`", text):
            assert (ROOT / path.replace("NAME.json", "")).exists() or page.name == "CHANGELOG.md", (
                f"{page.name}: {path}"
            )
        for path in re.findall(r"`([a-z_]+/[\w./]+\.py)`", text):
            assert any((ROOT / base / path).exists() for base in ("", "src/lycheedecode")), f"{page.name}: {path}"


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
    folder = ROOT / "docs" / "results"
    assert written == render(folder), "run: make results"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == front_table.with_table(readme, folder), "run: make results"


def test_every_picture_is_shown():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    hidden = [path.name for path in (ROOT / "docs").rglob("*.png") if f"/{path.name})" not in shown]
    assert hidden == []


def test_the_api_page_is_what_the_docstrings_say():
    assert api.PAGE.read_text(encoding="utf-8") == api.render(), "run: make api"
