"""Options that several commands share; those that fill a settings dataclass are made from its fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, get_args, get_type_hints

import typer

from ..config import HybridConfig

Function = TypeVar("Function", bound=Callable[..., Any])

Model = Annotated[
    str, typer.Option("--model", "-m", help="smollm2-135m (embedded), a directory, a GGUF file, or a hub id.")
]
Plan = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--plan", "-p", help="Head plan: a bundled name or a file. \\[default: the bundled one of the model]"),
]
Revision = Annotated[Optional[str], typer.Option(help="Revision of a hub model.")]  # noqa: UP045
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DeviceMap = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Spread the model over several devices: auto, balanced, ... (needs accelerate)."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Json = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", metavar="FILE", help="Write the result with settings, machine, versions and commit."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries underneath report.")]


def takes(name: str, settings: type, leave_out: Sequence[str] = (), **flags: str) -> Callable[[Function], Function]:
    """Give a command one option for each field of a settings dataclass.

    The command's parameter `name` receives a dict of the options that were given; the dataclass knows the defaults.
    Help comes from its `Attributes` section. `flags` renames the options of single fields.
    """
    options = _options(name, settings, leave_out, flags)

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != name]

        def command(**arguments: Any) -> Any:
            given = {field: arguments.pop(option.name) for field, option in options.items()}
            arguments[name] = {field: value for field, value in given.items() if value is not None}
            return function(**arguments)

        parameters = sorted([*own, *options.values()], key=lambda parameter: parameter.kind)
        command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, __name__
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command  # type: ignore[return-value]

    return decorate


def _options(
    name: str, settings: type, leave_out: Sequence[str], flags: dict[str, str]
) -> dict[str, inspect.Parameter]:
    """One command parameter for each field; named after both, because two dataclasses may share a field's name."""
    kinds, helps = get_type_hints(settings), _helps(settings)
    options = {}
    for field in fields(settings):
        if field.name in leave_out:
            continue
        kind, flag = _without_none(kinds[field.name]), field.name.replace("_", "-")
        text = helps.get(field.name, "")
        if field.default is not MISSING and field.default is not None:
            text += f" \\[default: {field.default}]"
        declared = flags.get(field.name, f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}")
        option = Annotated[Optional[kind], typer.Option(declared, help=text, rich_help_panel=settings.__name__)]  # noqa: UP045
        options[field.name] = inspect.Parameter(
            f"{name}_{field.name}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option
        )
    return options


def _helps(settings: type) -> dict[str, str]:
    """What the dataclass says about its fields."""
    section = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}([a-z_, ]+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).replace("`", "") for names, text in entries for name in names.split(", ")}


def _without_none(kind: Any) -> Any:
    members = [member for member in get_args(kind) if member is not type(None)]
    return members[0] if type(None) in get_args(kind) and len(members) == 1 else kind


takes_form = takes("form", HybridConfig, top_p="--top-p-mass")
"""The options of a hybrid decode step, given to the command as `form`; `--top-p` is left to sampling."""
