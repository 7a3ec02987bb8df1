"""docs/results/*.json -> docs/results.md: `make results`. No number in the documents is typed by hand.

A result file holds `command`, `settings`, `environment` and `result`. A result is shown by what it has: `cells`
(policies by kind of prompt), `rows` (flat objects, a table row each), and its plain values. A file with `variants`
beside `environment` compares ways to identify.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
INTRODUCTION = "<!-- Made from docs/results/*.json by `make results`; do not edit. -->\n\n# Results\n"


def render(folder: Path = FOLDER) -> str:
    """The document's text."""
    sections = [_section(path) for path in sorted(folder.glob("*.json"))]
    return INTRODUCTION + "\n" + ("\n".join(sections) if sections else "There are no result files yet.\n")


def _section(path: Path) -> str:
    report = json.loads(path.read_text(encoding="utf-8"))
    title = report.get("what") or report.get("command") or path.stem
    lines = [f"## {path.stem}: {title}", "", *_where(report.get("environment") or {}), ""]
    if "variants" in report:
        lines += _variants(report["variants"])
    else:
        lines += _result(report.get("result") or {})
    return "\n".join(lines) + "\n"


def _where(environment: Mapping[str, Any]) -> Iterator[str]:
    machine, versions = environment.get("machine") or {}, environment.get("versions") or {}
    gpus = machine.get("gpus") or []
    device = (
        f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores')} cores"
    )
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "vllm") if name in versions)
    parts = [device, packages, f"commit {str(environment.get('commit'))[:10]}", str(environment.get("date", ""))[:10]]
    yield "; ".join(part for part in parts if part)


def _result(result: Mapping[str, Any]) -> Iterator[str]:
    if "cells" in result:
        for cell, scores in result["cells"].items():
            yield from (f"**{cell}**", "")
            yield from _table([{"": name, **score} for name, score in scores.items()])
            yield ""
    elif "rows" in result:
        yield from _table(result["rows"])
    plain = {name: value for name, value in result.items() if isinstance(value, (int, float, str)) and value != ""}
    if plain:
        yield from ("", *(f"- {_words(name)}: {_value(value, name)}" for name, value in plain.items()))


def _variants(variants: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    ranked = sorted(variants.items(), key=lambda item: item[1]["kl_mean"])
    yield from _table(
        [
            {"": name, "retrieval heads": found["retrieval_heads"], "kl_mean": found["kl_mean"], **found["kl"]}
            for name, found in ranked
        ]
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    yield _row(_words(name) for name in names)
    yield _row("---" if any(isinstance(row.get(name), str) for row in rows) else "---:" for name in names)
    for row in rows:
        yield _row(_value(row.get(name), name) for name in names)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "bytes" in name:
        return f"{value / 1e6:.2f} MB"
    if name in ("top1_agreement", "exact_match", "share") or name.endswith("_share"):
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    target = FOLDER.with_suffix(".md")
    target.write_text(render(), encoding="utf-8")
    print(f"{target.name}: {len(list(FOLDER.glob('*.json')))} result files", file=sys.stderr)
