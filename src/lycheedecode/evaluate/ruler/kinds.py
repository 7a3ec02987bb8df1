"""The 13 kinds: `(sources, size of the haystack, random numbers, number of the item) -> Item`.

A kind draws its facts before its haystack, so that they do not depend on the size.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from functools import partial
from math import pi

from .fit import Item
from .haystack import Sources, hide, running, vocabulary

Kind = Callable[[Sources, int, random.Random, int], Item]


# ---------------------------------------------------------------------- needles

_NEEDLE = "One secret {what} of {name} is {value}."


def _needles(
    sources: Sources,
    size: int,
    rng: random.Random,
    _: int,
    *,
    haystack: str,
    names: int = 1,
    values: int = 1,
    asked: int = 1,
    name_kind: str = "words",
    value_kind: str = "number",
) -> Item:
    """Facts `name -> value` among running text, repeated sentences or other facts; some names are asked for."""
    taken: set[str] = set()
    keys = [_name(sources, rng, name_kind, taken) for _ in range(names)]
    hidden = {key: [_value(rng, value_kind) for _ in range(values)] for key in keys}
    wanted = rng.sample(keys, asked)
    what = {"number": "number", "uuid": "code"}[value_kind]
    facts = [_NEEDLE.format(what=what, name=key, value=value) for key in keys for value in hidden[key]]
    rng.shuffle(facts)
    depths = [rng.random() for _ in facts]
    if haystack == "needles":
        others = [
            _NEEDLE.format(what=what, name=_name(sources, rng, name_kind, taken), value=_value(rng, value_kind))
            for _ in range(size)
        ]
        for fact, depth in zip(facts, depths, strict=True):
            others.insert(int(depth * (size + 1)), fact)
        text = "\n".join(others)
    else:
        words = sources.noise if haystack == "noise" else sources.prose
        start = 0 if haystack == "noise" else rng.randrange(len(words))
        text = hide(facts, running(words, size, start), depths)
    several = asked * values > 1
    noun, verb = (f"{what}s", "are") if several else (what, "is")
    listed = wanted[0] if asked == 1 else f"{', '.join(wanted[:-1])} and {wanted[-1]}"
    return Item(
        text=f"Secret {what}s are hidden in the text below, each with the name that it belongs to. Read the text with "
        f"care and remember them; a question follows.\n\n{text}\n\nWhich {verb} the secret {noun} of {listed}?",
        prefix=f"According to the text, the secret {noun} of {listed} {verb}",
        answers=[value for key in wanted for value in hidden[key]],
    )


def _name(sources: Sources, rng: random.Random, kind: str, taken: set[str]) -> str:
    """A name that no other fact of the item has: two words, three where most pairs are taken."""
    name = None
    while name is None or name in taken:
        parts = 2 if len(taken) <= len(sources.words) ** 2 // 2 else 3
        name = "-".join(rng.sample(sources.words, parts)) if kind == "words" else _value(rng, kind)
    taken.add(name)
    return name


def _value(rng: random.Random, kind: str) -> str:
    return str(rng.randrange(1_000_000, 10_000_000)) if kind == "number" else str(uuid.UUID(int=rng.getrandbits(128)))


# ---------------------------------------------------------------------- variables

_HOPS = 4


def _variables(sources: Sources, size: int, rng: random.Random, _: int) -> Item:
    """A chain of assignments among repeated sentences; all variables of the chain are asked for."""
    example = _chain(sources, 20, rng, letters=3)
    item = _chain(sources, size, rng, letters=5)
    shown = f"{example.text}\n{example.prefix} {', '.join(example.answers)}"
    return Item(f"{shown}\n\n{item.text}", item.prefix, item.answers)


def _chain(sources: Sources, size: int, rng: random.Random, letters: int) -> Item:
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(letters))
        names += [name] * (name not in names)
    value = str(rng.randrange(10_000, 100_000))
    facts = [f"Let {name} = {value if i == 0 else names[i - 1]}." for i, name in enumerate(names)]
    text = hide(facts, running(sources.noise, size), [rng.random() for _ in facts])
    return Item(
        f"The text below assigns values to variables, some by way of other variables. Follow the assignments."
        f"\n\n{text}\n\nWhich variables have the value {value}?",
        f"The {len(names)} variables that have the value {value} are",
        names,
    )


# ---------------------------------------------------------------------- counting words

_COMMON = 10


def _common_words(sources: Sources, size: int, rng: random.Random, _: int) -> Item:
    """A numbered list in which ten words come up more often than the others."""
    example = _word_list(sources, 10, rng, often=3, seldom=1)
    short = sources.length < 4096
    item = _word_list(sources, size, rng, often=6 if short else 30, seldom=1 if short else 3)
    shown = f"{example.text}\n{example.prefix} {', '.join(example.answers)}"
    return Item(f"{shown}\n\n{item.text}", item.prefix, item.answers)


def _word_list(sources: Sources, size: int, rng: random.Random, often: int, seldom: int) -> Item:
    common = rng.sample(sources.words, _COMMON)
    rest = [word for word in vocabulary(sources.words, size + _COMMON, rng) if word not in common][:size]
    listed = common * often + rest * seldom
    rng.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))
    return Item(
        f"Ten words of the following list come up much more often than all others. Find them.\n\n{numbered}\n\n"
        f"Which are the {_COMMON} words that come up most often?",
        f"The {_COMMON} words that come up most often are",
        common,
    )


def _frequent_words(sources: Sources, size: int, rng: random.Random, _: int) -> Item:
    """Invented words whose frequency falls with the square of their rank; the first rank is dots."""
    invented = dict.fromkeys("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6)) for _ in range(400))
    ranked = ["...", *invented]
    total = size + 60  # fewer would not show which words come next to the dots
    words = [word for rank, word in enumerate(ranked, start=1) for _ in range(int(total * 6 / (pi * rank) ** 2))]
    rng.shuffle(words)
    return Item(
        "The following text is in code; its dots mean nothing. Count how often each coded word comes up.\n\n"
        f"{' '.join(words)}\n\nWhich three coded words come up most often?",
        "The three coded words that come up most often are",
        ranked[1:4],
    )


# ---------------------------------------------------------------------- questions over documents


def _questions(sources: Sources, size: int, rng: random.Random, number: int, *, of: str) -> Item:
    """A question, the documents that answer it, and `size` words of other documents, all in random order."""
    known = getattr(sources, of)
    asked = known.questions[number % len(known.questions)]
    related = list(asked.related)
    rng.shuffle(related)
    start = rng.randrange(len(known.documents))
    taken, left = list(asked.documents), size
    for document in (*related, *known.documents[start:], *known.documents[:start]):
        if left <= 0:
            break
        if document not in taken:
            words = document.split(" ")
            taken.append(" ".join(words[:left]))
            left -= len(words)
    random.Random(f"{number}").shuffle(taken)
    listed = "\n\n".join(f"[Document {i}]\n{document}" for i, document in enumerate(taken, start=1))
    return Item(
        "Answer the question at the end in a few words that the documents below contain; give the answer alone."
        f"\n\n{listed}\n\nQuestion: {asked.question}",
        "Answer:",
        list(asked.answers),
        match="any",
    )


KINDS: dict[str, Kind] = {
    "niah_single_1": partial(_needles, haystack="noise"),
    "niah_single_2": partial(_needles, haystack="prose"),
    "niah_single_3": partial(_needles, haystack="prose", value_kind="uuid"),
    "niah_multikey_1": partial(_needles, haystack="prose", names=4),
    "niah_multikey_2": partial(_needles, haystack="needles"),
    "niah_multikey_3": partial(_needles, haystack="needles", name_kind="uuid", value_kind="uuid"),
    "niah_multivalue": partial(_needles, haystack="prose", values=4),
    "niah_multiquery": partial(_needles, haystack="prose", names=4, asked=4),
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
    "qa_1": partial(_questions, of="squad"),
    "qa_2": partial(_questions, of="hotpotqa"),
}
