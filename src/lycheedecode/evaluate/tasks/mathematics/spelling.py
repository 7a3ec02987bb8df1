"""One spelling for what can be written in many ways, before answers are compared."""

# ruff: noqa: RUF001 - characters that look alike are what this file is about

from __future__ import annotations

import re
from collections.abc import Callable

from .solution import braced

_CHARACTERS = {
    "\N{MINUS SIGN}": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "√": r"\sqrt ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "°": r"^\circ ", "ℝ": r"\mathbb{R}",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ", "′": "'", "’": "'",
}  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_COMMANDS = [
    (re.compile(pattern), with_)
    for pattern, with_ in [
        (r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|biggl?|biggr?|Biggl?|Biggr?)(?![a-zA-Z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|mathstrut|hfill)(?![a-zA-Z])", ""),
        (r"\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|\\[:> ;]|~", " "),
        (r"\\!|\\(?:phantom|hspace|vspace)\*?\{[^{}]*\}", ""),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge"),
        (r"\\(?:neq)(?![a-zA-Z])", r"\\ne"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:varnothing)(?![a-zA-Z])", r"\\emptyset"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\[lr]vert(?![a-zA-Z])", "|"),
        (r"\\(?:cdot|times|ast)(?![a-zA-Z])|(?<!\*)\*(?!\*)", r"\\cdot "),
        (r"\*\*", "^"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\to(?![a-zA-Z])|\\rightarrow(?![a-zA-Z])", r"\\to"),
        (r"\\(?:degrees?|circ)(?![a-zA-Z])", r"\\circ"),
        (
            r"\\(sin|cos|tan|cot|sec|csc)\s*\(?\s*(\d+(?:\.\d+)?)\s*\^?\s*\{?\s*\\circ\s*\}?\s*\)?",
            r"\\\1{(\\frac{\2\\pi}{180})}",
        ),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|(?<=\d)\s*\\circ", ""),
    ]
]
ROW = "\N{RETURN SYMBOL}"
"""Stands for the end of a matrix's row."""
_STYLES = r"textbf|textit|textsf|emph|mathbf|mathit|mathsf|boldsymbol|bm|boxed|fbox|mathnormal|underline"
_WORDS = r"text|mathrm|textrm|textnormal|mbox|hbox|operatorname\*?"


def spelled(answer: str) -> str:
    """An answer in the spelling that `compare` reads; spaces remain, single ones, where they may mean something."""
    text = answer.strip()
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda found: f"^{{{found[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda found: f"_{{{found[0].translate(_LOWERED)}}}", text)
    text = re.sub(r"√(\d+|[a-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\w\\])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    for character, command in _CHARACTERS.items():
        text = text.replace(character, command)
    # Without a matrix, two backslashes are one that was escaped once too often.
    single = re.sub(r"\\\\(?=[a-zA-Z,;:!{}%$(\[])", r"\\", text)
    text = text.replace("\\\\", ROW) if "\\begin" in text else single
    text = _outside_of_mathematics(text)
    text = re.sub(r"(?<=\d)\s*\\[, ]\s*(?=\d{3}(?!\d))", ",", text)  # 1\,234
    text = text.replace("\\,", " ")
    text = _plain_styles(text)
    for pattern, with_ in _COMMANDS:
        text = pattern.sub(with_, text)
    text = re.sub(r"\{([^{}]+?)\\over(?![a-zA-Z])([^{}]+)\}", r"\\frac{\1}{\2}", text)
    text = _braces(text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<=.)[.,;]+$", "", text).strip()


def _outside_of_mathematics(text: str) -> str:
    """Without the signs of mathematics mode; a dollar before a number is money, and does not matter either."""
    text = re.sub(r"\\[()]|\\\[|\\\]", " ", text) if re.search(r"\\\(|\\\[", text) else text
    return re.sub(r"\\?\$|[€£]", "", text).strip().rstrip(".").strip()


def _plain_styles(text: str) -> str:
    """Fonts do not matter: `\\mathbf{7}` is 7. What is written as words is all `\\text`, single letters excepted."""
    text = re.sub(r"\{\\(?:bf|rm|it)\s+([^{}]*)\}", r"{\1}", text)
    text = _unwrapped(text, _STYLES, lambda inside: inside)
    # After a number a letter in roman type is a unit, but for the constants.
    text = re.sub(rf"(?<=[\d)}}])(\s*)\\(?:{_WORDS})\{{([a-zA-Z])\}}(?<!\{{[eid]\}})", "\\1\0{\\2}", text)
    text = _unwrapped(text, _WORDS, lambda inside: inside if len(inside) == 1 else f"\0{{{inside}}}")
    return text.replace("\0", "\\text")


def _unwrapped(text: str, commands: str, make: Callable[[str], str]) -> str:
    pattern = re.compile(rf"\\(?:{commands})\s*(?=\{{)")
    while found := pattern.search(text):
        inside = braced(text, found.end())
        if inside is None:
            return text
        text = text[: found.start()] + make(inside) + text[found.end() + len(inside) + 2 :]
    return text


def _braces(text: str) -> str:
    """Every argument in braces: `\\frac12`, `\\sqrt x`, `n^2`, `a_1`."""
    text = re.sub(r"\s*([\^_])\s*", r"\1", text)
    text = re.sub(r"([\^_])\((-?\w+)\)", r"\1{\2}", text)
    text = re.sub(r"([\^_])([0-9A-Za-z*']|\\[a-zA-Z]+)", r"\1{\2}", text)
    text = re.sub(r"([\^_])-(\d+|[a-z])", r"\1{-\2}", text)
    text = re.sub(r"\\sqrt\s*(\[[^\[\]]*\])?\s*([0-9A-Za-z]|\\[a-zA-Z]+)", r"\\sqrt\1{\2}", text)
    at = 0
    while (at := text.find("\\frac", at)) >= 0:
        at += len("\\frac")
        first, after = _argument(text, at)
        second, end = _argument(text, after)
        if first is None or second is None:
            return text
        text = f"{text[:at]}{{{first}}}{{{second}}}{text[end:]}"
    return text


def _argument(text: str, at: int) -> tuple[str | None, int]:
    while at < len(text) and text[at] == " ":
        at += 1
    if at >= len(text):
        return None, at
    if text[at] == "{":
        inside = braced(text, at)
        return inside, at + len(inside or "") + 2
    command = re.compile(r"\\[a-zA-Z]+").match(text, at)
    return (command[0], command.end()) if command else (text[at], at + 1)


# ---------------------------------------------------------------------- units

_UNITS = {
    "cm": "cm centimeter centimeters centimetre centimetres", "mm": "mm millimeter millimeters",
    "m": "meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres",
    "in": "inch inches", "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles",
    "kg": "kg kilogram kilograms", "mg": "mg", "g": "gram grams", "lb": "lb lbs pound pounds", "oz": "oz ounce ounces",
    "s": "sec second seconds", "min": "min minute minutes", "h": "hr hrs hour hours", "d": "day days",
    "wk": "week weeks", "mo": "month months", "yr": "year years", "mph": "mph", "l": "liter liters litre litres",
    "ml": "ml milliliter milliliters", "$": "dollar dollars", "c": "cent cents", "deg": "degree degrees",
    "rad": "radian radians", "unit": "unit units",
}  # fmt: skip
_SINGLE = {letter: letter for letter in "msgldh"}
_KNOWN = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cubed": 3, "squared": 2}
_TEXT_UNIT = re.compile(
    r"(?P<rest>.*[\d)}\]a-zA-Z!])\s*(?P<unit>\\text\{[^{}]*\}(?:\^\{-?\d+\})?"
    r"(?:\s*(?:/|\\cdot)?\s*\\text\{[^{}]*\}(?:\^\{-?\d+\})?)*)$"
)
_BARE_UNIT = re.compile(
    rf"(?P<rest>.*[\d)}}])\s*(?P<unit>(?:(?:{'|'.join(_POWERS)})\.? )?(?:{'|'.join(sorted(_KNOWN, key=len))})\b\.?"
    r"(?:\^\{-?\d+\})?(?:(?: per |/)\w+)?)$",
    re.IGNORECASE,
)


def without_unit(text: str) -> tuple[str, str]:
    """An answer without the unit at its end, and that unit in one spelling; an unknown one is ``""``."""
    found = _TEXT_UNIT.match(text) or _BARE_UNIT.match(text)
    if not found or re.fullmatch(r"\\text\{\s*(?:and|or)\s*\}", found["unit"]):
        return text, ""
    return found["rest"].strip(), _unit(found["unit"])


def _unit(said: str) -> str:
    words = re.findall(r"[a-z]+|\d+|/", re.sub(r"\\text|[{}^.]", " ", said.lower()))
    known, power = _KNOWN | _SINGLE, 1
    names = []
    for word in words:
        if word in _POWERS or word.isdigit():
            power = _POWERS.get(word) or int(word)
        elif word in known:
            names.append(known[word])
        else:
            return ""
    return f"{names[0]}^{power}" if len(names) == 1 and names[0] != "unit" else ""
