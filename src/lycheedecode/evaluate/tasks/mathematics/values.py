"""Numbers: what an answer without variables is worth, exactly where that can be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

Number = Fraction | float
_MOST_CHARACTERS = 300
_MOST_DEPTH = 40
_TOKEN = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?!\d))?|\\[a-zA-Z]+|\\[{}%]|[-+/^_(){}\[\]!|%e]|\s+|.")
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "\\sin": math.sin, "\\cos": math.cos, "\\tan": math.tan, "\\ln": math.log, "\\exp": math.exp,
    "\\arctan": math.atan, "\\arcsin": math.asin, "\\arccos": math.acos,
}  # fmt: skip


def value(text: str) -> Number | None:
    """The number that a spelled answer stands for; None where it is none."""
    if len(text) > _MOST_CHARACTERS or not text:
        return None
    reader = _Reader(text)
    try:
        found = reader.sum()
        reader.end()
    except (ArithmeticError, ValueError):  # no number, or none that can be computed
        return None
    return found if isinstance(found, Fraction) or math.isfinite(found) else None


class _Reader:
    """Recursive descent over the tokens of LaTeX: sums of products of powers."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"(\d*\.?\d*)\\overline\{(\d+)\}", _repeating, text)
        self._tokens = [token for token in _TOKEN.findall(text) if not token.isspace()]
        self._at = self._depth = 0

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *expected: str) -> str:
        token = self._peek()
        if not token or (expected and token not in expected):
            raise ArithmeticError
        self._at += 1
        return token

    def end(self) -> None:
        if self._peek():
            raise ArithmeticError

    def sum(self) -> Number:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise ArithmeticError
        found = self._product()
        while self._peek() in ("+", "-"):
            sign = self._take()
            other = self._product()
            found = found + other if sign == "+" else found - other
        self._depth -= 1
        return found

    def _product(self) -> Number:
        found = self._signed()
        while True:
            token = self._peek()
            if token == "/":
                self._take()
                found = found / self._signed()
            elif token == "\\cdot":
                self._take()
                found = found * self._signed()
            elif token in ("(", "{", "e") or (token.startswith("\\") and token not in ("\\}", "\\%")):
                found = self._beside(found)
            else:
                return found

    def _beside(self, left: Number) -> Number:
        """A factor without a sign before it; a whole number beside a proper fraction is a mixed number."""
        before = self._tokens[self._at - 1]
        mixed = self._peek() == "\\frac" and before.isdigit()
        proper = mixed and re.match(
            r"\\frac \{ (\d+) \} \{ (\d+) \}(?! \^)", " ".join(self._tokens[self._at : self._at + 8])
        )
        right = self._power()
        if proper and int(proper[1]) < int(proper[2]):
            return left - right if left < 0 else left + right
        return left * right

    def _signed(self) -> Number:
        if self._peek() in ("-", "+"):
            sign = self._take()
            self._depth += 1
            if self._depth > _MOST_DEPTH:
                raise ArithmeticError
            found = self._signed()
            self._depth -= 1
            return -found if sign == "-" else found
        return self._power()

    def _power(self) -> Number:
        base = self._factorial(self._primary())
        if self._peek() == "^":
            self._take()
            return _raised(base, self._signed_primary())
        return base

    def _signed_primary(self) -> Number:
        if self._peek() == "-":
            self._take()
            return -self._primary()
        return self._primary()

    def _factorial(self, number: Number) -> Number:
        while self._peek() == "!":
            self._take()
            if not isinstance(number, Fraction) or number.denominator != 1 or not 0 <= number <= 300:
                raise ArithmeticError
            number = Fraction(math.factorial(int(number)))
        return number

    def _primary(self) -> Number:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            if not token.isascii() or len(token) > 200 or re.search(r"[eE][+-]?\d{4}", token):
                raise ArithmeticError
            number = Fraction(token)
            return self._in_base(number) if self._peek() == "_" else number
        if token in ("(", "{"):
            return self._inside({"(": ")", "{": "}"}[token])
        if token == "|":
            inside = self._inside("|")
            return -inside if inside < 0 else inside
        if token == "e":
            return math.e
        return self._command(token)

    def _command(self, token: str) -> Number:
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            above = self._braced()
            return above / self._braced()
        if token in ("\\binom", "\\dbinom", "\\tbinom"):
            above, below = self._braced(), self._braced()
            whole = all(
                isinstance(one, Fraction) and one.denominator == 1 and 0 <= one <= 500 for one in (above, below)
            )
            if not whole:
                raise ArithmeticError
            return Fraction(math.comb(int(above), int(below)))
        if token == "\\sqrt":
            degree: Number = Fraction(2)
            if self._peek() == "[":
                self._take()
                degree = self._inside("]")
            return _root(self._braced(), degree)
        if token == "\\log":
            base: Number = Fraction(10)
            if self._peek() == "_":
                self._take()
                base = self._braced()
            return _log(self._argument(), base)
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](float(self._argument()))
        raise ArithmeticError

    def _argument(self) -> Number:
        if self._peek() == "^":  # \sin^2 is none of ours
            raise ArithmeticError
        return self._power()

    def _braced(self) -> Number:
        self._take("{")
        return self._inside("}")

    def _inside(self, close: str) -> Number:
        found = self.sum()
        self._take(close)
        return found

    def _in_base(self, number: Fraction) -> Number:
        self._take("_")
        base = self._braced()
        digits = [int(digit) for digit in str(number)] if number.denominator == 1 else []
        if not digits or not isinstance(base, Fraction) or not 2 <= base <= 10 or max(digits) >= base:
            raise ArithmeticError
        return Fraction(int(str(number), int(base)))


def _repeating(found: re.Match[str]) -> str:
    """0.1\\overline{6} -> an exact fraction."""
    head, cycle = found[1], found[2]
    if "." not in head:
        return found[0]
    places = len(head.split(".")[1])
    whole = Fraction(head if head[-1] != "." else head + "0")
    repeated = whole + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**places)
    return f"(\\frac{{{repeated.numerator}}}{{{repeated.denominator}}})"


def _root(number: Number, degree: Number) -> Number:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 2 <= degree <= 100:
        raise ArithmeticError
    power = int(degree)
    if number < 0:
        if power % 2 == 0:
            raise ArithmeticError
        return -_root(-number, degree)
    if isinstance(number, Fraction):
        parts = [_whole_root(part, power) for part in (number.numerator, number.denominator)]
        whole = [part for part in parts if part is not None]
        if len(whole) == 2:
            return Fraction(*whole)
    return float(number) ** (1 / power)


def _whole_root(number: int, power: int) -> int | None:
    near = round(number ** (1 / power)) if number < 1 << 1000 else 0
    found = math.isqrt(number) if power == 2 else near
    return found if found**power == number else None


def _log(number: Number, base: Number) -> Number:
    found = math.log(number) / math.log(base)
    near = round(found)
    exact = isinstance(number, Fraction) and isinstance(base, Fraction) and abs(near) < 500
    return Fraction(near) if exact and base**near == number else found


def _raised(base: Number, exponent: Number) -> Number:
    if abs(float(exponent)) > 1000 or abs(float(base)) > 1e9:
        raise ArithmeticError
    if isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            return base ** int(exponent)
        if exponent.denominator <= 100:
            return _root(base, Fraction(exponent.denominator)) ** exponent.numerator
    if base < 0:
        raise ArithmeticError
    return float(base) ** float(exponent)
