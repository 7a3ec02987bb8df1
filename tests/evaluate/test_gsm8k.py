"""GSM8K after worked examples: prompts as long as they should be, problems that are not among their own examples."""

import json

import pytest
import tiny

from lycheedecode import Engine
from lycheedecode.evaluate.ruler import TaskLengthError
from lycheedecode.evaluate.tasks import TaskOptions, catalogue, evaluate_tasks
from lycheedecode.evaluate.tasks.catalogue import FILES
from lycheedecode.evaluate.tasks.gsm8k import make_items, process_results, read_problems
from lycheedecode.evaluate.tasks_data import DataError, find_records

ROOM = 40


def count(text, prefix):
    assert prefix == ""
    return len(text)


def problem(i):
    worked = f"There are {i} + 1 = <<{i}+1={i + 1}>>{i + 1} of them.\n#### {i + 1:,}"
    return {"question": f"How many are {i} and one?", "answer": worked}


@pytest.fixture
def folder(tmp_path):
    find_records.cache_clear()
    rows = [json.dumps(problem(i)) for i in range(990, 1070)]
    (tmp_path / "gsm8k.jsonl").write_text("\r\n".join(rows), encoding="utf-8-sig")
    return tmp_path


def questions(item):
    return [line.removeprefix("Question: ") for line in item["text"].split("\n") if line.startswith("Question: ")]


def test_prompts_fill_their_length(folder):
    items = make_items(2000, 12, count, room=ROOM, data=folder)
    assert len({item["text"] for item in items}) == 12
    for item in items:
        assert 0 <= 2000 - ROOM - len(item["text"]) <= 90  # one more example would not fit
        *shown, asked = questions(item)
        assert len(shown) == len(set(shown)) > 15
        assert asked not in shown
        assert int(item["answer"].replace(",", "")) == int(asked.split()[3]) + 1
        assert item["text"].endswith(f"Question: {asked}\nAnswer:")
        assert "<<" not in item["text"]
    examples = {question for item in items for question in questions(item)[:-1]}
    assert not examples & {questions(item)[-1] for item in items}  # none is ever asked
    assert make_items(2000, 12, count, room=ROOM, data=folder) == items
    assert make_items(2000, 5, count, room=ROOM, data=folder) == items[:5]  # what an earlier call answered counts
    assert make_items(2000, 12, count, room=ROOM, data=folder, seed=1) != items
    longer = make_items(3000, 12, count, room=ROOM, data=folder)
    assert [questions(item)[-1] for item in longer] == [questions(item)[-1] for item in items]  # lengths ask the same


def test_examples_are_training_problems_where_there_are_any(folder):
    asked, examples = read_problems(folder)
    assert (len(asked), len(examples)) == (60, 20)
    (folder / "gsm8k_train.jsonl").write_text("\n".join(json.dumps(problem(i)) for i in range(5)))
    asked, examples = read_problems(folder)
    assert (len(asked), len(examples)) == (80, 5)
    assert examples[0].worked == "There are 0 + 1 = 1 of them."
    assert examples[0].answer == "1"


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [
        ("It is 2.\n#### 1,000", 1),
        ("#### 1000.00\nQuestion: Who?", 1),
        ("So the answer is $1000.", 1),
        (r"\boxed{1000}", 1),
        ("#### 100", 0),
        ("no idea", 0),
    ],
)
def test_answers(text, accuracy):
    assert process_results({"answer": "1,000"}, [text]) == {"accuracy": accuracy}


def test_what_cannot_be_made(tmp_path, folder, no_hub):
    with pytest.raises(TaskLengthError, match="gsm8k_many_shot with 60 tokens has no room"):
        make_items(60, 1, count, room=ROOM, data=folder)
    with pytest.raises(DataError, match=r"data of gsm8k_many_shot is neither .* put gsm8k.jsonl into"):
        read_problems(tmp_path / "nothing")
    for row, message in [
        ({"question": "q", "answer": "5"}, "ends in #### NUMBER"),
        (problem(1), "needs 4 problems or more"),
    ]:
        find_records.cache_clear()
        (folder / "gsm8k.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=message):
            read_problems(folder)


def test_through_the_harness(folder, no_hashing, byte_tokenizer):
    llama = tiny.model(max_position_embeddings=1536)
    assert catalogue.is_generated("gsm8k_many_shot")
    assert not catalogue.may_chat("gsm8k_many_shot")
    assert "max_gen_toks: 512" in (text := (FILES / "gsm8k" / "gsm8k_many_shot.yaml").read_text())
    assert "room: 512" in text
    for chat in (None, True):
        options = TaskOptions(lengths=(900, 1200), limit=2, data=folder, max_new_tokens=3, chat=chat)
        cells = evaluate_tasks({"full": Engine(llama, byte_tokenizer)}, ["gsm8k_many_shot"], options)
        for cell in cells:
            entry = cell["scores"]["full"]
            assert list(entry["metrics"]) == ["accuracy"]
            assert cell["length"] - 512 - 90 <= entry["prompt_tokens"] <= cell["length"] - 512
