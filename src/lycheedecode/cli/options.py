"""Options that several commands share; those that fill a settings dataclass are made from its fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from ..config import HybridConfig
from ..errors import ConfigError
from ..plan import HeadPlan, bundled_plans

if TYPE_CHECKING:
    from ..identify import Cell

Function = TypeVar("Function", bound=Callable[..., Any])

Model = Annotated[
    str, typer.Option("--model", "-m", help="smollm2-135m (embedded), a directory, a GGUF file, or a hub id.")
]
Plan = Annotated[
    str | None,
    typer.Option("--plan", "-p", help="Head plan: a bundled name or a file. \\[default: the bundled one of the model]"),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Spread the model over several devices: auto, balanced, ... (needs accelerate)."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result with settings, machine, versions and commit."),
]
Cells = typer.Option(
    metavar="TEXT:TOKENS:TASK:COUNT",
    help="A kind of prompt, as code:12288:continuation:64 or prose:2048:passkey:5; may be repeated.",
)
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted call stopped, with its options.")]
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
        option = Annotated[kind | None, typer.Option(declared, help=text, rich_help_panel=settings.__name__)]
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


def load_plan(plan: str | None, model: str) -> HeadPlan:
    """The plan that was asked for, or the bundled one of the model."""
    if plan is None and model not in bundled_plans():
        raise ConfigError(
            f"There is no bundled head plan for {model!r}: give --plan (lycheedecode identify makes one)."
        )
    return HeadPlan.load(plan or model)


def parse_cell(text: str) -> Cell:
    """A kind of prompt from `TEXT:TOKENS:TASK:COUNT`."""
    from ..identify import Cell

    source, *numbers = text.rsplit(":", 3)
    if len(numbers) != 3 or not (_is_count(numbers[0]) and _is_count(numbers[2])):
        raise ConfigError(f"{text!r} is not TEXT:TOKENS:TASK:COUNT, for instance prose:2048:passkey:5.")
    if numbers[1] not in ("continuation", "passkey", "multi_hop"):
        raise ConfigError(f"{text!r}: the task must be continuation, passkey or multi_hop, not {numbers[1]!r}.")
    return Cell(source, int(numbers[0]), numbers[1], int(numbers[2]))  # type: ignore[arg-type]


def parse_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers from `128,256`, each once; none for None."""
    parts = [] if text is None else text.split(",")
    if not all(_is_count(part.strip()) for part in parts):
        raise ConfigError(f"{option} must be whole numbers with commas between them, as 128,256, not {text!r}.")
    return tuple(dict.fromkeys(map(int, parts)))


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def megabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
