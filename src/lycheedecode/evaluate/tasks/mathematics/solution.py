"""Where the answer stands in a solution."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$]+)")
_SAID = re.compile(r"(?:final answer|answer)\s*(?:is|:)\s*:?\s*(.+)", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?!\d[\d,.]*\s)(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")


def final_answer(solution: str) -> str | None:
    """What a solution gives as its answer: what stands in its last `\\boxed{}`; without one, after the last `####`;
    else what is said to be the answer, if that is a formula or begins with a number; else the last number.

    None without any of these.
    """
    marked = reference_answer(solution)
    if marked is not None:
        return marked
    solution = solution.replace("\N{MINUS SIGN}", "-")
    for said in reversed(_SAID.findall(solution)):
        formula = _FORMULA.match(said.strip("* "))
        if formula:
            return next(part for part in formula.groups() if part).strip()
        number = _NUMBER.match(said.strip("*$\\( "))
        if number:
            return number[0]
    numbers = _NUMBER.findall(solution)
    return numbers[-1] if numbers else None


def reference_answer(solution: str) -> str | None:
    """The answer that a worked solution marks as its own: in its last box, or after its last `####` (GSM8K)."""
    for box in reversed(list(_BOX.finditer(solution))):
        inside = braced(solution, box.end())
        if inside is not None:
            return inside.strip()
    bare = _BARE_BOX.findall(solution)
    if bare:
        return bare[-1].rstrip(".,")
    _, mark, after = solution.rpartition("####")
    lines = after.strip().splitlines()
    return lines[0].strip() if mark and lines else None


def braced(text: str, at: int, pair: str = "{}") -> str | None:
    """What stands between the brace at `at` and its partner; None where there is no partner."""
    depth = 0
    for i in range(at, len(text)):
        if text[i - 1 : i] == "\\" and text[i] in pair:
            continue
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return text[at + 1 : i]
    return None
