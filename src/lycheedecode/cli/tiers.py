"""Help in two tiers: `--help` has what one decides, in brief; `--help-all` has every option, in full."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_ALWAYS = ("model", "plan", "device", "json_file", "help_all", "help")


class Tiered(TyperCommand):
    """A command with `help_all: HelpAll`; `tiered` makes subclasses."""

    first: tuple[str, ...] = ()
    """Parameters that `--help` shows; none: all of them, in brief."""
    everything = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if self.everything:
            super().format_help(ctx, formatter)
            return
        parameters: list[Any] = self.get_params(ctx)
        before = [(one, one.hidden, one.help) for one in parameters]
        for one in parameters:
            one.hidden = one.hidden or (bool(self.first) and one.name not in self.first)
            one.help = brief(one.help or "")
        try:
            super().format_help(ctx, formatter)
        finally:
            for one, hidden, text in before:
                one.hidden, one.help = hidden, text


def tiered(names: str) -> type[Tiered]:
    """A class of commands whose `--help` shows these parameters, given with spaces between them.

    Those of `options.takes` have two names, as form_block_size.
    """
    return type("_Tiered", (Tiered,), {"first": (*names.split(), *_ALWAYS)})


def brief(text: str) -> str:
    """What a help text says first, and the default."""
    told, mark, default = text.partition(" \\[default: ")
    first = re.split(r"(?<=[\w\])])[.;:] ", told)[0].removesuffix(".")
    return f"{first}{'.' * bool(first)}{mark}{default}"


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        command: Any = context.command
        command.everything = True
        print(context.get_help())
        command.everything = False
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show all options, in full.")
]
