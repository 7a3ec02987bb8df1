"""`lycheedecode bench`: verify, then time. Each benchmark is a module of `bench` with a command line of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)
BENCHMARKS = {
    "ops": "Verify and time the operations of a decode step.",
    "step": "Verify and time whole decode steps of a model.",
    "generate": "Time generations, ours and Hugging Face's.",
    "serving": "Time vLLM, stock and with hybrid decoding.",
}


@app.callback()
def bench() -> None:
    """Verify, then time."""


def _command(name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        raise typer.Exit(import_module(f"...bench.{name}", __name__).main(context.args))

    return run


for _name, _help in BENCHMARKS.items():
    _options = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(_name, help=_help, add_help_option=False, context_settings=_options)(_command(_name))
