"""The study of continuations, from identification to a file of results, on a tiny model."""

import pytest
import tiny
import torch

from experiments import continuations
from lycheedecode import HeadPlan
from lycheedecode.results import Result

CELLS = {"identify": "code:200:continuation:6", "evaluate": "prose:220:continuation:6"}
SIZES = "--block-size 8 --draws 2 --identify-prompts 2 --batch-size 2 --evaluate-batch 2 --prompts 3"


@pytest.fixture
def study(monkeypatch, tmp_path, llama, byte_tokenizer):
    """Runs the command with some more words; its result."""
    monkeypatch.setattr(continuations, "load_model", lambda name, dtype: (llama, byte_tokenizer))
    monkeypatch.setattr(continuations.os, "sched_getaffinity", lambda process: {0})  # no processes for searches

    def run(*words: str) -> Result:
        path = tmp_path / "study.json"
        kinds = [word for name, cell in CELLS.items() for word in (f"--{name}", cell)]
        monkeypatch.setattr("sys.argv", ["study", "--json", str(path), *kinds, *SIZES.split(), *words])
        continuations.main()
        return Result.load(path)

    return run


def test_plans_are_found_and_compared_with_other_policies(study, tmp_path):
    found = study("--forms", "budget_tokens=64:4", "budget_tokens=256:3", "--plans", str(tmp_path))
    [scores] = found.cells.values()
    assert {score["prompts"] for score in scores.values()} == {3}
    assert {len(score["kl_of_prompts"]) for score in scores.values()} == {3}
    exact = {label for label, score in scores.items() if score["kl_mean"] < 1e-6}
    assert exact == {label for label in scores if "256" in label or "kernel" in label}
    assert {"budget_tokens=64-4", "budget_tokens=256-joined-4-coupling-0.2"} < set(scores)
    assert {"budget_tokens=64-4-uncompleted-paper", "budget_tokens=64-4-uncompleted-random"} < set(scores)
    assert len(HeadPlan.load(tmp_path / "budget_tokens=256-3.json").retrieval) == 3
    assert len(HeadPlan.load(tmp_path / "joined-4-coupling-0.2.json").retrieval) == 4


def test_a_coupling_is_chosen_on_prompts_that_are_not_evaluated(study, monkeypatch):
    texts = []
    makers_for = continuations.makers_for
    monkeypatch.setattr(continuations, "makers_for", lambda *given: texts.append(given[1:]) or makers_for(*given))
    found = study("--forms", "budget_tokens=64:3", "--few", "--couplings", "0", "1", "--choose-prompts", "2")
    rivals = found.summary["chosen_by"]
    assert set(rivals) == {"joined-3-coupling-0.0", "joined-3-coupling-1.0"}
    [scores] = found.cells.values()
    [kept] = [label for label in scores if "joined" in label]
    assert kept == f"budget_tokens=64-{min(rivals, key=rivals.__getitem__)}"
    assert [([cell.text for cell in cells], side) for cells, side in texts] == [
        (["code"], "identify"),
        (["prose"], "evaluate"),
    ]


def test_plans_of_before_need_no_search(study, monkeypatch, tmp_path):
    monkeypatch.setattr(continuations.Study, "find", lambda *_: 1 / 0)
    tiny.plan().save(tmp_path / "coder-1.5b.json")
    found = study("--forms", "budget_tokens=64", "--plan", str(tmp_path / "coder-1.5b.json"))
    [scores] = found.cells.values()
    assert set(scores) == {
        "full attention by another kernel", "budget_tokens=64-own", "budget_tokens=64-own-completed",
        "budget_tokens=64-plan-coder-1.5b",
    }  # fmt: skip


@pytest.mark.parametrize(("words", "rounds"), [((), True), (("--float32",), False)], ids=["as it is", "float32"])
def test_answers_in_float32_have_no_floor(study, monkeypatch, byte_tokenizer, words, rounds):
    coarse = tiny.model("llama", torch.bfloat16)
    monkeypatch.setattr(continuations, "load_model", lambda name, dtype: (coarse, byte_tokenizer))
    [scores] = study("--forms", "budget_tokens=64", *words).cells.values()
    assert (scores["full attention by another kernel"]["kl_mean"] > 1e-5) == rounds


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--forms", "budget"], "A form is NAME=VALUE,...:HEADS,... in whole numbers, not 'budget'."),
        (["--forms", "budget_tokens=abc:7"], "in whole numbers, not 'budget_tokens=abc:7'."),
        (["--forms", "budget_tokens=512:7,x"], "in whole numbers, not 'budget_tokens=512:7,x'."),
        (["--forms", "budget_token=512:7"], "budget_token"),
        (["--forms", "budget_tokens=0:7"], "budget_tokens must be a whole number of at least 1, not 0."),
        (["--identify", "code"], "A kind of prompts is SOURCE:TOKENS:TASK:ANSWER, not 'code'"),
        (["--evaluate", "code:many:continuation:64"], "not 'code:many:continuation:64'"),
    ],
)
def test_what_cannot_be_read_is_said_before_the_model_is_loaded(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(continuations, "load_model", None)
    monkeypatch.setattr("sys.argv", ["continuations", "--json", "x.json", *words])
    with pytest.raises(SystemExit) as ended:
        continuations.main()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
