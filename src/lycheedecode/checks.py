"""Values of the wrong type are one sentence, which names the argument."""

from __future__ import annotations

import types
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError


def check_types(settings: Any) -> None:
    """Raise `ConfigError` with the first value of a dataclass that is not of the type its field has."""
    kinds = get_type_hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        if not _is_a(value, kinds[field.name]):
            shown = repr(value)
            shown = shown if len(shown) < 60 else f"{shown[:60]}.."  # and the full stop
            raise ConfigError(f"{field.name} must be {_named(kinds[field.name])}, not {shown}.")


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
