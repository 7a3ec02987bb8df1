"""Answers to mathematical problems: where they are in a solution, and whether two are the same.

`process_results` is what task files call: `(document, results) -> {metric: value}`, with several solutions a problem.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

Number = Fraction | float
_TOLERANCE = 1e-6


def process_results(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """`accuracy`: the share of the solutions that are right; `majority`: whether the most frequent answer is."""
    found = [final_answer(solution) for solution in results[0]]
    right = [answer is not None and is_right(answer, doc) for answer in found]
    votes = [sum(other is not None and is_same(answer, other) for other in found) if answer else 0 for answer in found]
    elected = max(range(len(found)), key=votes.__getitem__)
    return {"accuracy": sum(right) / len(right), "majority": float(right[elected])}


def is_right(answer: str, doc: Mapping[str, Any]) -> bool:
    """Whether an answer is that of the problem: each part of an answer with several parts, in any order."""
    if is_same(answer, doc["answer"], doc.get("tolerance") or 0.0):
        return True
    expected, given = list(_parts(doc["answer"])), list(_parts(answer))
    if len(expected) != len(given) or len(given) < 2:
        return False
    for part in given:
        match = next((other for other in expected if is_same(part, other)), None)
        if match is None:
            return False
        expected.remove(match)
    return True


def final_answer(solution: str) -> str | None:
    """What stands in the last `\\boxed{}`; without one, the last number; None without either."""
    at = solution.rfind("\\boxed{")
    if at >= 0:
        inside = _braced(solution, at + len("\\boxed"))
        if inside is not None:
            return inside.strip()
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", solution)
    return numbers[-1].rstrip(",") if numbers else None


def is_same(one: str, two: str, tolerance: float = 0.0) -> bool:
    """Whether two answers are the same text but for spelling, or the same number."""
    one, two = normalised(one), normalised(two)
    if one == two:
        return bool(one)
    values = value(one), value(two)
    if None in values:
        return False
    if all(isinstance(found, Fraction) for found in values) and not tolerance:
        return values[0] == values[1]
    return math.isclose(*map(float, values), rel_tol=_TOLERANCE, abs_tol=tolerance)


# ---------------------------------------------------------------------- spelling

_DROPPED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ]|\\(?:text|mathrm|mbox)\{[^{}]*\}\s*$|\^?\{?\\circ\}?|\\degree"
    r"|\\displaystyle|\\%|%|\$|\\\$|(?<=\d),(?=\d{3}(?!\d))|\s"
)


def normalised(answer: str) -> str:
    """An answer without what does not matter: spaces, units, signs of mathematics mode, `x =` before a value."""
    text = answer.strip().rstrip(".").replace("\\\\", "\\")
    text = (
        text.replace("\N{MINUS SIGN}", "-")
        .replace("{,}", ",")
        .replace("\\dfrac", "\\frac")
        .replace("\\tfrac", "\\frac")
        .replace("\\cdot", "*")
    )
    text = text.replace("\\times", "*").replace("\\div", "/").replace("\\leq", "\\le").replace("\\geq", "\\ge")
    text = re.sub(r"^\s*\\(?:text|mathrm|mbox)\{([^{}]*)\}\s*$", r"\1", text)
    text = _DROPPED.sub("", text)
    text = re.sub(r"^[A-Za-z](?:\([A-Za-z]\))?=(?!=)", "", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    return text.lower() if text.isalpha() else text


def _parts(answer: str) -> Iterator[str]:
    """Parts of an answer that commas, semicolons or `and` separate outside of brackets."""
    depth, part = 0, ""
    for character in re.sub(r"\\text\{\s*(and|or)\s*\}|\b(and|or)\b", ",", answer.strip().strip("$")):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            yield from [part] * bool(part.strip())
            part = ""
        else:
            part += character
    yield from [part] * bool(part.strip())


def _braced(text: str, at: int) -> str | None:
    """What stands between the brace at `at` and its partner; None where there is no partner."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[at + 1 : i]
    return None


# ---------------------------------------------------------------------- numbers

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_MOST_DIGITS = 200
_PRODUCT = "·"
"""Before every factor that is no number; the first of a product needs none."""


def value(answer: str) -> Number | None:
    """The number that a normalised answer stands for, exact where it can be; None where it is no number."""
    text = _as_arithmetic(answer)
    if text is None or len(text) > _MOST_DIGITS:
        return None
    try:
        return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _as_arithmetic(text: str) -> str | None:
    """LaTeX of a number as an expression that Python can parse; None for anything else."""
    for command, before, between, after in (("\\frac", "((", ")/(", "))"), ("\\sqrt", "sqrt(", None, ")")):
        while command in text:
            at = text.rfind(command)  # inner ones come last
            first = _braced(text, at + len(command)) if text[at + len(command) :].startswith("{") else None
            if first is None:
                return None
            end = at + len(command) + len(first) + 2
            if between is None:
                text = f"{text[:at]}{_PRODUCT}{before}{first}{after}{text[end:]}"
                continue
            second = _braced(text, end) if text[end:].startswith("{") else None
            if second is None:
                return None
            text = f"{text[:at]}{_PRODUCT}{before}{first}{between}{second}{after}{text[end + len(second) + 2 :]}"
    text = text.replace("\\pi", f"{_PRODUCT}pi").replace("π", f"{_PRODUCT}pi")
    text = text.replace("^", "**").replace("{", "(").replace("}", ")")
    text = re.sub(rf"(^|[-+*/(]){_PRODUCT}", r"\1", text).replace(_PRODUCT, "*")
    text = re.sub(r"(\d|\))(?=\(|sqrt|pi)", r"\1*", text)
    if re.search(r"[^-+*/().\d]", text.replace("sqrt", "").replace("pi", "")):
        return None
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python refuses leading zeros, answers of AIME have them


def _evaluate(node: ast.AST) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value)) if math.isfinite(node.value) else float(node.value)
    if isinstance(node, ast.Name) and node.id == "pi":
        return math.pi
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_evaluate(node.operand) if isinstance(node.op, ast.USub) else _evaluate(node.operand)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "sqrt"
        and len(node.args) == 1
    ):
        return _root(_evaluate(node.args[0]))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_evaluate(node.left), _evaluate(node.right))
    raise ValueError("not arithmetic")


def _root(number: Number) -> Number:
    if isinstance(number, Fraction) and number >= 0:
        exact = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
        if exact * exact == number:
            return exact
    return math.sqrt(number)


def _power(base: Number, exponent: Number) -> Number:
    if abs(float(exponent)) > 1000 or abs(float(base)) > 1e9:
        raise ValueError("too large to be an answer")
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return base ** int(exponent)
    found = float(base) ** float(exponent)
    if isinstance(found, complex):
        raise ValueError("not a real number")
    return found
