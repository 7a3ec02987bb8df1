"""`lycheedecode inspect`: look at a head plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..files import write_whole
from ..plan import HeadPlan
from ..results import Result, fingerprint
from .options import Json
from .report import check_writable, progress, save, screen

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    plan: Annotated[str, typer.Argument(help="A bundled plan's name, or a file.", metavar="PLAN")],
    gates: Annotated[bool, typer.Option("--gates", help="Show gate means instead of donors.")] = False,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture (extra: plot).")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page that needs no network.")] = None,
    json_file: Json = None,
) -> None:
    """Show a head plan: which heads retrieve, and whose selection the others reuse."""
    from ..plan_views import facts, page, table
    from ..plan_views import png as picture

    loaded = HeadPlan.load(plan)
    if gates and loaded.gate_means is None:
        raise ConfigError(f"The plan {plan!r} has no gate means: leave out --gates.")
    check_writable(png, html, json_file)
    name = Path(plan).name.removesuffix(".json")
    if png is not None:
        picture.require_matplotlib()
    screen(json_file).print(table.render(loaded, name, gates))
    if png is not None:
        with progress("Drawing"):
            picture.save(loaded, png, name)
    if html is not None:
        write_whole(html, page.render(loaded, name))
    found = {**facts(loaded), "plan": loaded.to_json()}
    save(json_file, Result("inspect", {"plan": name}, summary=found, fingerprint=fingerprint(plans={name: loaded})))
