"""A command-line program whose subcommands are loaded when they are called, and whose errors are sentences.

What the user can mend becomes one line on stderr and an exit status; everything else is an internal fault and shows its
traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import LycheeError

_UsageError: Any = typer.BadParameter.__base__  # typer has no public name for it
FAULT = 70
"""Exit status of an internal fault (EX_SOFTWARE of sysexits.h)."""


def _explain(error: BaseException, args: Sequence[str]) -> tuple[int, str]:
    """Exit status and the line to print for what ended a command that was called with `args`."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130, "interrupted."
    if isinstance(error, _UsageError):
        if not error.format_message():
            return 2, ""  # nothing was given, and the help has been shown
        said = error.format_message().replace(": Value error, ", ": ")  # of pydantic, which typer asks
        command = error.ctx.command_path if error.ctx else "lycheedecode"
        return 2, _one_line(f"{said.removesuffix('.') + '.' * (said[-1] != '?')} See: {command} --help")
    if isinstance(error, LycheeError):
        return error.exit_status, _one_line(str(error))
    if isinstance(error, OSError) and _is_named(error.filename, args):
        return 2, f"{str(error.filename)!r} cannot be used: {error.strerror}."
    if type(error).__name__ == "OutOfMemoryError":  # torch's; its import would take seconds
        return 2, "The GPU's memory is full: shorten the prompt, or take --device cpu or a smaller model."
    return FAULT, "This is a fault of LycheeDecode, not of what you asked: please report it with the lines above."


def _is_named(filename: Any, args: Sequence[str]) -> bool:
    """Whether a file was named on the command line, or lies on the way to one that was."""
    if not isinstance(filename, (str, os.PathLike)):
        return False
    path = Path(filename)
    named = [Path(word) for argument in args for word in (argument, argument.partition("=")[2]) if word]
    return any(path == other or path in other.parents or other in path.parents for other in named)


def _one_line(text: str) -> str:
    return " ".join(text.split())


class Program(TyperGroup):
    """The root command. Subclasses say which commands there are and how one is made."""

    summaries: dict[str, str] = {}  # noqa: RUF012 - subclasses replace it as a whole
    """What every command does, in a sentence: a list of commands need not load them."""

    _listing = False

    def load(self, name: str) -> Any:
        """The command."""
        raise NotImplementedError

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.summaries)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in self.summaries:
            return None
        return TyperCommand(name=name, help=self.summaries[name]) if self._listing else self.load(name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            near = get_close_matches(args[0], self.summaries, n=1) if args else []
            if near:
                error.message = f"{error.message.rstrip('.')}: did you mean {near[0]}?"
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        self._listing = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._listing = False

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> None:
        args = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        try:
            status = super().main(args, *more, **options)
            if status == 130:  # typer's own word for Ctrl-C
                raise KeyboardInterrupt
        except (Exception, KeyboardInterrupt) as error:
            status, line = _explain(error, args)
            if status == FAULT:
                traceback.print_exception(error)
            if line:
                print(f"{self.name}: {line}", file=sys.stderr)
        sys.exit(status if isinstance(status, int) else 0)
