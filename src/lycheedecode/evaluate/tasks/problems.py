"""Mathematical problems: AIME 2024, OlympiadBench, and anything of the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tasks_data import DataError, find_records

_PROBLEM = ("problem", "Problem", "question", "Question")
_ANSWER = ("answer", "Answer", "final_answer", "solution")


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
    from datasets import Dataset

    return {"test": Dataset.from_list([_document(record) for record in records])}


def _document(record: Mapping[str, Any]) -> dict[str, Any]:
    problem, answer = _first(record, _PROBLEM), _first(record, _ANSWER)
    if isinstance(answer, (list, tuple)):
        answer = ", ".join(map(str, answer))
    return {"problem": str(problem), "answer": str(answer), "tolerance": _tolerance(record.get("error"))}


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if record.get(name) not in (None, "", []):
            return record[name]
    raise DataError(f"A problem has none of {', '.join(names)}.")


def _tolerance(error: Any) -> float:
    """OlympiadBench gives one tolerance, none, or one for each part of an answer, of which the smallest holds."""
    try:
        return min(float(part) for part in str(error or 0).split(",") if part)
    except ValueError:
        return 0.0


def _folder(data: str | None) -> Path | None:
    return None if data is None else Path(data)
