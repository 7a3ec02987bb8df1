import csv
import json
import random

import pytest
from tokenizers.processors import TemplateProcessing

from lycheedecode.prompts import builtin
from lycheedecode.prompts.makers import Cell, PromptMaker, makers_for
from lycheedecode.prompts.text import TextError, load_side, load_text


@pytest.mark.parametrize("cell", [
    Cell("noise", 400, "passkey", 1), Cell("prose", 900, "passkey", 7), Cell("prose", 700, "multi_hop", 3),
])  # fmt: skip
def test_prompts_have_the_length_and_hold_the_answer(tokenizer, cell):
    makers = makers_for(tokenizer, [cell], "identify")
    for prompt in cell.make(makers, 5, random.Random(0)):
        assert len(prompt.prompt_ids) == cell.length
        text = tokenizer.decode(prompt.prompt_ids)
        assert len(prompt.expected) == cell.count
        assert prompt.is_solved_by(tokenizer.decode(prompt.answer_ids))
        assert prompt.is_solved_by(text)
        assert not prompt.is_solved_by(text.replace(prompt.expected[-1], ""))


def test_the_same_seed_gives_the_same_prompts(tokenizer):
    maker = PromptMaker(tokenizer, "prose")
    first, again, other = (maker.passkeys(500, 2, random.Random(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_evaluation_never_sees_the_filler_of_identification(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{i}" for i in range(4000)), encoding="utf-8")

    def words(split):
        maker, rng = PromptMaker(tokenizer, str(path), split), random.Random(0)
        texts = [tokenizer.decode(maker.passkeys(2000, 1, rng).prompt_ids) for _ in range(20)]
        return {word for text in texts for word in text.split() if word.startswith("word")}

    shared = words("identify") & words("evaluate")
    assert len(shared) <= 40  # pieces of words, cut where a window begins or a fact was put in


@pytest.mark.parametrize("text", ["code", "prose", "own"])
def test_a_continuation_is_the_text_that_follows(tokenizer, tmp_path, text):
    if text == "own":
        path = tmp_path / "own.txt"
        path.write_text("\n".join(f"line {i} of mine" for i in range(2000)), encoding="utf-8")
        text = str(path)
    cell = Cell(text, 1000, "continuation", 16)
    makers = makers_for(tokenizer, [cell], "identify")
    prompts = cell.make(makers, 4, random.Random(0))
    whole = "\n\n".join(load_side(text, "identify"))
    for prompt in prompts:
        assert (len(prompt.prompt_ids), len(prompt.answer_ids)) == (1000, 16)
        assert tokenizer.decode(prompt.prompt_ids + prompt.answer_ids) in whole
    assert len({prompt.prompt_ids for prompt in prompts}) == 4
    assert cell.make(makers, 4, random.Random(0)) == prompts


def test_continuations_begin_as_the_tokenizer_begins_a_text(byte_tokenizer):
    cell = Cell("prose", 300, "continuation", 8)

    def first(tokenizer):
        return cell.make(makers_for(tokenizer, [cell], "identify"), 1, random.Random(0))[0].prompt_ids

    without = first(byte_tokenizer)
    adding = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer, bos_token="<s>")
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    assert adding.bos_token_id not in without
    assert len(first(adding)) == 300
    assert [i for i, token in enumerate(first(adding)) if token == adding.bos_token_id] == [0]


def test_built_in_text_is_divided_by_documents():
    for documents in (builtin.prose(), builtin.code()):
        names = [name for name, _ in documents]
        assert len(set(names)) == len(names)
        sides = [
            [text for name, text in documents if builtin.is_for_evaluation(name) is side] for side in (False, True)
        ]
        assert min(sum(map(len, side)) for side in sides) > 500_000
    assert sum(len(text) for text in load_side("code", "identify")) > 4 * 128 * 1024
    # A docstring that is prose to one side is in no code of the other.
    seen = "\n".join(load_side("code", "evaluate"))
    long = [line for text in load_side("prose", "identify") for line in text.splitlines() if len(line) > 72]
    assert sum(line in seen for line in long) < len(long) / 50


def test_the_users_text_is_divided_in_the_middle(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(f"line {i} of mine" for i in range(2000)), encoding="utf-8")
    [one], [two] = load_side(str(path), "identify"), load_side(str(path), "evaluate")
    assert one + two == load_text(str(path))
    assert not set(one.splitlines()) & set(two.splitlines())


def test_impossible_continuation():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        Cell("prose", 100, "continuation", 1)


def test_too_short(tokenizer, tmp_path):
    maker = PromptMaker(tokenizer, "noise")
    with pytest.raises(ValueError, match="too short"):
        maker.passkeys(20, 1, random.Random(0))
    with pytest.raises(ValueError, match="tokens shorter would fit"):
        maker.passkeys(10_000_000, 1, random.Random(0))


def test_text_sources(tmp_path):
    words = "many words of text " * 40
    plain, lines, table = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.csv"
    plain.write_text(words, encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"text": f"{i} {words}", "id": i}) for i in (1, 2, 3, 1)), encoding="utf-8")
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], [1, words], [2, words], [3, f"more {words}"]])
    assert load_text(str(plain)) == words
    assert load_text(f"{lines}:text").count("many") == 120  # and so here
    assert load_text(f"{table}:text").count("many") == 80  # what comes twice is taken once
    assert len(load_text("prose")) > 100_000
    assert "grass" in load_text("noise")


def test_text_that_cannot_be_read(tmp_path):
    binary, lines = tmp_path / "x.txt", tmp_path / "x.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    lines.write_text('{"text": 1}\nnot json\n{"text": 2}\n', encoding="utf-8")
    short = tmp_path / "short.txt"
    short.write_text("few words", encoding="utf-8")
    for source, message in [
        (str(tmp_path / "missing.txt"), "no text file"),
        (str(binary), "not UTF-8"),
        (f"{lines}:text", r"not valid JSON \(line 2: "),
        (f"{lines}:body", "no column 'body'"),
        (str(short), "fewer than 100 words"),
    ]:
        with pytest.raises(TextError, match=message):
            load_text(source)


def test_a_data_set_that_fails_without_a_word(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", fail)
    with pytest.raises(TextError, match="'some/words' cannot be read: ConnectionError"):
        load_text("some/words:text")
