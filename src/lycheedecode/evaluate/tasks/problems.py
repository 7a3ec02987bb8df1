"""Mathematical problems: AIME 2024, OlympiadBench, and anything of the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tasks_data import DataError, Documents, find_records
from .mathematics import reference_answer

_PROBLEM = ("problem", "Problem", "question", "Question")
_ANSWER = ("answer", "Answer", "final_answer")
_SOLUTION = ("solution", "Solution")


def aime24(data: str | None = None, **_: Any) -> dict[str, Any]:
    """The split `test`: `aime24.jsonl` with `problem` and `answer` in the folder `data`, or the hub."""
    names = ("aime24.jsonl", "aime24.json", "aime_2024.jsonl", "aime_2024.json")
    return _split(find_records("aime24", names, _folder(data), "HuggingFaceH4/aime_2024", None, "train"))


def olympiadbench(data: str | None = None, **_: Any) -> dict[str, Any]:
    """The split `test`: `olympiadbench.jsonl` in the folder `data`, or the hub.

    English competition mathematics without pictures. Of each problem are read `question` (or `problem`), `final_answer`
    (or `answer`), and `error`, how far a number may be off.
    """
    names = ("olympiadbench.jsonl", "olympiadbench.json", "OE_TO_maths_en_COMP.json", "OE_TO_maths_en_COMP.jsonl")
    hub, config = "Hothan/OlympiadBench", "OE_TO_maths_en_COMP"
    return _split(find_records("olympiadbench", names, _folder(data), hub, config, "train"))


def _split(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"test": Documents(_document(number, record) for number, record in enumerate(records, start=1))}


def _document(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    problem = _first(number, record, _PROBLEM)
    return {
        "problem": str(problem),
        "answer": expected(number, record),
        "tolerance": _tolerances(record.get("error")),
    }


def expected(number: int, record: Mapping[str, Any]) -> str:
    """The answer of a problem: its own field, what a worked solution there marks, or what `solution` does.

    Raises:
        DataError: there is none, or only a solution that marks no answer.
    """
    answer = next((record[name] for name in _ANSWER if record.get(name) not in (None, "", [])), None)
    if answer is None and any(record.get(name) for name in _SOLUTION):
        marked = reference_answer(str(_first(number, record, _SOLUTION)))
        if not marked:
            raise DataError(
                f"Problem {number} has only a solution, which has neither a \\boxed{{}} answer nor one after ####."
            )
        return marked
    if answer is None:
        answer = _first(number, record, _ANSWER)
    if isinstance(answer, (list, tuple)):
        return ", ".join(map(str, answer))
    if not isinstance(answer, (str, int, float)):
        raise DataError(f"Problem {number}: its answer is a {type(answer).__name__}, not a text or a number.")
    text = str(answer)
    return (reference_answer(text) or text) if "####" in text or "\\boxed" in text else text


def _first(number: int, record: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if record.get(name) not in (None, "", []):
            return record[name]
    raise DataError(f"Problem {number} has none of {', '.join(names)}.")


def _tolerances(error: Any) -> list[float]:
    """OlympiadBench gives one tolerance, none, or one for each part of an answer."""
    try:
        return [float(part) for part in str(error or "").split(",") if part.strip()]
    except ValueError:
        return []


def _folder(data: str | None) -> Path | None:
    return None if data is None else Path(data)
