"""What every command says: progress on stderr, and the machine-readable result."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import InputError, LycheeWarning, OutputError
from ..results import Result

errors = Console(stderr=True, highlight=False, soft_wrap=True)


def check_writable(*paths: Path | None) -> None:
    """Refuse a result file that cannot be written before the work is done, not after it."""
    for path in paths:
        if path is None or str(path) == "-":
            continue
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        target = path if path.exists() else folder
        if path.is_dir() or not folder.is_dir() or not os.access(target, os.W_OK):
            raise OutputError(f"The file {str(path)!r} cannot be written: name one in a folder that you may write to.")


def save(path: Path | None, result: Result) -> None:
    """Write the result of a command; nothing without a path."""
    if path is not None:
        result.save(path)


def screen(json_file: Path | None) -> Console:
    """Where a command prints for people: standard output, unless the result goes there."""
    return Console(stderr=str(json_file) == "-", highlight=False)


def show_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column names the rows; what is wider than the screen comes in several, below each other."""
    from rich.table import Table
    from rich.text import Text

    widths = [max(map(len, "\n".join(cells).split("\n"))) for cells in zip(headings, *rows, strict=True)]
    widths[0] = min(widths[0], max(console.width // 4, 12))
    parts: list[list[int]] = [[]]
    for column in range(1, len(headings)):
        if parts[-1] and widths[0] + sum(widths[i] + 2 for i in (*parts[-1], column)) > console.width:
            parts.append([])
        parts[-1].append(column)
    for number, part in enumerate(parts):
        console.print(Text(f"{title} (more columns)" if number else title, style="italic"))
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column(headings[0], width=widths[0], overflow="fold")
        for column in part:
            table.add_column(headings[column], justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(row[i]) for i in (0, *part)))
        console.print(table)
    console.print()


@contextmanager
def progress(message: str) -> Iterator[None]:
    """Say on stderr what is going on when it takes longer than a second."""
    started = time.perf_counter()
    waiting = threading.Timer(1.0, lambda: errors.print(f"{message} ...", style="dim"))
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()
    if time.perf_counter() - started > 10:
        errors.print(f"{message}: {time.perf_counter() - started:.0f} s", style="dim")


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Keep libraries from writing to stderr, unless `verbose`; our own warnings are a line each."""
    if verbose:
        yield
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as hf_logging

    before, before_hub = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # else two lines each time that it tries again, where there is no network
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", LycheeWarning)  # once each
            warnings.showwarning = _show_ours  # others come here, too, where a library has reset the filters
            yield
    finally:
        logging.captureWarnings(False)
        hf_logging.set_verbosity(before)
        hub_logging.set_verbosity(before_hub)
        if bar:
            hf_logging.enable_progress_bar()


def _show_ours(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, LycheeWarning):
        errors.print(f"lycheedecode: {message}", markup=False)


def say_what_is_covered(tokens: int, capacity: int | None) -> None:
    """A line where the budget covers the context: nothing is saved there, and nothing lost."""
    if capacity is not None and tokens <= capacity:
        errors.print(f"Nothing is sparse here: {tokens:,} tokens, budget {capacity:,}.", style="dim")


def read_text(path: Path) -> str:
    """A text file of the user's; `-` is standard input. Raises `ValueError` with one sentence."""
    name = "standard input" if str(path) == "-" else f"the file {str(path)!r}"
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"There is no file {str(path)!r}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name[0].upper()}{name[1:]} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise InputError(f"{name[0].upper()}{name[1:]} cannot be read: {error.strerror}.") from None


class Steps:
    """Progress of stages with many steps: a bar on a terminal at once, else a line after the first step and then one
    every ten seconds. Both say how long the rest of a stage will take.

    Args:
        first: the stage that comes first.
    """

    def __init__(self, first: str = "") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=errors, disable=not errors.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._first = first
        self._said, self._shown = float("-inf"), time.perf_counter()

    def __enter__(self) -> Steps:
        self._shown = time.perf_counter()
        self._bar.start()
        if self._first:
            self._tasks[self._first] = self._bar.add_task(self._first, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, stage: str, step: int, steps: int, text: str = "") -> None:
        """The steps of a stage done so far, and what they led to; with 0 of them the stage begins."""
        before, self._shown = self._shown, time.perf_counter()
        if step == 0:
            self._began[stage] = self._shown, 0
            return
        began, done = self._began.setdefault(stage, (before, step - 1))
        if step < steps:
            left = (self._shown - began) / (step - done) * (steps - step)
            text = f"{text}, {_span(left)} left".removeprefix(", ")
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task("", total=steps)
        self._bar.update(self._tasks[stage], completed=step, total=steps, description=f"{stage} {text}".strip())
        if not errors.is_terminal and (self._shown - self._said > 10 or step == steps):
            self._said = self._shown
            errors.print(f"{stage}: {step} of {steps}{f', {text}' if text else ''}", style="dim")


def _span(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
