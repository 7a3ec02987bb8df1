"""The command line: one subcommand per verb; parses, calls, prints.

Exit status: 0 it ran; 1 it ran and the answer is no; 2 bad input, said in one line on stderr; 70 a fault of ours, with
its traceback; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..errors import LycheeError

COMMANDS = {
    "generate": "Continue a prompt.",
    "identify": "Find the retrieval heads and donors of a model.",
    "inspect": "Show a head plan: who retrieves, and whose selection the others reuse.",
    "evaluate": "Measure what hybrid decoding changes.",
    "bench": "Verify, then time.",
}
"""Each is a module of this package, loaded when it is called: a help text need not wait for PyTorch."""


class _Program(TyperGroup):
    """The root command; turns what the user can mend into one line and an exit status."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        if self._listing:
            return TyperCommand(name=name, help=COMMANDS[name])
        return typer.main.get_command(import_module(f".{name}", __package__).app)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
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
                print(f"lycheedecode: {line}", file=sys.stderr)
        sys.exit(status if isinstance(status, int) else 0)


_UsageError: type[Any] = typer.BadParameter.__base__  # typer has no public name for it
FAULT = 70
"""Exit status of a fault of ours (EX_SOFTWARE of sysexits.h)."""


def _explain(error: BaseException, args: Sequence[str]) -> tuple[int, str]:
    """Exit status and the line to print for what ended a command that was called with `args`."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130, "interrupted."
    if isinstance(error, _UsageError):
        if not error.format_message():
            return 2, ""  # nothing was given, and the help has been shown
        command = error.ctx.command_path if error.ctx else "lycheedecode"
        return 2, _one_line(f"{error.format_message().rstrip('.')}. See: {command} --help")
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


app = typer.Typer(
    name="lycheedecode",
    cls=_Program,
    help="Hybrid-head sparse decoding: every head is sparse; a few of them look first.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lycheedecode {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command `lycheedecode`."""
    if not {"-v", "--verbose"} & set(sys.argv):
        os.environ.setdefault("TQDM_DISABLE", "1")  # read once, when the libraries that draw bars import tqdm
    app(prog_name="lycheedecode")
