"""Options that several commands share; those that fill a settings dataclass are made from its fields."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from ..checks import LARGEST, check_model_path, is_count
from ..config import HybridConfig
from ..errors import ConfigError
from ..plan import HeadPlan, bundled_plan_of

if TYPE_CHECKING:
    from ..identify import Cell

Function = TypeVar("Function", bound=Callable[..., Any])

Model = Annotated[str, typer.Option("--model", "-m", help="A folder, GGUF file or hub id; smollm2-135m is embedded.")]
Plan = Annotated[
    str | None,
    typer.Option("--plan", "-p", help="A bundled head plan's name, or a file. \\[default: the model's bundled plan]"),
]
LOADING = "Loading the model"
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.", rich_help_panel=LOADING)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=LOADING)]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the model over several devices: auto, balanced, ... (needs accelerate).", rich_help_panel=LOADING
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=LOADING)]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the result as JSON; with settings, machine, versions and commit."
    ),
]
Cells = typer.Option(
    metavar="TEXT:TOKENS:TASK:COUNT",
    help="A kind of prompt, such as code:12288:continuation:64 or prose:2048:passkey:5; may be repeated.",
)
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue an interrupted call, with its options; where there is none, begin one."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show messages of the underlying libraries.")]


ATTENTION = "Hybrid attention"
_TITLES = {"HybridConfig": ATTENTION, "IdentifySettings": "Identification", "Sampling": "Sampling"}
"""Headings of the help."""


def takes(
    name: str,
    settings: type,
    leave_out: Sequence[str] = (),
    panels: Mapping[str, str] | None = None,
    **flags: str | tuple[str, ...],
) -> Callable[[Function], Function]:
    """Give a command one option for each field of a settings dataclass.

    The command's parameter `name` receives a dict of the options that were given; the dataclass knows the defaults.
    Help comes from its `Attributes` section. Tuples are given with commas, as 1,4. `panels` says under which heading
    of the help a field stands, `flags` renames the options of single fields.
    """
    options = _options(name, settings, leave_out, flags, panels)
    several = {name: kind for name, kind in _several(settings).items() if name in options}

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != name]

        def command(**arguments: Any) -> Any:
            given = {field: arguments.pop(option.name) for field, option in options.items()}
            given = {field: value for field, value in given.items() if value is not None}
            for field in several.keys() & given.keys():
                given[field] = _parts(f"--{field.replace('_', '-')}", given[field], several[field])
            arguments[name] = given
            return function(**arguments)

        parameters = sorted([*own, *options.values()], key=lambda parameter: parameter.kind)
        command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, __name__
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # of functions
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command  # type: ignore[return-value]  # it shows as another

    return decorate


def _options(
    name: str, settings: type, leave_out: Sequence[str], flags: Mapping[str, Any], panels: Mapping[str, str] | None
) -> dict[str, inspect.Parameter]:
    """One command parameter for each field; named after both, because two dataclasses may share a field's name."""
    kinds, helps = get_type_hints(settings), _helps(settings)
    panels = dict.fromkeys(_names(settings), _TITLES[settings.__name__]) if panels is None else panels
    options = {}
    for field in fields(settings):
        if field.name in leave_out:
            continue
        kind, flag = _without_none(kinds[field.name]), field.name.replace("_", "-")
        text, metavar, default = helps.get(field.name, ""), None, field.default
        text = text[:1].upper() + text[1:]
        if isinstance(default, tuple):
            kind, metavar = str, "NUMBERS" if get_args(kind)[0] is int else "NAMES"
            default = ",".join(map(str, default))
        if default is not MISSING and default is not None and default is not False:
            text += f" \\[default: {default}]"
        declared = flags.get(field.name, f"--{flag}/--no-{flag}" if kind is bool and default else f"--{flag}")
        declared = (declared,) if isinstance(declared, str) else declared
        option = Annotated[
            kind | None,  # type: ignore[valid-type]  # made while it runs
            typer.Option(*declared, help=text, metavar=metavar, rich_help_panel=panels.get(field.name)),
        ]
        options[field.name] = inspect.Parameter(
            f"{name}_{field.name}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option
        )
    return options


def _names(settings: type) -> list[str]:
    return [field.name for field in fields(settings)]


def _several(settings: type) -> dict[str, type]:
    """Fields that are tuples, and of what."""
    kinds = get_type_hints(settings)
    return {name: get_args(kinds[name])[0] for name in _names(settings) if get_origin(kinds[name]) is tuple}


def _parts(option: str, text: str, kind: type) -> tuple[Any, ...]:
    return parse_numbers(option, text) if kind is int else tuple(part.strip() for part in text.split(","))


def _helps(settings: type) -> dict[str, str]:
    """What the dataclass and those that it extends say about their fields."""
    helps: dict[str, str] = {}
    for one in reversed(settings.__mro__):
        section = inspect.cleandoc(one.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^ {4}([a-z_, ]+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
        for names, text in entries:
            helps |= {name: " ".join(text.split()).replace("`", "") for name in names.split(", ")}
    return helps


def _without_none(kind: Any) -> Any:
    members = [member for member in get_args(kind) if member is not type(None)]
    return members[0] if type(None) in get_args(kind) and len(members) == 1 else kind


takes_form = takes("form", HybridConfig, leave_out=("verify_every",), top_p="--top-p-mass")
"""The options of a hybrid decode step, given to the command as `form`; `--top-p` is left to sampling.

Rounds belong to generation, which has options of its own for them.
"""
takes_form_with_top_p = takes("form", HybridConfig, leave_out=("verify_every",), top_p=("--top-p", "--top-p-mass"))
"""The same for commands that sample nothing."""


def load_plan(plan: str | None, model: str, device: str = "auto") -> HeadPlan:
    """The plan that was asked for, or the bundled one of the model; else how one is made, and what that takes."""
    check_model_path(model)
    found = bundled_plan_of(model) if plan is None else HeadPlan.load(plan)
    if found is not None:
        return found
    name = f"{Path(model).name.removesuffix('.gguf')}-plan.json"
    command = f"lycheedecode identify {shlex.quote(name)} --model {shlex.quote(model)}"
    takes = "" if (effort := _estimate(model, device)) is None else f" ({effort})"
    raise ConfigError(
        f"There is no head plan for {model!r}: make one with `{command}`{takes}, then add --plan {name}; or generate "
        "with --plan auto, which finds one and keeps it."
    )


def _estimate(model: str, device: str) -> str | None:
    """What an identification would take here; None where the model's config cannot be read at once."""
    import torch
    import transformers

    from ..identify import IdentifySettings
    from ..identify.estimate import estimate

    if not Path(model).is_dir():
        return None
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        found = estimate(config, IdentifySettings(), torch.device(name))
    except (OSError, ValueError, RuntimeError):  # loading it will say what is wrong
        return None
    return f"{found} on this {'GPU' if name.startswith('cuda') else 'CPU'}"


def parse_cell(text: str) -> Cell:
    """A kind of prompt from `TEXT:TOKENS:TASK:COUNT`."""
    from ..identify import Cell

    return Cell.parse(text)


def parse_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers from `128,256`, each once; none for None."""
    parts = [] if text is None else text.split(",")
    if not all(is_count(part.strip()) for part in parts):
        raise ConfigError(
            f"{option} must be whole numbers up to {LARGEST} with commas between them, as 128,256, not {text!r}."
        )
    return tuple(dict.fromkeys(map(int, parts)))


def megabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
