"""Records of files as the world writes them."""

import csv
import json
import random

import pytest

from lycheedecode.prompts.records import RecordsError, read_records
from lycheedecode.prompts.text import load_text

RECORDS = [{"text": "one\u2028line", "n": 1}, {"text": 'two, "quoted"', "n": 2}]


def read(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return list(read_records(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", " \n"])
def test_json_of_any_name_and_line_end(tmp_path, name, encoding, end):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    assert "\u2028" in lines[0]
    assert read(tmp_path / name, end.join(lines) + end, encoding) == RECORDS
    assert read(tmp_path / name, end + end.join(lines), encoding) == RECORDS
    assert read(tmp_path / name, lines[0], encoding) == RECORDS[:1]
    listed = json.dumps(RECORDS, indent=1, ensure_ascii=False).replace("\n", end)
    assert read(tmp_path / name, listed, encoding) == RECORDS
    assert read(tmp_path / name, json.dumps({"version": 1, "data": RECORDS}), encoding) == RECORDS


def test_json_texts_one_after_the_other(tmp_path):
    pretty = "\n".join(json.dumps(record, indent=2) for record in RECORDS)
    assert read(tmp_path / "a.json", pretty) == RECORDS
    assert read(tmp_path / "a.jsonl", "\r".join(map(json.dumps, RECORDS))) == RECORDS


@pytest.mark.parametrize(("separator", "name"), [(",", "a.csv"), (";", "a.csv"), ("\t", "a.tsv"), ("\t", "A.CSV")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv(tmp_path, separator, name, end):
    path = tmp_path / name
    rows = [["id", "the text"], ["1", f'a{separator} "b"\nsecond line'], ["2", "x" * 300_000]]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator, lineterminator=end).writerows(rows)
    limit = csv.field_size_limit()
    assert list(read_records(path)) == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert csv.field_size_limit() == limit  # it is the process's


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\nnot json\n', r"not valid JSON \(line 3: "),
        ("a.jsonl", b'\n{"a": 1\n{"a": 2}', r"not valid JSON \(line 3: "),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2 is a list, not a record"),
        ("a.json", b'[{"a": 1}, null]', "record 2 is null, not a record"),
        ("a.json", b"[]", "no records"),
        ("a.json", b" \n ", "no records"),
        ("a.json", b"\xff{}", "not UTF-8"),
        ("a.json", b"\xff\xfe\x00", "not UTF-8"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"a": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        ("a.jsonl", b'{"a": "\\ud83d"}', "half a surrogate pair"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3 has 1 fields, the header 2"),
        ("a.csv", b'a,b\n1,2,"3"\n', "line 2 has 3 fields"),
        ("a.csv", b"\n1,2\n", "no header"),
        ("a.csv", b"", "no header"),
        ("missing.csv", None, "There is no file"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordsError, match=message) as error:
        list(read_records(tmp_path / name))
    assert "\n" not in str(error.value)


def test_damaged_files_are_refused_or_read(tmp_path):
    """Bytes changed, lost and doubled: records or one sentence."""
    rng = random.Random(0)
    whole = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS * 3).encode()
    pieces = [b"", b'"', b"\n", b"\\", b"\xe2", b"{", b"\0", b"[", b","]
    for turn in range(500):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(content))
            content[at : at + rng.randrange(3)] = rng.choice(pieces)
        path = tmp_path / ("a.jsonl", "a.json", "a.csv", "a.tsv")[turn % 4]
        path.write_bytes(bytes(content))
        try:
            said = [isinstance(record, dict) for record in read_records(path)]
        except RecordsError as error:
            said = ["\n" not in str(error)]
        assert all(said), turn


def test_columns_of_text(tmp_path):
    path = tmp_path / "a.json"
    words = "many words of text " * 30
    path.write_text("".join(json.dumps({"context": words + str(i % 2), "n": [i]}) + "\n" for i in range(4)))
    assert load_text(f"{path}:context").count("many") == 60  # the documents of several questions are there once
    with pytest.raises(ValueError, match=r"no column 'body' \(it has context, n\)"):
        load_text(f"{path}:body")
    with pytest.raises(ValueError, match="column 'n' holds list, not text"):
        load_text(f"{path}:n")
