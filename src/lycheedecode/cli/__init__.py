"""The command line: one subcommand per verb; parses, calls, prints.

Exit status: 0 it ran; 1 it ran and the answer is no; 2 bad input, said in one line on stderr; 70 an internal fault,
with its traceback; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from .. import __version__
from .program import Program

COMMANDS = {
    "generate": "Continue a prompt.",
    "identify": "Find the retrieval heads and donors of a model.",
    "inspect": "Show a head plan: which heads retrieve, and whose selection the others reuse.",
    "memory": "Compute how much memory a KV cache needs, on the GPU and on the host, and what makes it fit.",
    "evaluate": "Measure what hybrid attention changes.",
    "bench": "Verify, then time.",
}
"""Each is a module of this package, loaded when it is called: a help text need not wait for PyTorch."""


class _Program(Program):
    summaries = COMMANDS

    def load(self, name: str) -> Any:
        return typer.main.get_command(import_module(f".{name}", __package__).app)


app = typer.Typer(
    name="lycheedecode",
    cls=_Program,
    help="Sparse decoding for long contexts: every head is sparse; a few of them look first.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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
