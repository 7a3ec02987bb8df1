"""The command line: one subcommand per verb; parses, calls, prints.

Exit status: 0 it ran; 1 it ran and the answer is no; 2 bad input, said in one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__

COMMANDS = {
    "generate": "Continue a prompt.",
    "identify": "Find the retrieval heads and donors of a model.",
    "inspect": "Show a head plan: who retrieves, and whose selection the others reuse.",
    "evaluate": "Measure what hybrid decoding changes.",
    "bench": "Verify, then time.",
}
"""Each is a module of this package, loaded when it is called: a help text need not wait for PyTorch."""

_PACKAGE = Path(__file__).parents[1]


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

    def main(self, *args: Any, **options: Any) -> None:
        options["standalone_mode"] = False
        try:
            status = super().main(*args, **options)
            if status == 130:  # typer's own word for Ctrl-C
                raise KeyboardInterrupt
        except (Exception, KeyboardInterrupt) as error:
            message = _message(error)
            if message is None:
                raise
            status, line = message
            if line:
                print(f"lycheedecode: {line}", file=sys.stderr)
        sys.exit(status if isinstance(status, int) else 0)


def _message(error: BaseException) -> tuple[int, str] | None:
    """Exit status and one line for an error that a user can mend, None for a bug."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130, "interrupted."
    if hasattr(error, "format_message"):  # wrong usage, as typer reports it
        if not error.format_message():
            return 2, ""  # nothing was given, and the help has been shown
        command = getattr(getattr(error, "ctx", None), "command_path", "lycheedecode")
        return 2, _one_line(f"{error.format_message().rstrip('.')}. See: {command} --help")
    if isinstance(error, ValueError) and _is_ours(error.__traceback__):
        return 2, _one_line(str(error))
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"{str(error.filename)!r} cannot be used: {error.strerror}."
    if type(error).__name__ == "OutOfMemoryError":
        return 2, "The GPU's memory is full: shorten the prompt, or take --device cpu or a smaller model."
    return None


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether the error was raised in this package; its ValueErrors are sentences for the user."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and _PACKAGE in Path(traceback.tb_frame.f_code.co_filename).parents


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
