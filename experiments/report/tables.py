"""Numbers of result files as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any


def table_and_rest(rows: Sequence[Mapping[str, Any]], shown_rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Some rows, and below them all of them, folded."""
    yield from table(shown_rows)
    if len(shown_rows) < len(rows):
        yield from ("", f"<details><summary>All {len(rows)} rows</summary>", "", *table(rows), "", "</details>")


def least_and_most(
    rows: Sequence[Mapping[str, Any]],
    group: Callable[[Mapping[str, Any]], Any],
    value: Callable[[Mapping[str, Any]], float],
) -> list[Mapping[str, Any]]:
    """The rows with the least and the greatest value of every group, in their order."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    kept = [id(pick(members, key=value)) for members in groups.values() for pick in (min, max)]
    return [row for row in rows if id(row) in kept]


def machine_line(environment: Mapping[str, Any]) -> Iterator[str]:
    """One line: machine, versions, commit, date."""
    machine, versions = environment.get("machine") or {}, environment.get("versions") or {}
    gpus = machine.get("gpus") or []
    device = (
        f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores')} cores"
    )
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "vllm") if name in versions)
    parts = [device, packages, f"commit {str(environment.get('commit'))[:10]}", str(environment.get("date", ""))[:10]]
    yield "; ".join(part for part in parts if part)


def result_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a command's result."""
    if "cells" in result:
        for cell, scores in result["cells"].items():
            yield from (f"**{cell}**", "")
            yield from table([{"": name, **_flat(score)} for name, score in scores.items()])
            yield ""
            yield from _along(scores)
    elif "rows" in result:
        yield from table(result["rows"])
    if profiles := result.get("profiles"):
        yield from ("", "<details><summary>Kernels of a step</summary>")
        for profile in profiles:
            yield from _kernels(profile)
        yield from ("", "</details>")
    plain = {name: value for name, value in result.items() if isinstance(value, (int, float, str)) and value != ""}
    if plain:
        yield from ("", *(f"- {_words(name)}: {shown(value, name)}" for name, value in plain.items()))


def _kernels(profile: Mapping[str, Any], most: int = 8) -> Iterator[str]:
    """The kernels that a step spends most time in."""
    what = ", ".join(str(profile[name]) for name in ("form", "part") if name in profile)
    what += f", batch {profile['batch']}, {profile['context']} tokens"
    yield from ("", f"**Kernels of a step: {what}** (traced: small ones are slower than they are)", "")
    first, rest = profile["kernels"][:most], profile["kernels"][most:]
    rows = [{**kernel, "name": f"`{kernel['name'][:60]}`"} for kernel in first]
    if rest:
        rows.append({"name": "others", **{key: sum(kernel[key] for kernel in rest) for key in ("launches", "us")}})
    yield from table(rows)


def _flat(score: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a score that fit a row, whose name says which policy it is."""
    return {name: value for name, value in score.items() if name not in ("policy", "by_position", "kl_of_prompts")}


def _along(scores: Mapping[str, Mapping[str, Any]], long: int = 64) -> Iterator[str]:
    """Mean KL by position, of answers with at least `long` tokens."""
    rows = []
    for label, score in scores.items():
        buckets = score.get("by_position") or ()
        if buckets and buckets[-1]["last"] >= long:
            spans = {f"{bucket['first']} to {bucket['last']}": bucket["kl_mean"] for bucket in buckets}
            rows.append({"mean KL after tokens": label, **spans})
    if rows:
        yield from table(rows)
        yield ""


def variant_lines(variants: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a comparison of ways to identify."""
    ranked = sorted(variants.items(), key=lambda item: item[1]["kl_mean"])
    yield from table(
        [
            {"": name, "retrieval heads": found["retrieval_heads"], "kl_mean": found["kl_mean"], **found["kl"]}
            for name, found in ranked
        ]
    )


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row for each mapping; columns in the order in which their names come first. Mappings stay in the files."""
    names = list(dict.fromkeys(name for row in rows for name in row if not isinstance(row[name], Mapping)))
    yield _row(_words(name) for name in names)
    yield _row("---" if any(isinstance(row.get(name), str) for row in rows) else "---:" for name in names)
    for row in rows:
        yield _row(shown(row.get(name), name) for name in names)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _words(name: str) -> str:
    return name.replace("_", " ")


def shown(value: Any, name: str) -> str:
    """A number as its name asks for."""
    if value is None:
        return ""
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        return str(len(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "bytes" in name:
        return f"{value / 1e6:.2f} MB"
    if name in ("top1_agreement", "same_answer", "exact_match", "share") or name.endswith("_share"):
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
