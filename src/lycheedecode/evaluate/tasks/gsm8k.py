"""GSM8K with as many worked examples as a prompt of a given length takes: long prompts whose every line is of use."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..ruler import Item, plain_count
from ..ruler.fit import Fitter
from ..tasks_data import DataError, Documents, find_records
from .mathematics import final_answer, is_right, reference_answer

_HUB = "openai/gsm8k"
_TEST = ("gsm8k.jsonl", "gsm8k_test.jsonl", "gsm8k/test.jsonl", "test.jsonl")
_TRAIN = ("gsm8k_train.jsonl", "gsm8k/train.jsonl", "train.jsonl")
_EXAMPLES_OF_TEST = 4
"""Without training problems, every fourth problem of the test set is a worked example, and is never asked."""


class Problem(NamedTuple):
    """A question, its worked solution without the marks of a calculator, and the number that it ends in."""

    question: str
    worked: str
    answer: str


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`accuracy`: whether the answer after `####`, or what else the text gives as its answer, is right."""
    answer = final_answer(results[0])
    return {"accuracy": float(answer is not None and is_right(answer, doc))}


def read_problems(data: Path | None) -> tuple[list[Problem], list[Problem]]:
    """Problems to ask, and worked examples; no problem is in both.

    The examples are GSM8K's training problems, from `gsm8k_train.jsonl` in the folder `data`, or from the hub when
    there is no folder; of a folder with the test set alone (`gsm8k.jsonl`), every fourth of its problems.

    Raises:
        DataError: no test set, or a record of another form.
    """
    asked = _problems(find_records("gsm8k_many_shot", _TEST, data, _HUB, "main", "test"))
    if data is None or any((data / name).is_file() for name in _TRAIN):
        return asked, _problems(find_records("gsm8k_many_shot", _TRAIN, data, _HUB, "main", "train"))
    examples = asked[_EXAMPLES_OF_TEST - 1 :: _EXAMPLES_OF_TEST]
    del asked[_EXAMPLES_OF_TEST - 1 :: _EXAMPLES_OF_TEST]
    if not examples:
        raise DataError(f"gsm8k_many_shot needs {_EXAMPLES_OF_TEST} problems or more, some of them as worked examples.")
    return asked, examples


def _problems(records: Sequence[Mapping[str, Any]]) -> list[Problem]:
    found = []
    for number, record in enumerate(records, start=1):
        question, worked = record.get("question"), record.get("answer")
        answer = reference_answer(worked) if isinstance(worked, str) and "####" in worked else None
        if not isinstance(question, str) or not answer:
            raise DataError(f"Problem {number} of GSM8K has no question, or no worked answer that ends in #### NUMBER.")
        worked = re.sub(r"<<[^<>]*>>", "", worked.rpartition("####")[0]).strip()
        found.append(Problem(question.strip(), worked, answer))
    return found


def make_items(
    length: int, number: int, count: Callable[[str, str], int], *, room: int, seed: int = 0, data: Path | None = None
) -> list[dict[str, Any]]:
    """Problems after as many worked examples as fit, the same ones every time: `{"text", "answer"}`.

    Args:
        length: tokens of prompt and answer together.
        number: of items; each has examples of its own, in an order of its own.
        count: `(text, "") -> tokens` of the whole prompt, a chat template's included.
        room: tokens kept for the answer.
        seed: of the problems and examples.
        data: see `read_problems`.

    Raises:
        DataError: see `read_problems`.
        TaskLengthError: the length has no room for the question.
    """
    asked, examples = read_problems(data)
    asked = _drawn(asked, number, random.Random(f"gsm8k/{seed}"))
    fitter = Fitter(lambda item: count(item.text, item.prefix), length - room, f"gsm8k_many_shot with {length} tokens")
    made = []
    for i, problem in enumerate(asked):
        shown = random.Random(f"gsm8k/{seed}/{length}/{i}").sample(examples, len(examples))

        def build(size: int, shown: Sequence[Any] = shown, problem: Any = problem) -> Item:
            return _item(shown[:size], problem)

        item = fitter.longest(build)
        made.append({"text": item.text, "answer": problem.answer})
    return made


def _drawn(problems: Sequence[Problem], number: int, chance: random.Random) -> list[Problem]:
    """Some of the problems; of a larger number the first ones are the same (`sample` has other ones)."""
    drawn: dict[int, None] = {}
    while len(drawn) < min(number, len(problems)):
        drawn[chance.randrange(len(problems))] = None
    return [problems[i] for i in drawn]


def _item(examples: Sequence[Problem], problem: Problem) -> Item:
    shown = [f"Question: {each.question}\nAnswer: {each.worked}\n#### {each.answer}\n\n" for each in examples]
    return Item(f"{''.join(shown)}Question: {problem.question}\nAnswer:", "", [problem.answer])


def many_shot(
    room: int,
    length: int = 8192,
    items: int = 100,
    count: Callable[[str, str], int] | None = None,
    seed: int = 0,
    data: str | None = None,
    **others: Any,
) -> dict[str, Any]:
    """What the task file asks for: the split `test`; the arguments come from the task manager's metadata."""
    count = count or plain_count(others.get("tokenizer") or others.get("pretrained") or others.get("model"))
    folder = None if data is None else Path(data)
    return {"test": Documents(make_items(length, items, count, room=room, seed=seed, data=folder))}
