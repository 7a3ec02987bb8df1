"""Result files: one writer, one reader; whoever resumes says what differs."""

import json
import math
from copy import deepcopy

import numpy as np
import pytest
import tiny

from lycheedecode import HeadPlan
from lycheedecode.errors import InputError, ResumeError
from lycheedecode.results import Result, digest, fingerprint, resume


def test_a_result_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "new" / "result.json"
    first = Result("bench x", {"batch": 1}, fingerprint={"model": {"name": "m"}}, options={"seed": 0})
    found = first.add([{"ms": np.float32(0.5)}], best="é").add([{"ms": 2}], best="b", notes=[])
    found.save(path)
    loaded = Result.load(path)
    assert (loaded.command, loaded.settings, loaded.options) == ("bench x", {"batch": 1}, {"seed": 0})
    assert loaded.rows == [{"ms": 0.5}, {"ms": 2}]
    assert loaded.summary == {"best": "b", "notes": []}
    assert loaded.fingerprint == {"model": {"name": "m"}}
    assert loaded.environment["machine"]["cores"] >= 1
    assert list(tmp_path.rglob("*.part")) == []


def test_files_do_not_say_where_files_lie(tmp_path):
    """Settings name them; options find them from where the result lies, and after both have moved."""
    known = {"texts": {str(tmp_path / "data" / "a.csv:text"): "0"}}
    settings = {"model": str(tmp_path / "models" / "m"), "plan": ["plans/own.json"]}
    options = {"plan": [str(tmp_path / "out" / "plans" / "p.json"), "q"], "data": tmp_path / "data"}
    path = tmp_path / "out" / "x.json"
    Result("x", settings, rows=[{"a": 1}], fingerprint=known, options=options).save(path)
    assert str(tmp_path) not in path.read_text()
    loaded = resume(path, "x", settings, known)
    assert loaded.settings == {"model": "m", "plan": ["plans/own.json"]}
    assert loaded.options == {"plan": [str(tmp_path / "out" / "plans" / "p.json"), "q"], "data": str(tmp_path / "data")}
    (tmp_path / "new").mkdir()
    moved = path.rename(tmp_path / "new" / "x.json")
    assert Result.load(moved).options["plan"] == [str(tmp_path / "new" / "plans" / "p.json"), "q"]


def test_what_is_no_number_is_null(tmp_path):
    rows = [{"kl": float("nan"), "speedup": math.inf, "error": np.float32("-inf"), "ms": 1e-3}]
    Result("bench", {}, rows=rows).save(path := tmp_path / "r.json")
    assert Result.load(path).rows == [{"kl": None, "speedup": None, "error": None, "ms": 1e-3}]
    assert not any(word in path.read_text(encoding="utf-8") for word in ("NaN", "Infinity"))


def test_standard_output_takes_a_result(capsys):
    Result("x", rows=[{"a": 1}]).save("-")
    assert json.loads(capsys.readouterr().out)["result"] == {"rows": [{"a": 1}]}


def test_files_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"what": "ways", "variants": {"x": {"kl_mean": 1}}}))
    study = Result.load(tmp_path / "study.json")
    assert (study.command, study.summary) == ("ways", {"variants": {"x": {"kl_mean": 1}}})
    (tmp_path / "plain.json").write_text(json.dumps({"result": {"rows": [{"a": 1}], "b": 2}}))
    plain = Result.load(tmp_path / "plain.json")
    assert (plain.command, plain.rows, plain.summary) == ("plain", [{"a": 1}], {"b": 2})


def test_scores_of_kinds_of_prompts_are_flat_rows(tmp_path):
    """As the first version wrote them, nested, they are read alike."""
    along = [{"first": 0, "last": 3, "kl_mean": 0.2}, {"first": 4, "last": 7, "kl_mean": 0.3}]
    cells = {
        "short": {"full": {"policy": "full", "kl_mean": 0.0, "by_position": []}, "duo": {"left_out": "Why."}},
        "long": {"hybrid, 64 tokens": {"policy": "hybrid", "kl_mean": 0.25, "by_position": along}},
    }
    (tmp_path / "old.json").write_text(json.dumps({"command": "evaluate fidelity", "result": {"cells": cells, "a": 1}}))
    old = Result.load(tmp_path / "old.json")
    Result("evaluate fidelity", summary={"a": 1}).with_cells(cells).save(tmp_path / "new.json")
    new = Result.load(tmp_path / "new.json")
    cells["short"]["full"].pop("by_position")
    assert new.cells == old.cells == cells
    assert new.rows[2] == {"kind": "long", "label": "hybrid, 64 tokens", "policy": "hybrid", "kl_mean": 0.25}
    assert new.summary["by_position"][1] == {"kind": "long", "label": "hybrid, 64 tokens", **along[1]}
    assert new.summary["a"] == old.summary["a"] == 1
    assert new.add(best=3).with_cells({"long": cells["long"]}).cells == {"long": cells["long"]}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"result": 3}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(InputError, match="is not a result file"):
        Result.load(tmp_path / "f.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="There is no result file"):
        Result.load(tmp_path / "f.json")
    with pytest.raises(InputError, match="cannot be read"):
        Result.load(tmp_path)


def test_fingerprints_tell_models_plans_and_texts_apart():
    model, plan = tiny.model(), tiny.plan()
    mine = fingerprint(model, {"p": plan}, {"prose": "text"})
    assert mine == fingerprint(tiny.model(), {"p": HeadPlan.from_donors(plan.donors)}, {"prose": "text"})
    assert mine["model"]["architecture"] == "LlamaForCausalLM"
    other = deepcopy(model)
    other.model.layers[2].self_attn.o_proj.weight.mul_(1.01)
    theirs = fingerprint(other)["model"]
    assert theirs["weights"] != mine["model"]["weights"]
    assert theirs["shape"] == mine["model"]["shape"]
    deep = tiny.model(num_hidden_layers=16)
    seen = {fingerprint(deep)["model"]["weights"]}
    for weight in deep.parameters():  # whichever of them a change is in, and if it is in every other column only
        weight[..., 1::2].mul_(1.01)
        seen.add(fingerprint(deep)["model"]["weights"])
    assert len(seen) == 1 + len(list(deep.parameters()))
    assert fingerprint(plans={"p": HeadPlan.all_retrieval(4, 2)})["plans"] != mine["plans"]
    assert fingerprint(texts={"prose": "other"})["texts"] != mine["texts"]
    assert digest(b"a") == digest("a") != digest(["a"])


KNOWN = {"model": {"name": "m", "weights": "1"}, "plans": {"p": "2"}, "texts": {"prose": "3"}}


@pytest.mark.parametrize(
    ("command", "settings", "known", "said"),
    [
        ("y", {"seed": 0}, KNOWN, "holds a result of 'x', not of 'y': name another file"),
        ("x", {"seed": 1}, KNOWN, r"another seed \(0 there, 1 here\): give the same, or name another file"),
        ("x", {"seed": 0, "new": {"a": 1}}, KNOWN, r"another new \(None there, {'a': 1} here\)"),
        ("x", {"seed": 0}, {**KNOWN, "model": {"name": "n"}}, r"another model \(name: 'm' there, 'n' here\)"),
        ("x", {"seed": 0}, {**KNOWN, "model": {"name": "m", "weights": "9"}}, r"another model \(its weights differ\)"),
        ("x", {"seed": 0}, {**KNOWN, "plans": {"p": "9"}}, r"another plan \(p\)"),
        ("x", {"seed": 0}, {**KNOWN, "texts": {"prose": "9"}}, r"another text \(prose\)"),
    ],
)
def test_what_resumes_says_what_differs(tmp_path, command, settings, known, said):
    path = tmp_path / "f.json"
    assert resume(path, "x", {"seed": 0}, KNOWN) is None
    Result("x", {"seed": 0}, rows=[{"a": 1}], fingerprint=KNOWN).save(path)
    assert resume(path, "x", {"seed": 0}, KNOWN).rows == [{"a": 1}]
    with pytest.raises(ResumeError, match=said):
        resume(path, command, settings, known)


def test_a_file_without_a_fingerprint_is_not_resumed(tmp_path):
    Result("x", {"seed": 0}).save(tmp_path / "f.json")
    with pytest.raises(ResumeError, match="does not say which model"):
        resume(tmp_path / "f.json", "x", {"seed": 0}, KNOWN)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_results_with_other_line_ends(tmp_path, end):
    path = tmp_path / "result.json"
    Result("evaluate tasks", rows=[{"a": 1}]).save(path)
    path.write_bytes(path.read_text(encoding="utf-8").replace("\n", end).encode("utf-8-sig"))
    assert Result.load(path).rows == [{"a": 1}]
