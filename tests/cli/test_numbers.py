"""Every option that takes whole numbers refuses one that is too large, before a model is loaded."""

from collections.abc import Iterator
from importlib import import_module
from inspect import signature
from typing import Any, get_args

import pytest
from test_cli import refusal

from lycheedecode.checks import LARGEST
from lycheedecode.cli import COMMANDS
from lycheedecode.config import MOST_STEPS

NEEDED = {"identify": ["plan.json"], "memory": ["--model", "llama-3-8b", "--context", "1000"]}
"""What commands want beside the option."""


def _commands(app: Any, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for group in app.registered_groups:
        yield from _commands(group.typer_instance, (*name, group.name))
    alone = len(app.registered_commands) == 1 and not app.registered_groups
    for command in app.registered_commands:
        yield name if alone else (*name, command.name or command.callback.__name__), command.callback


def _number_options() -> Iterator[tuple[str, str]]:
    """Commands and their options of one or several whole numbers."""
    for name in COMMANDS:
        for words, function in _commands(import_module(f"lycheedecode.cli.{name}").app, (name,)):
            for parameter in signature(function, eval_str=True).parameters.values():
                kind, *described = get_args(parameter.annotation) or (parameter.annotation,)
                several = bool(described) and getattr(described[0], "metavar", None) == "NUMBERS"
                if int in (kind, *get_args(kind)) or several:
                    names = described[0].default, *(described[0].param_decls or ())  # in Annotated, a name comes first
                    declared = [one for one in names if str(one).startswith("--")]
                    flag = declared[0] if declared else f"--{parameter.name.replace('_', '-')}"
                    yield " ".join(words), flag


OPTIONS = sorted(_number_options())


def test_what_is_found():
    assert {("generate", "--refresh-every"), ("generate", "--max-new-tokens"), ("evaluate tasks", "--lengths"),
            ("bench serving", "--tokens"), ("memory", "--batch"), ("identify", "--seed")} < set(OPTIONS)  # fmt: skip


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_larger_than_any_text(command, option):
    said = refusal(*command.split(), *NEEDED.get(command, []), option, str(10**20))
    most = {"--seed": "64 bits", "--refresh-every": str(MOST_STEPS)}.get(option, str(LARGEST))
    assert str(10**20) in said
    assert most in said
