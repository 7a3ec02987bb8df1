"""`python -m experiments.api`: docs/api.md, from the docstrings of what the package exports."""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

import lycheedecode

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
INTRODUCTION = """# API

What `import lycheedecode` offers. `make api` writes this page from docstrings. Their examples run as tests, with a tiny
`model`, its `tokenizer`, a `plan` for it and a `folder`.
"""
_SECTIONS = {"Args:", "Attributes:", "Raises:", "Returns:", "Yields:", "Example:"}


def render() -> str:
    """The page as Markdown."""
    names = [name for name in lycheedecode.__all__ if not name.startswith("_")]
    sections = [_section(name, _exported(name)) for name in names]
    listed = "\n".join(f"- [`{name}`](#{name.lower()})" for name in names)
    return "\n".join([INTRODUCTION, listed, "", *sections])


def _exported(name: str) -> Any:
    """What a name means; of a package that can be called, the function."""
    what = getattr(lycheedecode, name)
    return getattr(what, name) if inspect.ismodule(what) else what


def _section(name: str, what: Any) -> str:
    parts = [f"## {name}\n", _described(name, what)]
    if inspect.isclass(what):
        for member, value in vars(what).items():
            if not member.startswith("_") and _is_own_method(value):
                parts.append(f"### {name}.{member}\n\n{_described(f'{name}.{member}', value)}")
    return "\n".join(parts)


def _is_own_method(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, (classmethod, property))


def _described(name: str, what: Any) -> str:
    function = what.__func__ if isinstance(what, classmethod) else what
    text = _as_markdown(inspect.getdoc(function) or "")
    has_signature = callable(function) and not (inspect.isclass(what) and issubclass(what, Exception))
    return f"```text\n{_signature(name, function)}\n```\n\n{text}\n" if has_signature else f"{text}\n"


def _as_markdown(docstring: str) -> str:
    """A docstring in Google's style: its sections become lists, examples and drawings stay as they are."""
    lines, section, is_example = [], None, False
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.startswith(">>>") != is_example and (line.startswith(">>>") or not line):
            is_example = not is_example
            lines += ["```pycon", line] if is_example else ["```", line]
            continue
        if line.rstrip() in _SECTIONS:
            section = line.rstrip()
            lines += [f"**{section}**", ""]
        elif line.strip() and indent == 0:
            section = None
            lines.append(line)
        elif section in ("Args:", "Attributes:", "Raises:") and indent == 4:
            name, found, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if found else f"- {line.strip()}")
        elif section in ("Returns:", "Yields:", "Args:", "Attributes:", "Raises:") and line.strip():
            lines.append(line.strip() if section in ("Returns:", "Yields:") else f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join([*lines, "```"] if is_example else lines)


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls") and p.name[0] != "_"]
    parameters = [p.replace(annotation=_Bare(p.annotation)) for p in parameters]
    given = signature.return_annotation
    result = "" if given in (inspect.Signature.empty, None, "None") else f" -> {given}"
    shown = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    line = _without_addresses(f"{name}{shown}{result}")
    if len(line) <= 100:
        return line
    star, lines = False, []
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            star = True
            lines.append("    *,")
        lines.append(_without_addresses(f"    {parameter},"))
    return "\n".join([f"{name}(", *lines, f"){result}"])


class _Bare(str):
    """An annotation as it is written: `inspect` puts text in quotes, which only a default should have."""

    def __repr__(self) -> str:
        return str(self)


def _without_addresses(text: str) -> str:
    """Values that Python shows by their place in memory, or as `<factory>`, become `...`."""
    return re.sub(r"<[^<>]* at 0x[0-9a-f]+>|<factory>", "...", text)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.parse_args().out.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
