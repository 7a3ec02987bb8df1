"""What `views` shows of a plan, and the command that shows it."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from rich.console import Console
from test_plan import make_plan
from typer.testing import CliRunner

from lycheedecode import HeadPlan
from lycheedecode.cli import app
from lycheedecode.plan_views import caption, facts, families, how_it_was_made, page, png, table

runner = CliRunner()
DETAILS = {
    "model": {"name": "tiny<1>", "architecture": "LlamaForCausalLM"},
    "provenance": {
        "method": "identify",
        "settings": {"steps": 3, "cells": [{"text": "prose", "length": 9}], "x": None},
    },
}


@pytest.fixture
def plan() -> HeadPlan:
    means = [[0.0, 0.5, 1.0]] * 7
    return make_plan(3, gate_means=means, **DETAILS)


@pytest.fixture
def plan_file(plan, tmp_path) -> str:
    plan.save(tmp_path / "tiny.json")
    return str(tmp_path / "tiny.json")


def shown(plan: HeadPlan, **options) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table.render(plan, "tiny", **options))
    return console.file.getvalue()


def test_facts_count_what_there_is():
    plan = HeadPlan.from_donors([[(0, 0), (0, 0)], [(0, 0), (1, 1)], [(1, 1), (2, 1)]])
    assert facts(plan) == {
        "layers": 3,
        "kv_heads": 2,
        "retrieval_heads": 3,
        "sparse_heads": 3,
        "retrieval_share": 0.5,
        "scanning_layers": 3,
        "donors_of_same_layer": 1,
        "mean_layers_to_donor": 0.67,
        "largest_family": 2,
        "retrieval_heads_without_followers": 1,
    }
    budgeted = replace(plan, budgets=[[1, 0.25], [0.25, 4], [1, 1]])
    assert facts(budgeted) == {**facts(plan), "heads_by_budget": {"0.25": 2, "1": 3, "4": 1}}
    assert caption(budgeted) == f"{caption(plan)}; budgets of heads: 2 x 0.25, 3 x 1, 1 x 4"
    assert "layer 1, head 1\nretrieval head, donor of 1\n4 times the budget" in page.render(budgeted)


def test_families_are_a_partition_with_colours_of_their_own(plan):
    found = families(plan)
    members = [head for family in found for head in (family.donor, *family.followers)]
    assert sorted(members) == [(layer, head) for layer in range(7) for head in range(3)]
    assert len({family.colour for family in found}) == len(found)


def test_a_thousand_families_stay_apart():
    found = families(HeadPlan.all_retrieval(32, 8))
    assert len({family.colour for family in found}) > 250


def test_provenance_is_flattened(plan):
    model = {"model.name": "tiny<1>", "model.architecture": "LlamaForCausalLM"}
    lines = {"method": "identify", "settings.steps": "3", "settings.cells": "text prose, length 9"}
    assert dict(how_it_was_made(plan)) == model | lines


@pytest.mark.parametrize(("roles", "shows"), [("sensitivity", False), ("gates", True)])
def test_training_is_shown_where_gates_were_trained(plan, roles, shows):
    found = dict(how_it_was_made(replace(plan, provenance={"settings": {"roles": roles, "steps": 3, "seed": 0}})))
    assert found["settings.seed"] == "0"
    assert ("settings.steps" in found) == shows


def test_the_table_shows_roles_donors_and_provenance(plan):
    text = shown(plan)
    rows = [line.split() for line in text.splitlines() if re.match(r" *\d+ ", line)]
    rows = [row for row in rows if row[0].isdigit() and "of" not in row]
    assert len(rows) == 7
    for layer, row in enumerate(rows):
        expected = ["R" if d == (layer, h) else f"{d[0]}.{d[1]}" for h, d in enumerate(plan.donors[layer])]
        assert row[1:4] == expected
    assert "tiny<1>" in text
    assert "settings.steps" in text


def test_the_table_can_show_gate_means(plan):
    assert re.search(r"0\.00 +0\.50 +1\.00", shown(plan, gates=True))


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (30, 3), (36, 8)])
def test_the_page_is_well_formed_and_needs_nothing(layers, heads):
    plan = make_plan(1, layers, heads, **DETAILS)
    text = page.render(plan, "a & b")
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    body = text.partition("<!DOCTYPE html>\n")[2]
    body = re.sub(r"<meta[^>]*>", "", body)
    tree = ElementTree.fromstring(body)
    classes = [element.get("class") for element in tree.iter()]
    assert classes.count("cell") == layers * heads
    assert classes.count("family") == len(plan.retrieval)
    assert classes.count("link") == layers * heads - len(plan.retrieval)
    titles = [element.text for element in tree.iter("title")]
    assert len(titles) == layers * heads + 1
    assert titles[0] == "a & b: head plan for tiny<1>"


def test_shades_run_from_white_to_slate():
    assert page.shade(0.0) == page.shade(-1.0) == "#ffffff"
    assert page.shade(1.0) == page.shade(2.0) == "#5b6677"


def test_the_picture_is_a_png(plan, tmp_path):
    pytest.importorskip("matplotlib")
    png.save(plan, tmp_path / "plan.png", "tiny")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------- the command


def test_inspect_writes_all_it_is_asked_for(plan, plan_file, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new"
    done = runner.invoke(
        app, ["inspect", plan_file, "--png", f"{out}/a.png", "--html", f"{out}/a.html", "--json", f"{out}/a.json"]
    )
    assert done.exit_code == 0, done.output
    assert "KV heads retrieve" in done.stdout
    assert "<svg" in (out / "a.html").read_text(encoding="utf-8")
    assert (out / "a.png").stat().st_size > 1000
    report = json.loads((out / "a.json").read_text(encoding="utf-8"))
    assert report["command"] == "inspect"
    assert report["settings"] == {"plan": "tiny"}
    assert report["result"]["retrieval_heads"] == len(plan.retrieval)
    assert HeadPlan.from_json(report["result"]["plan"]) == plan
    assert report["environment"]["versions"]["torch"]
    assert {"machine", "versions", "commit"} <= set(report["environment"])


def refusal(*arguments: str) -> str:
    """The one line on stderr of a call that must fail as bad input."""
    done = runner.invoke(app, list(arguments))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("lycheedecode: ")
    return done.stderr


def test_inspect_refuses_what_it_cannot_show(plan_file, tmp_path, monkeypatch):
    assert "no head plan file" in refusal("inspect", "nothing-of-that-name")
    assert "cannot be written" in refusal("inspect", plan_file, "--json", str(tmp_path))
    assert "cannot be written" in refusal("inspect", plan_file, "--html", f"{plan_file}/below")
    (tmp_path / "no.json").write_text("{}", encoding="utf-8")
    assert "not a head plan" in refusal("inspect", str(tmp_path / "no.json"))
    make_plan().save(tmp_path / "plain.json")
    assert "no gate means" in refusal("inspect", str(tmp_path / "plain.json"), "--gates")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lycheedecode[plot]'" in refusal("inspect", plan_file, "--png", str(tmp_path / "a.png"))
