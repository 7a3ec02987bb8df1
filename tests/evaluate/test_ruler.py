"""RULER's items: as long as they should be, with their answers inside, the same every time."""

import random

import pytest

from lycheedecode.evaluate.ruler import KINDS, TaskLengthError, dataset, make_items
from lycheedecode.evaluate.ruler.haystack import Sources, hide, running, vocabulary
from lycheedecode.evaluate.tasks.catalogue import FILES
from lycheedecode.evaluate.tasks_data import DataError
from lycheedecode.prompts.text import TextError

LENGTH, ROOM = 3072, 64


@pytest.fixture(scope="module")
def count(byte_tokenizer):
    return lambda text, prefix: len(byte_tokenizer(f"{text} {prefix}").input_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_items_fill_their_length_and_hold_their_answers(kind, count, data_folder):
    items = make_items(kind, LENGTH, 3, count, room=ROOM, data=data_folder)
    unit = {"niah_multikey_2": 70, "niah_multikey_3": 110, "cwe": 20, "fwe": 30}.get(kind, 31)  # one more would not fit
    for item in items:
        assert 0 <= LENGTH - ROOM - count(item.text, item.prefix) <= unit
        assert item.answers
        assert all(answer in item.text for answer in item.answers)
        assert not any(answer in item.text.split("\n\n")[-1] for answer in item.answers)  # the question gives none away
    assert len({item.text for item in items}) == 3
    again = make_items(kind, LENGTH, 3, count, room=ROOM, data=data_folder)
    assert again == items
    other = make_items(kind, LENGTH, 3, count, room=ROOM, data=data_folder, seed=1)
    assert [item.text for item in other] != [item.text for item in items]


def test_kinds_differ_in_what_is_asked(count, data_folder):
    def first(kind):
        return make_items(kind, LENGTH, 1, count, room=ROOM, data=data_folder)[0]

    assert [len(first(kind).answers) for kind in KINDS] == [1, 1, 1, 1, 1, 1, 4, 4, 5, 10, 3, 2, 1]
    assert {kind for kind in KINDS if first(kind).match == "any"} == {"qa_1", "qa_2"}
    assert first("niah_multikey_2").text.count("One secret number") > 20
    assert first("niah_multikey_1").text.count("One secret number") == 4
    assert len(first("niah_single_3").answers[0]) == 36


def test_the_most_frequent_words_are_the_answer(count):
    [item] = make_items("fwe", LENGTH, 1, count, room=ROOM)
    words = [word for word in item.text.split("\n\n")[1].split() if word != "..."]
    assert sorted(set(words), key=words.count, reverse=True)[:3] == item.answers
    [item] = make_items("cwe", LENGTH, 1, count, room=ROOM)
    words = item.text.split("\n\n")[-2].split()[1::2]
    assert {word for word in words if words.count(word) > 1} == set(item.answers)


def test_variables_are_a_chain_in_order(count):
    [item] = make_items("vt", LENGTH, 1, count, room=ROOM)
    places = [item.text.index(f"Let {name} = ") for name in item.answers]
    assert places == sorted(places)
    assert all(
        f"Let {name} = {before}." in item.text for before, name in zip(item.answers, item.answers[1:], strict=False)
    )


def test_the_chat_template_counts(byte_tokenizer):
    def count(text, prefix):
        return len(byte_tokenizer(text).input_ids) + 100

    [item] = make_items("niah_single_1", LENGTH, 1, count, room=ROOM)
    assert 0 <= LENGTH - ROOM - 100 - len(item.text) <= 31


def test_haystacks():
    words = ["One", "two.", "Three", "four", "five.", "Six"]
    assert hide(["A.", "B."], words, [0.0, 0.5]) == "A. One two. B. Three four five. Six"
    assert hide(["A.", "B."], words, [0.99, 0.99]) == "One two. Three four five. A. B. Six"
    assert running(["a", "b", "c"], 5, start=7) == ["b", "c", "a", "b", "c"]
    assert len(set(vocabulary(["aa", "bb", "cc", "dd", "ee"], 12, random.Random(0)))) == 12
    assert "-" * 40 not in Sources("word " * 100 + "-" * 40, 100).prose


WORDS = {
    "russian": ("абвгдежзийклмнопрстуфхцчшщэюя", " "),
    "greek": ("αβγδεζηθικλμνξοπρστυφχψω", " "),
    "arabic": ("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", " "),
    "chinese": ("的一是不了人我在有他这为之大来以个中上们", "\u3002"),
}


@pytest.mark.parametrize("script", WORDS)
def test_texts_in_any_script(script, tmp_path):
    letters, between = WORDS[script]
    rng = random.Random(script)
    words = ["".join(rng.choices(letters, k=rng.randrange(4, 9))) for _ in range(1500)]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(between.join(words[i : i + 12]) + "." for i in range(0, 1500, 12)), encoding="utf-8")
    for kind in ("niah_single_2", "niah_multikey_2", "cwe"):
        [item] = make_items(kind, 1200, 1, lambda text, _: len(text) // 2, room=ROOM, text=str(path))
        assert all(answer in item.text for answer in item.answers)
        assert sum(item.text.count(letter) for letter in letters) > 30


def test_texts_with_few_words_are_refused(tmp_path, count):
    path = tmp_path / "text.txt"
    twelve = ["".join(random.Random(i).choices("abcdefgh", k=6)) for i in range(12)]
    path.write_text(" ".join(random.Random(0).choices(twelve, k=4000)))
    for kind in ("cwe", "niah_multikey_2", "niah_single_2"):
        with pytest.raises(TextError, match="has 12 different words"):
            make_items(kind, LENGTH, 1, count, room=ROOM, text=str(path))
    ruled = tmp_path / "ruled.txt"
    ruled.write_text("-" * 80 + " a" * 50 + " " + ("=" * 70 + " ") * 60)
    with pytest.raises(TextError, match="100 words or more"):
        make_items("niah_single_1", LENGTH, 1, count, room=ROOM, text=str(ruled))


def test_names_of_facts_are_different(tmp_path):
    """Of 100 words there are 9900 names: some hundred facts would have one twice."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join("".join(random.Random(i).choices("abcdefgh", k=5)) for i in range(110)))
    assert len(set(vocabulary(["aa", "bb"], 12, random.Random(0)))) == 12
    [item] = make_items("niah_multikey_2", 30_000, 1, lambda text, _: len(text), room=ROOM, text=str(path))
    names = [line.split(" is ")[0] for line in item.text.split("\n") if line.startswith("One secret")]
    assert len(names) > 400
    assert len(set(names)) == len(names)
    [item] = make_items("cwe", 120_000, 1, lambda text, _: len(text), room=ROOM, text=str(path))
    assert len(set(item.text.split())) > 3000


def test_what_cannot_be_made_is_said(count, tmp_path, no_hub):
    with pytest.raises(TaskLengthError, match="niah_single_1 with 300 tokens has no room"):
        make_items("niah_single_1", 300, 1, count, room=ROOM)
    with pytest.raises(DataError, match=r"data of qa_1 is neither .* put squad.json into a folder"):
        make_items("qa_1", LENGTH, 1, count, room=ROOM)
    (tmp_path / "squad.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        make_items("qa_1", LENGTH, 1, count, room=ROOM, data=tmp_path)
    (tmp_path / "hotpotqa.json").write_text('[{"question": "q"}]')
    with pytest.raises(DataError, match="unknown form"):
        make_items("qa_2", LENGTH, 1, count, room=ROOM, data=tmp_path)


def test_task_files_can_do_without_us(byte_tokenizer, tmp_path):
    """What the harness passes on when it is called by its own command."""
    byte_tokenizer.save_pretrained(tmp_path)
    made = dataset("niah_single_1", ROOM, length=1024, items=2, pretrained=str(tmp_path), version=1)["test"]
    assert 1024 - ROOM - len(f"{made[0]['text']} {made[0]['prefix']}") < 31
    with pytest.raises(ValueError, match="tokenizer in its metadata"):
        dataset("niah_single_1", ROOM)


def test_rooms_are_the_limits_of_answers():
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    files = sorted((FILES / "ruler").glob("[!_]*.yaml"))
    tasks = [task for file in files if "task" in (task := yaml.load(file.read_text(), Loader)) and "group" not in task]
    assert {task["task"] for task in tasks} == set(KINDS)
    for task in tasks:
        assert task["dataset_kwargs"] == {"kind": task["task"], "room": task["generation_kwargs"]["max_gen_toks"]}


def test_the_harness_loads_our_files_by_itself(byte_tokenizer, tmp_path):
    from lm_eval.tasks import TaskManager

    byte_tokenizer.save_pretrained(tmp_path)
    metadata = {"length": LENGTH, "items": 2, "tokenizer": str(tmp_path), "seed": 3}
    manager = TaskManager(include_path=FILES, include_defaults=False, metadata=metadata)
    [task] = manager.load(["niah_single_1"])["tasks"].values()
    assert len(task.eval_docs) == 2
    assert set(manager.load(["ruler_synthetic"])["tasks"]) == set(KINDS) - {"qa_1", "qa_2"}
