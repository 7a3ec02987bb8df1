"""What an answer is worth: the scores of RULER and LongBench, each in [0, 1].

`longbench` and `ruler` are what task files call: `(document, results) -> {metric: value}`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

# ---------------------------------------------------------------------- RULER


def ruler(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of what was asked for that the answer contains; all or nothing where one answer of several will do."""
    text = results[0].lower()
    found = [answer.lower() in text for answer in doc["answers"]]
    return {"recall": float(any(found)) if doc["match"] == "any" else sum(found) / len(found)}


# ---------------------------------------------------------------------- LongBench


def f1(answer: str, expected: str) -> float:
    """F1 of the words that two texts share; case, punctuation and articles do not count."""
    one, two = _words(answer), _words(expected)
    shared = sum((Counter(one) & Counter(two)).values())
    return 2 * shared / (len(one) + len(two)) if shared else 0.0


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L of whole texts over their sentences, by the package that LongBench uses; 0 where that gives up."""
    from rouge import Rouge

    try:
        return Rouge(metrics=["rouge-l"], stats=["f"]).get_scores([answer], [expected], avg=True)["rouge-l"]["f"]
    except (ValueError, AssertionError, RecursionError):  # no words; a sentence of a thousand words
        return 0.0


def edit_similarity(answer: str, expected: str) -> float:
    """Of the first line of code in the answer, indentation included: 1 - insertions and deletions as a share of all
    characters, to the whole per cent. Lines with a comment or a fence of code are passed over."""
    from rapidfuzz import fuzz

    lines = (line for line in answer.split("\n") if line.strip() and not any(sign in line for sign in ("`", "#", "//")))
    return round(fuzz.ratio(next(lines, ""), expected)) / 100


def classified(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """1 for the right class alone; a share when the answer names others, too.

    A class whose name is part of the expected one does not count, unless it follows one that was left out: this is how
    the published scores are computed.
    """
    named = [name for name in classes if name in answer]
    at = 0
    while at < len(named):
        if named[at] != expected and named[at] in expected:
            named.remove(named[at])
        at += 1
    return 1 / len(named) if expected in named else 0.0


def counted(answer: str, expected: str) -> float:
    """The share of the numbers in an answer that are the expected one."""
    return _share(answer, expected)


def retrieved(answer: str, expected: str) -> float:
    """The share of the numbers in an answer that are the number of the expected paragraph."""
    found = re.search(r"Paragraph (\d+)", expected)
    return _share(answer, found[1]) if found else 0.0


def _share(answer: str, number: str) -> float:
    said = re.findall(r"\d+", answer)
    return sum(one == number for one in said) / len(said) if said else 0.0


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


LONGBENCH: dict[str, Callable[..., float]] = {
    "narrativeqa": f1,
    "qasper": f1,
    "multifieldqa_en": f1,
    "hotpotqa": f1,
    "2wikimqa": f1,
    "musique": f1,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "trec": classified,
    "triviaqa": f1,
    "samsum": rouge_l,
    "passage_count": counted,
    "passage_retrieval_en": retrieved,
    "lcc": edit_similarity,
    "repobench-p": edit_similarity,
}
"""The English sets and their metrics."""
FIRST_LINE = {"trec", "triviaqa", "samsum"}
"""Sets whose prompts are examples without a template: an answer ends with its line."""
PLAIN = {*FIRST_LINE, "lcc", "repobench-p"}
"""Sets whose prompts a chat template would break."""


def longbench(subset: str) -> Callable[[Mapping[str, Any], Sequence[str]], dict[str, float]]:
    """The scoring of one set: the best over its answers."""
    return partial(_longbench, subset)


def _longbench(subset: str, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    answer, score = results[0], LONGBENCH[subset]
    if score is not edit_similarity:  # where the indentation of a line of code counts
        answer = answer.strip()
    if subset in FIRST_LINE:
        answer = answer.split("\n")[0]
    if score is classified:
        score = partial(classified, classes=doc["all_classes"] or [])
    return {LONGBENCH[subset].__name__: max((score(answer, expected) for expected in doc["answers"]), default=0.0)}
