"""`python -m experiments.with_rows 64 bench lossless ...`: a command with our linear layers up to so many rows.

    --launches FILE   by `linear-rows --json`: its fastest launches, for the shapes and rows that it timed

With 64 and no file the command runs as it would without this; with 16, more rows are left to cuBLAS. It is one of
`lycheedecode`, or of `experiments`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lycheedecode.fusion import operator


@contextmanager
def linear_rows_up_to(rows: int) -> Iterator[None]:
    """What is compiled while this is open has our kernel in linear layers of up to `rows` rows."""
    before, operator.MAX_ROWS = operator.MAX_ROWS, rows
    try:
        yield
    finally:
        operator.MAX_ROWS = before


def launches_of(rows: Iterable[Mapping[str, Any]]) -> dict[Any, Any]:
    """The fastest launches in rows of `linear-rows`, as `fusion.launches.tuned` takes them; norms inside or apart."""
    from lycheedecode.fusion.launches import Kind, LinearTuning

    found = {}
    for row in rows:
        if "launch" in row:
            what = {**row["kind"], "sizes": tuple(row["kind"]["sizes"]), "dtype": torch.bfloat16}
            for norm in {False, what["norm"]}:
                found[Kind(**{**what, "norm": norm})] = LinearTuning(**row["launch"])
    return found


def _run(
    rows: Annotated[
        int, typer.Argument(min=1, max=operator.KERNEL_ROWS, help="Linear layers of up to so many are ours.")
    ],
    command: Annotated[list[str], typer.Argument(help="Of lycheedecode or experiments, with its options.")],
    launches: Annotated[Path | None, typer.Option(exists=True, help="A result file of linear-rows.")] = None,
) -> None:
    from experiments.__main__ import TOOLS
    from experiments.__main__ import app as experiments
    from lycheedecode.cli import app
    from lycheedecode.fusion.launches import tuned

    found = launches_of(json.loads(launches.read_text()).get("result", {}).get("rows", [])) if launches else {}
    if launches and not found:
        raise typer.BadParameter(f"{launches} holds no launches: linear-rows --json writes such a file.")
    with linear_rows_up_to(rows), tuned(found) if found else nullcontext():
        print(f"ours up to {rows} rows, with {len(found)} launches of a file", file=sys.stderr)
        (experiments if command[0] in TOOLS else app)(command)


def main(arguments: list[str] | None = None) -> None:
    """What the command line says; options after the command's name are the command's."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    settings = {"allow_interspersed_args": False, "ignore_unknown_options": False}
    app.command(help=__doc__.splitlines()[0], context_settings=settings)(_run)
    app(arguments, prog_name="python -m experiments.with_rows")


if __name__ == "__main__":
    main()
