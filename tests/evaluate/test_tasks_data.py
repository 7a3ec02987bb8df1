"""Data sets as people have them on disk."""

import json

import pytest

from lycheedecode.evaluate.ruler.questions import read_hotpotqa
from lycheedecode.evaluate.tasks import catalogue
from lycheedecode.evaluate.tasks_data import DataError, find_records, texts

OURS = {"input": "Who?", "context": "Ann did.", "answers": ["Ann"], "all_classes": None}
ORIGINAL = {
    "_id": "1",
    "question": "Who?",
    "answer": "Ann",
    "supporting_facts": [["Ann", 0]],
    "context": [["Ann", ["Ann did. ", "Bob did not."]], ["Bob", ["Bob slept."]]],
}


@pytest.fixture(autouse=True)
def _nothing_kept():
    find_records.cache_clear()
    read_hotpotqa.cache_clear()


def longbench(folder, subset="hotpotqa"):
    return list(catalogue._longbench_data(subset, str(folder))["test"])


def dump(path, *records):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ("river", ["river"]),
        ('["a", "b"]', ["a", "b"]),
        ("['it\\'s', 'b']", ["it's", "b"]),
        ("[1] of them", ["[1] of them"]),
        ("[1]", ["[1]"]),
        (7, ["7"]),
        ([3, None], ["3"]),
        (None, []),
    ],
)
def test_answers_in_any_form(answers, expected):
    assert texts(answers) == expected


def test_longbench_answers_as_a_text(tmp_path):
    dump(tmp_path / "trec.json", {**OURS, "answers": "a river", "all_classes": '["a river", "a town"]'}, OURS)
    first, second = longbench(tmp_path, "trec")
    assert (first["answers"], first["all_classes"]) == (["a river"], ["a river", "a town"])
    assert (second["answers"], second["all_classes"], second["question"]) == (["Ann"], None, "Who?")


def test_longbench_as_a_table(tmp_path):
    (tmp_path / "hotpotqa.jsonl").write_bytes(
        json.dumps({**OURS, "context": "one\u2028line"}, ensure_ascii=False).encode("utf-8-sig") + b"\r\n"
    )
    assert longbench(tmp_path)[0]["context"] == "one\u2028line"


def test_hotpotqa_and_longbench_are_told_apart(tmp_path):
    dump(tmp_path / "hotpotqa.jsonl", ORIGINAL)
    with pytest.raises(DataError, match=r"HotpotQA's own rows .* qa_2"):
        longbench(tmp_path)
    [question] = read_hotpotqa(tmp_path).questions
    assert question.documents == ("Ann\nAnn did. Bob did not.", "Bob\nBob slept.")
    other = tmp_path / "other"
    other.mkdir()
    dump(other / "hotpotqa.jsonl", OURS)
    with pytest.raises(DataError, match=r"LongBench's rows.* longbench_hotpotqa"):
        read_hotpotqa(other)
    dump(other / "hotpotqa.json", ORIGINAL)  # both in one folder: each task takes its own
    assert read_hotpotqa(other).questions == (question,)
    assert longbench(other)[0]["answers"] == ["Ann"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input": "q", "context": "c"}], "its first record has no answers"),
        ([OURS, {"context": "c", "answers": []}], "record 2 lacks a context .* or answers"),
        ([OURS, {"context": ["c"], "answers": "a"}], "record 2 lacks a context"),
        ([1], "record 1 is a number, not a record"),
    ],
)
def test_what_longbench_cannot_be_made_of(tmp_path, rows, message):
    dump(tmp_path / "hotpotqa.jsonl", *rows)
    with pytest.raises(DataError, match=message):
        longbench(tmp_path)
