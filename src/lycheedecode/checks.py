"""Values of the wrong type, and paths to nothing, are one sentence, which names the argument."""

from __future__ import annotations

import os
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError, InputError

Settings = TypeVar("Settings")
LARGEST = 2**31 - 1
"""The largest whole number that users may give, a seed apart: lengths and places are int32 on the device."""
_SEEDS = range(-(2**63), 2**64)
"""Seeds have 64 bits."""
_OWN_MODELS = ("smollm2-135m",)
"""Names of models that are neither on the hub nor paths."""


def check_types(settings: Any) -> None:
    """Raise `ConfigError` with the first value of a dataclass that is too large, or not of its field's type."""
    kinds = get_type_hints(type(settings))
    for field in fields(settings):
        check_type(field.name, getattr(settings, field.name), kinds[field.name])
    check_sizes(vars(settings))


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise `ConfigError` unless the argument `name` is of a type; True and False are no numbers."""
    if not _is_a(value, kind):
        raise ConfigError(f"{name} must be {_named(kind)}, not {shown(value)}.")


def check_number(name: str, value: Any, least: int, most: int = LARGEST) -> None:
    """Raise `ConfigError` unless the argument `name` is a whole number from `least` to `most`."""
    if not _is_a(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {shown(value)}.")
    if value > most:
        raise ConfigError(f"{name} must be at most {most}, not {shown(value)}.")


def check_temperature(name: str, value: Any) -> None:
    """Raise `ConfigError` unless logits can be divided by it: beyond, they would be infinite, or all alike."""
    if value != 0 and not 1e-20 <= value <= 1e20:
        raise ConfigError(f"{name} must be 0, which is greedy, or from 1e-20 to 1e20, not {value}.")


def check_sizes(values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for the first whole number, alone or in a tuple, that is too large; values by name."""
    for name, value in values.items():
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if not _is_a(number, int):
                continue
            if name != "seed":
                check_number(name, number, number)
            elif int(number) not in _SEEDS:  # a range looks for NumPy's numbers one by one
                raise ConfigError(f"seed must have at most 64 bits, unlike {shown(number)}.")


def is_count(text: str) -> bool:
    """Whether a text is a whole number from 0 to `LARGEST`."""
    return text.isdecimal() and len(text) < 20 and int(text) <= LARGEST


def settings_from(kind: type[Settings], given: Any, name: str) -> Settings:
    """Settings of a dataclass, from what users give.

    Args:
        kind: the dataclass.
        given: one of it, a mapping of some of its settings, or None for the defaults.
        name: of the argument.

    Raises:
        ConfigError: something else, or an unknown setting.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} must be of class {kind.__name__} or a mapping of its settings, not {shown(given)}.")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for said in unknown(given, known):
        raise ConfigError(f"{kind.__name__} has no setting {said}.")
    return kind(**given)


def unknown(given: Iterable[Any], known: Collection[str]) -> Iterator[str]:
    """Names that are not known, each with what it may mean: the end of a sentence."""
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=3)
            hint = f"did you mean {' or '.join(near)}? It" if near else "it"
            yield f"{shown(name)}; {hint} knows {', '.join(sorted(known))}"


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ConfigError` for anything that is neither a tokenizer nor None."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise ConfigError(f"tokenizer must be a Hugging Face tokenizer or None, not {shown(tokenizer)}.")


def check_model_path(model: str) -> None:
    """Refuse a path to nothing, with what is there instead; other names may be on the hub."""
    path = Path(model)
    is_path = model.startswith((".", "~", os.sep)) or len(path.parts) > 2 or path.suffix == ".gguf"
    if path.exists():
        return
    if not is_path:
        if (near := get_close_matches(model, _OWN_MODELS, n=1, cutoff=0.8)) and near[0] != model:
            raise InputError(f"There is no model {model!r}: did you mean {near[0]!r}?")
        return
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"There is no model at {model!r}: there is no folder {str(folder)!r}.")
    near = get_close_matches(path.name, (one.name for one in folder.iterdir()), n=1)
    raise InputError(f"There is no model at {model!r}{f': did you mean {str(folder / near[0])!r}?' if near else '.'}")


def shown(value: Any) -> str:
    """A value in a sentence."""
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else f"{text[:60]}.."  # and the full stop


_NUMBERS = {int: Integral, float: Real}
_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def _is_a(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is Literal:
        return any(value == part for part in parts)
    if origin is tuple and parts[1:] == (...,):
        return isinstance(value, (tuple, list)) and all(_is_a(part, parts[0]) for part in value)
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    kind = origin or kind
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _named(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(repr(part) for part in parts)}"
    if origin is tuple:
        return f"a tuple of {_NAMES.get(parts[0], parts[0].__name__)}"
    return _NAMES.get(kind) or f"a {getattr(kind, '__name__', kind)}"
