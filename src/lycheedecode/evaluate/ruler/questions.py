"""Questions over documents, from files in the formats of SQuAD and HotpotQA, or from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..tasks_data import DataError, find_records


class Question(NamedTuple):
    """A question, the answers that count, the documents that hold them, and documents on the same subject."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    related: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions, and all documents of the set."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]

    @classmethod
    def of(cls, questions: Iterable[Question], name: str) -> QuestionSet:
        """The set of these questions; raises `DataError` when there is none."""
        kept = tuple(questions)
        if not kept:
            raise DataError(f"The question set {name} has no question with an answer.")
        documents = dict.fromkeys(text for question in kept for text in (*question.documents, *question.related))
        return cls(kept, tuple(documents))


@lru_cache(maxsize=1)
def read_squad(data: Path | None) -> QuestionSet:
    """Answerable questions of SQuAD: `squad.json` as published (versions 1.1, 2.0) in the folder `data`, or the hub."""
    names = ("squad.json", "squad.jsonl", "dev-v2.0.json", "dev-v1.1.json")
    records = find_records("qa_1", names, data, "rajpurkar/squad_v2", None, "validation")
    read = _squad_article if records and "paragraphs" in records[0] else _squad_row
    return QuestionSet.of((question for record in _checked(records, read) for question in record), "SQuAD")


def _squad_article(article: Mapping[str, Any]) -> list[Question]:
    contexts = tuple(paragraph["context"] for paragraph in article["paragraphs"])
    found = []
    for paragraph in article["paragraphs"]:
        related = tuple(context for context in contexts if context != paragraph["context"])
        for asked in paragraph["qas"]:
            answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
            if answers and not asked.get("is_impossible"):
                found.append(Question(asked["question"], answers, (paragraph["context"],), related))
    return found


def _squad_row(row: Mapping[str, Any]) -> list[Question]:
    answers = tuple(dict.fromkeys(row["answers"]["text"]))
    return [Question(row["question"], answers, (row["context"],))] if answers else []


@lru_cache(maxsize=1)
def read_hotpotqa(data: Path | None) -> QuestionSet:
    """HotpotQA with distractors: `hotpotqa.json` as published in the folder `data`, or the hub."""
    names = ("hotpotqa.json", "hotpotqa.jsonl", "hotpot_dev_distractor_v1.json")
    hub, config = "hotpotqa/hotpot_qa", "distractor"
    records = find_records("qa_2", names, data, hub, config, "validation", misfit=_not_hotpotqa)
    return QuestionSet.of((question for record in _checked(records, _hotpotqa_row) for question in record), "HotpotQA")


def _not_hotpotqa(row: Mapping[str, Any]) -> str | None:
    if isinstance(row.get("context"), str) and "answers" in row:
        return (
            "these are LongBench's rows, which the task longbench_hotpotqa reads; HotpotQA's own have question, answer "
            "and context, a list of documents"
        )
    return None


def _hotpotqa_row(row: Mapping[str, Any]) -> list[Question]:
    context = row["context"]
    if isinstance(context, Mapping):  # as the hub stores it: columns instead of pairs
        context = zip(context["title"], context["sentences"], strict=True)
    documents = tuple(f"{title}\n{''.join(sentences).strip()}" for title, sentences in context)
    return [Question(row["question"], (row["answer"],), documents)]


def _checked(records: list[dict[str, Any]], read: Any) -> Iterable[list[Question]]:
    for record in records:
        try:
            yield read(record)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"A record of a question set has an unknown form ({type(error).__name__}: {error})."
            ) from None
