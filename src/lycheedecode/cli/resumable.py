"""`--resume`: a command continues with the options of the interrupted call, or says that it begins anew."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import typer

from ..errors import ResumeError
from ..results import load_of, same
from .report import errors

Function = TypeVar("Function", bound=Callable[..., Any])

_ALWAYS_FREE = {"resume", "json_file", "verbose", "device", "png", "gates_png", "output", "help_all"}
"""Parameters that may change: what is found does not depend on them."""


def resumable(
    kept_by: Callable[[Mapping[str, Any]], Mapping[str, Any] | None], free: Collection[str] = ()
) -> Callable[[Function], Function]:
    """Let a command with the parameter `resume` take the options that were not given from an interrupted call.

    The command's parameter `options` receives all options, to be kept for such a call. One that is given and differs
    from the interrupted call's is refused with one sentence.

    Args:
        kept_by: the options that were kept, or None where there is nothing to resume; takes the command's arguments.
        free: parameters that may differ, beside those that nothing depends on.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
        paths = {parameter.name for parameter in own if _is_path(parameter.annotation)}

        def command(context: typer.Context, **arguments: Any) -> Any:
            kept = kept_by(arguments) if arguments["resume"] else None
            for name in () if kept is None else set(arguments) - _ALWAYS_FREE:
                value = kept.get(name, signature.parameters[name].default)  # options without a value are not kept
                if not _is_given(context, name):
                    arguments[name] = Path(value) if name in paths and value is not None else value
                elif name not in free and not same(arguments[name], value):
                    raise ResumeError(_said(context, name, value, arguments[name]))
            known = {name: value for name, value in arguments.items() if name not in _ALWAYS_FREE}
            options = {name: value for name, value in known.items() if value is not None}
            return function(**arguments, options=options)

        first = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = sorted([first, *own], key=lambda parameter: parameter.kind)
        command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, __name__
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # of functions
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command  # type: ignore[return-value]  # it shows as another

    return decorate


def options_of(command: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    """A `kept_by`: the options in the `--json` file of an interrupted call of `command`."""

    def kept_options(arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
        path = arguments["json_file"]
        if path is None or str(path) == "-":
            raise ResumeError("--resume needs --json FILE: the file of the interrupted call.")
        return load_of(path, command).options if path.is_file() else None

    return kept_options


def say_it_begins(place: Path) -> None:
    """The line of a call with `--resume` that finds nothing in `place`: the same call may begin and continue."""
    errors.print(f"There is nothing to resume in {place}: this call begins anew.", style="dim")


@contextmanager
def says_what_is_kept(path: Path | None) -> Iterator[None]:
    """On Ctrl-C, say where the work so far is saved, if it is."""
    try:
        yield
    except KeyboardInterrupt:
        if path is not None and path.exists():
            errors.print(f"What was found so far is in {path}: --resume goes on from there.", style="dim")
        raise


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


def _said(context: typer.Context, name: str, kept: Any, given: Any) -> str:
    flags = next(parameter.opts for parameter in context.command.params if parameter.name == name)
    flag = max(flags, key=len)
    before = "no" if kept is None else "another"
    shown = "" if kept is None or isinstance(kept, bool) else f" ({_words(kept)}, not {_words(given)})"
    return f"The interrupted call had {before} {flag}{shown}: leave it out, or start again without --resume."


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _is_path(annotation: Any) -> bool:
    kinds = get_args(annotation)[:1] or (annotation,)
    return any(kind is Path for kind in (*kinds, *get_args(kinds[0])))
