"""Result files as the report sees them: what was measured, on which model and machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lycheedecode.results import Result

Row = Mapping[str, Any]
BUSY = frozenset({"cpu-lossless-drafts-smollm2-135m"})
"""Files whose times say nothing, for the machine had other work, too; they were made for what they count."""


@dataclass(frozen=True)
class Source:
    """A result file."""

    name: str
    folder: str
    result: Result

    @property
    def settings(self) -> Row:
        return self.result.settings

    @property
    def rows(self) -> Sequence[Row]:
        return self.result.rows

    @property
    def cells(self) -> Mapping[str, Mapping[str, Row]]:
        """Kind of prompt -> policy -> score, of what measures fidelity; nothing else has any."""
        return self.result.cells

    @property
    def found(self) -> dict[str, Any]:
        """Rows and summary; where there are `cells`, these in place of their rows."""
        found = self.result.to_json()["result"]
        if self.cells:
            rest = {name: value for name, value in found.items() if name not in ("rows", "by_position")}
            return {"cells": self.cells, **rest}
        return found

    @property
    def link(self) -> str:
        return f"[{self.name}]({self.folder}/{self.name}.json)"

    @property
    def date(self) -> str:
        return str(self.result.environment.get("date", ""))

    @property
    def model(self) -> str:
        """The model's name as readers know it; with random weights, that of its shape."""
        name = Path(str(self.settings.get("model") or "smollm2-135m")).name.removesuffix(".gguf")
        known = _MODELS.get(name.lower(), name)
        layers = self.settings.get("layers")
        return f"{known}, {layers} of its layers" if layers else known

    @property
    def machine(self) -> str:
        """`1 x H200`, `2 CPU cores`."""
        machine = self.result.environment.get("machine") or {}
        gpus = machine.get("gpus") or []
        if gpus:
            return f"{len(gpus)} x {gpus[0].removeprefix('NVIDIA ').split()[0]}"
        return f"{machine.get('cores', '?')} CPU cores"

    @property
    def layout(self) -> str | None:
        """Layout of vLLM's cache where it is not NHD, vLLM's own choice."""
        layout = self.settings.get("kv_layout", "auto")
        return None if layout in ("auto", "NHD") else layout

    def version(self, package: str) -> str:
        """`vllm` -> `0.26`; nothing where it was not there."""
        return ".".join(str((self.result.environment.get("versions") or {}).get(package, "")).split(".")[:2])


_MODELS = {
    "llama-3-8b": "Llama-3-8B's shape",
    "llama-3-70b": "Llama-3-70B's shape",
    "qwen3-8b": "Qwen3-8B's shape",
    "qwen3-30b-a3b": "Qwen3-30B-A3B's shape",
    "smollm2-135m": "SmolLM2-135M",
    "coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct",
    "coder-1.5b": "Qwen2.5-Coder-1.5B-Instruct",
    "qwen2.5-coder-0.5b-instruct": "Qwen2.5-Coder-0.5B-Instruct",
    "qwen2.5-coder-1.5b-instruct": "Qwen2.5-Coder-1.5B-Instruct",
}


_RENAMED = {
    "gained": "tokens_per_round",
    "tokens_a_round": "tokens_per_round",
    "stood": "accepted_share",
    "accepted": "accepted_share",
}
"""Names that rows of lossless decoding had in older files."""


def read(folder: Path) -> list[Source]:
    """The result files of a folder."""
    found = [Source(path.stem, folder.name, _load(path)) for path in sorted(folder.glob("*.json"))]
    measured = sorted((one for source in found for one in _yields(source)), key=lambda one: one[0])
    yields = {case: yielded for _, case, yielded in measured}
    return [_with_yields(source, yields) for source in found]


def _load(path: Path) -> Result:
    result = Result.load(path)
    if not result.command.endswith("lossless"):
        return result
    return replace(result, rows=[{_RENAMED.get(name, name): row[name] for name in row} for row in result.rows])


Case = tuple[int | None, int, int, str]
"""A kind of round: budget of its selections, number of drafts, drafts per selection, and their weights."""


def _yields(source: Source) -> Iterator[tuple[int, Case, tuple[float, str]]]:
    """What rounds yielded on real texts: context, kind of round, tokens a round and the model."""
    for row in source.rows:
        way = re.fullmatch(r"(\d+), selected every (\d+)(, 8-bit drafts)?", str(row.get("way")))
        if way and row.get("part") == "real":
            case = source.settings.get("budget_tokens"), int(way[1]), int(way[2]), "float8" if way[3] else "model"
            yield row["context"], case, (row["tokens_per_round"], source.model)


def _with_yields(source: Source, yields: Mapping[Case, tuple[float, str]]) -> Source:
    """Rounds of random weights yield what the same rounds do on a real model, if they were measured there, in the
    longest of its contexts; what was assumed when they were timed counts where they were not."""

    def yielding(row: Row) -> Row:
        if row.get("part") != "rounds":
            return row
        case: Case = source.settings.get("budget_tokens"), row["drafts"], row["refresh"], row.get("weights", "model")
        if case not in yields:
            return row
        per_round, model = yields[case]
        ms = row["round_ms"] / per_round
        found = {"tokens_per_round": per_round, "ms_per_token": ms, "speedup": row["full_ms"] / ms}
        return {**row, **found, "yield_of": model}

    return replace(source, result=replace(source.result, rows=[yielding(row) for row in source.rows]))


@dataclass(frozen=True)
class PromptKind:
    """A kind of prompt: `30000 tokens of code, 64 tokens continued` or `code:30000:continuation:64`."""

    text: str
    length: int
    asked: str

    @property
    def continues(self) -> bool:
        return "continu" in self.asked

    @property
    def title(self) -> str:
        return f"{self.length} tokens of {self.text}, {self.asked}" if self.length else self.text

    @classmethod
    def parse(cls, label: str) -> PromptKind:
        """Read either spelling; a label of neither is a text of no length."""
        if found := re.fullmatch(r"(\d+) tokens of (\S+), (.+)", label):
            return cls(_file_name(found[2]), int(found[1]), found[3])
        if found := re.fullmatch(r"(.+):(\d+):(\w+):(\d+)", label):
            task, count = found[3], found[4]
            asked = f"{count} tokens continued" if task == "continuation" else f"{count} x {task.replace('_', ' ')}"
            return cls(_file_name(found[1]), int(found[2]), asked)
        return cls(label, 0, "")


_TEXTS = {"aa_lcr_v2": "AA-LCR's documents"}


def _file_name(text: str) -> str:
    """`data/essays.csv:text` -> `essays`, unless it has a name: place and column are in the result file."""
    name = re.sub(r"^.*/|\.(csv|jsonl?|txt)(:\w+)?$", "", text)
    return _TEXTS.get(name, name)


def tokens(count: int) -> str:
    """`131072` -> `128K`; round decimal numbers stay as they are."""
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else f"{count}"
