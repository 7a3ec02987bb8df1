"""Whether two answers are the same."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from . import algebra
from .spelling import spelled
from .structure import Node, has_thousands, read, split
from .values import Number, value

_ROUNDED = 1e-6
"""How far a decimal may be off a number that has no end, as a share."""
_ROUNDING = 1e-12
_MOST_PARTS = 64
_MOST_CHARACTERS = 2000


def is_right(answer: str, doc: Mapping[str, Any]) -> bool:
    """Whether an answer is that of the problem: each part of an answer with several parts, in any order.

    Args:
        answer: as it stands in the solution.
        doc: has `answer`, and may have `tolerance`: how far off a number may be, or one for each part.
    """
    tolerance = doc.get("tolerance") or 0.0
    return is_same(answer, doc["answer"], tolerance)


def is_same(one: str, two: str, tolerance: float | Sequence[float] = 0.0) -> bool:
    """Whether two answers are the same but for spelling, or the same number, or algebraically equal.

    `two` is the reference: of an equation that ends in it the other may have more than a name on its left.
    """
    if max(len(one), len(two)) > _MOST_CHARACTERS:
        return bool(one.strip()) and one.strip() == two.strip()
    texts = spelled(one), spelled(two)
    if not all(texts):
        return False
    given, gold = (read(text) for text in texts)
    if _same(given, gold, tolerance):
        return True
    if given.kind != gold.kind and "list" in (given.kind, gold.kind) and any(map(has_thousands, texts)):
        given, gold = (read(text, thousands=False) for text in texts)
        return _same(given, gold, tolerance)
    if given.kind == "equation" and gold.kind in ("leaf", "group") and not gold.name:
        last = split(given.text, "=")[-1]
        return last != given.text and _same(read(last), gold, tolerance)
    return False


def _same(one: Node, two: Node, tolerance: float | Sequence[float]) -> bool:
    if one.name and two.name and one.name != two.name:
        return False
    kinds = {one.kind, two.kind}
    if kinds == {"list"}:
        return _match(one.parts, two.parts, tolerance)
    if kinds == {"list", "group"}:
        return _named_point(one, two, tolerance)
    if "list" in kinds:
        several, single = (one, two) if one.kind == "list" else (two, one)
        return len(several.parts) == 1 and _same(several.parts[0], single, tolerance)
    if kinds in ({"group"}, {"matrix"}):
        return one.text == two.text and _in_order(one.parts, two.parts, tolerance)
    if kinds == {"equation"}:
        return _plain(one.text) == _plain(two.text) or algebra.is_equal(one.text, two.text)
    if kinds <= {"leaf", "word"}:
        return _same_leaf(one, two, _one_of(tolerance, 0, 1))
    return False


# ---------------------------------------------------------------------- several parts


def _one_of(tolerance: float | Sequence[float], index: int, number: int) -> float:
    """The tolerance of one part: its own where there are as many, else the smallest."""
    if isinstance(tolerance, (int, float)):
        return float(tolerance)
    return float(tolerance[index] if len(tolerance) == number else min(tolerance, default=0.0))


def _in_order(one: Sequence[Node], two: Sequence[Node], tolerance: float | Sequence[float]) -> bool:
    number = len(two)
    return len(one) == number and all(
        _same(a, b, _one_of(tolerance, i, number)) for i, (a, b) in enumerate(zip(one, two, strict=True))
    )


def _match(one: Sequence[Node], two: Sequence[Node], tolerance: float | Sequence[float]) -> bool:
    """Whether each part of `one` has a partner of its own in `two`, in any order; tolerances are those of `two`."""
    number = len(two)
    if len(one) != number or number > _MOST_PARTS:
        return False
    fits = [[_same(a, b, _one_of(tolerance, j, number)) for j, b in enumerate(two)] for a in one]
    partner: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        for j in range(number):
            if fits[i][j] and j not in tried:
                tried.add(j)
                if j not in partner or place(partner[j], tried):
                    partner[j] = i
                    return True
        return False

    return all(place(i, set()) for i in range(number))


def _named_point(one: Node, two: Node, tolerance: float | Sequence[float]) -> bool:
    """`y = 2, x = 1` is the point (1, 2): names in the order of the alphabet."""
    listed, group = (one, two) if one.kind == "list" else (two, one)
    if group.text != "()" or not listed.parts or not all(part.name for part in listed.parts):
        return False
    ordered = sorted(listed.parts, key=lambda part: part.name)
    left, right = (ordered, group.parts) if listed is one else (group.parts, ordered)
    return _in_order(left, right, tolerance)


# ---------------------------------------------------------------------- single expressions


def _plain(text: str) -> str:
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", text)


def _same_leaf(one: Node, two: Node, tolerance: float) -> bool:
    if one.unit and two.unit and one.unit != two.unit:
        return False
    if one.text == two.text or _plain(one.text) == _plain(two.text) != "":
        return bool(one.text)
    if "word" in (one.kind, two.kind) or all(re.fullmatch("[A-Za-z]", node.text) for node in (one, two)):
        return one.text.casefold() == two.text.casefold()
    if "%" in one.text or "%" in two.text:
        return _same_share(one.text, two.text, tolerance)
    if ":" in one.text and ":" in two.text:
        return _same_ratio(one.text, two.text)
    left, right = value(one.text), value(two.text)
    if left is not None and right is not None:
        decimal = any(re.search(r"\d\.\d|\.\d", node.text) for node in (one, two))
        return _close(left, right, tolerance, decimal)
    if any(re.search(r"\d \d", node.text) for node in (one, two)):  # two numbers side by side are none
        return False
    return algebra.is_equal(one.text, two.text)


def _close(one: Number, two: Number, tolerance: float, decimal: bool) -> bool:
    if isinstance(one, Fraction) and isinstance(two, Fraction):
        # 0.1 as it is written: exactly 3.1 is within 0.1 of 3.2.
        return abs(one - two) <= Fraction(str(tolerance))
    share = _ROUNDED if decimal else _ROUNDING
    return math.isclose(float(one), float(two), rel_tol=share, abs_tol=tolerance)


def _same_share(one: str, two: str, tolerance: float) -> bool:
    """50% is 50 where per cent are asked for, and always 0.5."""
    texts = [re.sub(r"\\?%", "", text) for text in (one, two)]
    if texts[0] == texts[1]:
        return True
    left, right = map(value, texts)
    if left is None or right is None:
        return False
    if _close(left, right, tolerance, False):
        return True
    shares = [number / 100 if "%" in text else number for number, text in ((left, one), (right, two))]
    return _close(shares[0], shares[1], 0.0, False)


def _same_ratio(one: str, two: str) -> bool:
    sides = [[value(part) for part in text.split(":")] for text in (one, two)]
    if len(sides[0]) != len(sides[1]) or any(None in side or 0 in side for side in sides):
        return False
    scale = [a / b for a, b in zip(*sides, strict=True)]
    return all(_close(a, b, 0.0, False) for a, b in pairwise(scale))
