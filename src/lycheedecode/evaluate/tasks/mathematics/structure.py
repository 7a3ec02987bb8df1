"""What an answer is made of: lists, sets, points, intervals, matrices, equations, and leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .solution import braced
from .spelling import ROW, without_unit

Kind = Literal["leaf", "word", "list", "group", "matrix", "equation"]

_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?!,?\d)")
_AND = re.compile(
    r",?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\(?:land|lor|wedge|vee)(?![a-zA-Z]))\s*"
)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end\{\1\}", re.DOTALL)
_RELATION = re.compile(r"<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])")
_VARIABLE = r"[a-zA-Z]|\\[a-z]+"
_MOST_DEPTH = 20


@dataclass(frozen=True)
class Node:
    """An answer or a part of it.

    Attributes:
        kind: `list` has no order (a set as well), `group` has one (points, intervals), `matrix` has rows.
        text: of a leaf, word or equation; of a group its two brackets.
        parts: of the others.
        name: left of the equals sign, where that only names the answer.
        unit: in one spelling, where it is known.
    """

    kind: Kind
    text: str = ""
    parts: tuple[Node, ...] = ()
    name: str = ""
    unit: str = ""


def read(text: str, thousands: bool = True, depth: int = 0) -> Node:
    """The structure of a spelled answer; commas between groups of three digits separate only without `thousands`."""
    text = text.strip()
    if depth > _MOST_DEPTH:
        return Node("leaf", text)
    inner = depth + 1
    if thousands:
        text = _outside_of_brackets(text)
    whole = _whole_text(text)
    if whole is not None:
        return _words(whole)
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}"):
        return Node("list", "{}")
    if text == "\\mathbb{R}":
        return Node("group", "()", (Node("leaf", "-\\infty"), Node("leaf", "\\infty")))
    condition = re.fullmatch(rf"\\\{{\s*(?:{_VARIABLE})\s*(?:\\mid|\||:)(?![a-zA-Z])(.+)\\\}}", text)
    if condition:
        return read(condition[1], thousands, inner)
    parts = [part for part in split(_AND.sub(",", text), ",;") if part.strip()]
    if len(parts) > 1:
        return _listed(read(part, thousands, inner) for part in parts)
    parts = split(text, "\\cup")
    if len(parts) > 1:
        return _listed(read(part, thousands, inner) for part in parts)
    found = _equation(text, inner) or _inequality(text) or _both_signs(text, inner) or _bracketed(text, inner)
    return found or _matrix(text, inner) or _leaf(text)


def _listed(parts: Iterator[Node]) -> Node:
    """Lists in a list are one list: `0, \\pm 2`; of several equal parts one counts."""
    flat = [inside for part in parts for inside in (part.parts if part.kind == "list" and not part.text else (part,))]
    return Node("list", parts=tuple(flat))


def _outside_of_brackets(text: str) -> str:
    """Without the commas of thousands, where they are not inside of brackets."""
    found, depth, last = "", 0, 0
    for match in re.finditer(r"[(\[{)\]}]|(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)", text):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        elif depth == 0:
            found += text[last : match.start()] + match[0].replace(",", "")
            last = match.end()
    return found + text[last:]


def has_thousands(text: str) -> bool:
    """Whether a text has commas that may belong to one number, or separate several."""
    return bool(_THOUSANDS.search(text))


def split(text: str, at: str) -> list[str]:
    """Pieces of a text between separators outside of brackets: a command, or any of several characters."""
    depth, last, i, parts = 0, 0, 0, []
    while i < len(text):
        if (
            at[0] == "\\"
            and depth == 0
            and text.startswith(at, i)
            and not text[i + len(at) : i + len(at) + 1].isalpha()
        ):
            parts.append(text[last:i])
            i = last = i + len(at)
            continue
        if text[i] == "\\" and text[i + 1 : i + 2] in ("{", "}"):
            i += 1
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if at[0] != "\\" and text[i] in at and depth == 0:
            parts.append(text[last:i])
            last = i + 1
        i += 1
    return [*parts, text[last:]]


# ---------------------------------------------------------------------- words


def _whole_text(text: str) -> str | None:
    if text.startswith("\\text{"):
        inside = braced(text, len("\\text"))
        if inside is not None and len(inside) + len("\\text{}") == len(text):
            return inside
    return None


def _words(text: str) -> Node:
    parts = [part.strip() for part in re.split(r"\s*(?:,|;|\band\b|\bor\b)\s*", text) if part.strip()]
    if len(parts) > 1:
        return Node("list", parts=tuple(_words(part) for part in parts))
    plain = text.strip().strip(".").strip()
    choice = re.fullmatch(r"\(([A-Za-z])\)", plain)
    if choice or re.fullmatch(r"[-+]?[\d.,/]+|[A-Za-z]", plain):
        return _leaf(choice[1] if choice else plain)
    return Node("word", " ".join(plain.casefold().split()))


# ---------------------------------------------------------------------- relations

_DECORATION = re.compile(
    r"\\(?:angle|measuredangle|overline|overrightarrow|vec|hat|bar|tilde|triangle|mathbb|mathcal|ell|Delta)(?![a-zA-Z])"
    r"|_\{[^{}]*\}|\^\{(?:\\prime|-1|')\}|['|{}\s]"
)
_GREEK = re.compile(
    r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|psi|omega|kappa)"
)


def _equation(text: str, depth: int) -> Node | None:
    sides = [side.strip() for side in split(text, "=")]
    if len(sides) > 1 and all(sides):
        name = _name(sides[0])
        if name:
            return replace(read(sides[-1], True, depth), name=name)
        return Node("equation", text)
    belongs = re.match(rf"({_VARIABLE})\s*\\in(?![a-zA-Z])(.+)", text)
    return replace(read(belongs[2], False, depth), name=belongs[1]) if belongs else None


def _name(side: str) -> str:
    """What stands left of an equals sign, if it names the answer and says nothing else; else ``""``."""
    plain = _GREEK.sub("a", re.sub(r"\\text\{[^{}]*\}", "word", side))
    plain = _DECORATION.sub("", plain)
    named = r"[A-Za-z](?:\([^()=]*\))?|[A-Z]+|[a-z]{3,}|[A-Za-z]+\([^()=]*\)|\[[A-Z]{3,}\]|\((?:[A-Za-z],)+[A-Za-z]\)"
    return side.replace(" ", "") if re.fullmatch(named, plain) and plain != "e" else ""


def _inequality(text: str) -> Node | None:
    """`1 < x \\le 2` is the interval (1, 2]; an inequality that is none is an equation of its own kind."""
    signs = _RELATION.findall(text)
    if not signs or len(signs) > 2:
        return Node("equation", text) if signs or re.search(r"\\ne(?![a-zA-Z])", text) else None
    sides = [side.strip() for side in _RELATION.split(text)]
    if signs[0] in (">", "\\ge"):
        sides = sides[::-1]
        signs = [{">": "<", "\\ge": "\\le"}.get(sign, ">") for sign in signs[::-1]]
    if not all(sides) or not all(sign in ("<", "\\le") for sign in signs):
        return Node("equation", text)
    if len(signs) == 1 and re.fullmatch(_VARIABLE, sides[0]):
        sides, signs = ["-\\infty", *sides], ["<", *signs]
    elif len(signs) == 1 and re.fullmatch(_VARIABLE, sides[1]):
        sides, signs = [*sides, "\\infty"], [*signs, "<"]
    if len(signs) == 1 or not re.fullmatch(_VARIABLE, sides[1]):
        return Node("equation", "".join(side + sign for side, sign in zip(sides, [*signs, ""], strict=True)))
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Node("group", brackets, (_leaf(sides[0]), _leaf(sides[2])), name=sides[1])


def _both_signs(text: str, depth: int) -> Node | None:
    if not re.search(r"\\pm(?![a-zA-Z])", text):
        return None
    pairs = [("\\pm", "+", "-"), ("\\mp", "-", "+")]
    above = below = text
    for command, plus, minus in pairs:
        above = re.sub(re.escape(command) + r"(?![a-zA-Z])\s*", plus, above)
        below = re.sub(re.escape(command) + r"(?![a-zA-Z])\s*", minus, below)
    return Node("list", parts=(read(above, True, depth), read(below, True, depth)))


# ---------------------------------------------------------------------- brackets


def _bracketed(text: str, depth: int) -> Node | None:
    if text.startswith("\\{") and text.endswith("\\}"):
        inside = text[2:-2]
        if "\\}" in inside or "\\mid" in inside or "|" in inside:
            return None
        return _listed(read(part, False, depth) for part in split(inside, ",;") if part.strip())
    if not text or text[0] not in "([{" or text[-1] not in ")]}" or not _is_one_bracket(text):
        return None
    inside = text[1:-1]
    parts = split(inside, ",;")
    if len(parts) == 1:
        alone = text[0] + text[-1] in ("()", "{}") and inside.strip()
        return read(inside, False, depth) if alone else None
    if not all(part.strip() for part in parts) or text[0] == "{":
        return None
    return Node("group", text[0] + text[-1], tuple(read(part, False, depth) for part in parts))


def _is_one_bracket(text: str) -> bool:
    """Whether the first bracket closes at the very end; ( and ] belong together in intervals."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def _matrix(text: str, depth: int) -> Node | None:
    found = _MATRIX.fullmatch(text)
    if not found or "\\begin" in found[2]:
        return None
    rows = [row for row in found[2].split(ROW) if row.strip()]
    cells = [tuple(read(cell, False, depth) for cell in row.split("&")) for row in rows]
    kind = "v" if found[1] in ("vmatrix", "Vmatrix") else ""
    return Node("matrix", kind, tuple(Node("group", "()", row) for row in cells))


# ---------------------------------------------------------------------- leaves


def _leaf(text: str) -> Node:
    text, unit = without_unit(text.strip())
    text = re.sub(r"^\\text\{[^{}]*\}\s*(?=[-+]?[\d.])", "", text)  # Rs. 50
    text = re.sub(r"^\+(?=\S)", "", text.strip())
    text = {"infinity": "\\infty", "inf": "\\infty", "-infinity": "-\\infty"}.get(text.lower(), text)
    text = re.sub(r"^(-?)\s*(\d+)\s+(\d+)/(\d+)$", r"\1\2\\frac{\3}{\4}", text)  # 1 1/2
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):  # 10 000
        text = text.replace(" ", "")
    if re.fullmatch(r"[A-Za-z]+(?: [A-Za-z]+)+|[A-Za-z]{4,}", text):
        return Node("word", " ".join(text.casefold().split()), unit=unit)
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    if re.fullmatch(r"\([^()]*\)", text) and "," not in text:
        text = text[1:-1]
    return Node("leaf", text, unit=unit)
