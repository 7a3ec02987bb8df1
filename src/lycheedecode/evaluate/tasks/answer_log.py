"""The record of an evaluation: a JSON line for every item that an engine answered, written as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...errors import LycheeError
from ...integrations.lm_eval import Answer, Key


class RecordError(LycheeError):
    """A record that cannot be continued; the message is one sentence."""


class Record(MutableMapping[Key, Answer]):
    """Answers by `(policy, request)`; what is stored survives the process.

    Lines about the same answer add up: the answer itself is written at once, what the harness makes of it later. When
    the record is closed, every answer gets one line.

    Args:
        path: the file; None keeps everything in memory.
        settings: what answers depend on besides their request; a file with other settings is refused. Of a setting
            that is a dict, entries may be missing on either side.
        resume: keep what the file holds.

    Raises:
        RecordError: nothing to resume, or something else.
    """

    def __init__(
        self, path: Path | None = None, settings: Mapping[str, Any] | None = None, resume: bool = False
    ) -> None:
        self._path, self._settings = path, dict(settings or {})
        self._lines: dict[Key, dict[str, Any]] = {}
        self._file = None
        if resume:
            self._load()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
            self._file = path.open("a", encoding="utf-8")

    def __getitem__(self, key: Key) -> Answer:
        line = self._lines[key]
        return Answer(**{name: line[name] for name in _ANSWER if name in line})

    def __contains__(self, key: object) -> bool:
        return key in self._lines

    def __setitem__(self, key: Key, answer: Answer) -> None:
        self.note(key, **{name: value for name, value in asdict(answer).items() if value is not None})

    def __delitem__(self, key: Key) -> None:
        del self._lines[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def note(self, key: Key, **facts: Any) -> None:
        """Add facts to what is known of an answer."""
        line = self._lines.setdefault(key, {"policy": key[0], "request": key[1]})
        if all(line.get(name, _MISSING) == value for name, value in facts.items()):
            return
        line.update(facts)
        if self._file is not None:
            self._file.write(_dump({"policy": key[0], "request": key[1], **facts}))
            self._file.flush()

    def close(self) -> None:
        """Write every answer once."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._write()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        assert self._path is not None
        unfinished = self._path.with_name(f"{self._path.name}.part")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(_dump({"settings": self._settings}))
            file.writelines(map(_dump, self._lines.values()))
        unfinished.replace(self._path)  # whoever interrupts this leaves the old file

    def _load(self) -> None:
        if self._path is None or not self._path.is_file():
            raise RecordError("--resume needs the --json file of an interrupted call and the record beside it.")
        first, *lines = self._path.read_text(encoding="utf-8-sig").split("\n")
        try:
            earlier = json.loads(first)["settings"]
            if lines and lines[-1]:  # the last line was cut off while it was written
                lines.pop()
            found = [json.loads(line) for line in lines if line]
            for line in found:
                self._lines.setdefault((line["policy"], line["request"]), {}).update(line)
            complete = isinstance(earlier, dict) and all("prompt_tokens" in line for line in self._lines.values())
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            raise RecordError(f"{str(self._path)!r} is not a record of evaluate tasks.")
        for name, value in self._settings.items():
            if not _agree(value, earlier.get(name)):
                raise RecordError(
                    f"{str(self._path)!r} was made with another {name}: give the same settings, or another file."
                )
            if isinstance(value, dict):
                self._settings[name] = earlier[name] | value


def record_path(result: Path) -> Path:
    """Where the record of a result file lies."""
    return result.with_name(f"{result.stem}.items.jsonl")


def _agree(value: Any, earlier: Any) -> bool:
    """Whether a setting is the same; of settings with names, those that both have."""
    if isinstance(value, dict) and isinstance(earlier, dict):
        return all(value[name] == earlier[name] for name in value.keys() & earlier.keys())
    return value == earlier


def _dump(line: Mapping[str, Any]) -> str:
    # Metrics of the harness may be numpy's numbers, or anything.
    plain = json.dumps(line, ensure_ascii=False, default=lambda value: getattr(value, "item", lambda: str(value))())
    return plain + "\n"


_MISSING = object()
_ANSWER = {field.name for field in fields(Answer)}
