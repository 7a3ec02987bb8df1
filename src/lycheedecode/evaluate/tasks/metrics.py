"""What an answer is worth: the scores of RULER and LongBench, each in [0, 1].

`longbench` and `ruler` are what task files call: `(document, results) -> {metric: value}`.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
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
    """ROUGE-L: F1 of the longest common subsequence of words."""
    return _overlap(answer.lower().split(), expected.lower().split())


def edit_similarity(answer: str, expected: str) -> float:
    """Of the first line of code in the answer: 1 - insertions and deletions as a share of all characters."""
    lines = [line for line in answer.lstrip("\n").split("\n") if not set(line.strip()) & set("`#") and line.strip()]
    if not lines or "//" in lines[0]:
        return 0.0
    return _overlap(lines[0], expected)


def classified(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """1 for the right class alone; a share when the answer names others, too."""
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == expected or name not in expected]
    return 1 / len(named) if expected in named else 0.0


def number(answer: str, expected: str) -> float:
    """The share of the numbers in an answer that are the expected one."""
    wanted = re.findall(r"\d+", expected)[:1]
    said = re.findall(r"\d+", answer)
    return sum(one in wanted for one in said) / len(said) if said else 0.0


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(one: Sequence[str], two: Sequence[str]) -> float:
    """Twice the longest common subsequence as a share of both lengths."""
    return 2 * longest_common(one, two) / (len(one) + len(two)) if one and two else 0.0


def longest_common(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence: a row of the usual table is the bits of one number."""
    places: dict[str, int] = defaultdict(int)
    for i, item in enumerate(one):
        places[item] |= 1 << i
    full = row = (1 << len(one)) - 1
    for item in two:
        matched = row & places.get(item, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(one) - row.bit_count()


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
    "passage_count": number,
    "passage_retrieval_en": number,
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
    answer, score = results[0].strip(), LONGBENCH[subset]
    if subset in FIRST_LINE:
        answer = answer.split("\n")[0]
    if score is classified:
        score = partial(classified, classes=doc["all_classes"] or [])
    return {LONGBENCH[subset].__name__: max((score(answer, expected) for expected in doc["answers"]), default=0.0)}
