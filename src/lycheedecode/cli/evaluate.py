"""`lycheedecode evaluate`: what hybrid decoding changes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import policies as all_policies
from ..checks import check_number, check_sizes, check_temperature, is_count
from ..config import HybridConfig
from ..errors import ConfigError, PackageError
from ..evaluate.fidelity import CELLS, TEMPERATURE, Long, measure_fidelity
from ..evaluate.scores import overall
from ..evaluate.variants import POLICIES, check_policy, variants
from ..identify import Cell
from ..integrations import lm_eval_private
from ..models.load import DEFAULT_MODEL, load_model
from ..plan import HeadPlan, bundled_plans
from ..prompts.text import load_text
from ..results import Result, fingerprint
from ..results import resume as continued
from .options import (
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Resume,
    Revision,
    Verbose,
    load_plan,
    megabytes,
    parse_cell,
    parse_numbers,
    takes_form_with_top_p,
)
from .report import Steps, check_writable, errors, progress, quiet, save, say_what_is_covered, screen, show_table
from .resumable import options_of, resumable, say_it_begins, says_what_is_kept
from .tasks import FIRST_OF_TASKS, tasks
from .tiers import HelpAll, tiered

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command(cls=FIRST_OF_TASKS)(tasks)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def harness(context: typer.Context) -> None:
    """Call lm-evaluation-harness, which then knows the model class: evaluate harness run --model lycheedecode ..."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PackageError("This needs the package lm_eval: pip install 'lycheedecode[eval]'.")
    import_module("...integrations.lm_eval", __name__)
    lm_eval_private.run_command(context.args)


@app.callback()
def evaluate() -> None:
    """Measure what hybrid attention changes."""


@app.command(
    cls=tiered(
        "cells policies budgets match_bytes prompts batch_size minutes max_kl resume "
        "form_budget_tokens form_block_size form_scan_keys"
    )
)
@resumable(options_of("evaluate fidelity"))
@takes_form_with_top_p
def fidelity(
    options: dict[str, Any],
    form: dict[str, Any],
    model: Model = DEFAULT_MODEL,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan", "-p",
            help="A bundled head plan's name, or a file; may be repeated. \\[default: the model's bundled plan]",
        ),
    ] = None,
    cells: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT:TOKENS:TASK:COUNT",
            help="A kind of prompt, such as code:8192:continuation:64 (continue by 64 tokens), "
            "prose:2048:passkey:5, or prose:2048:long:1024 for a long answer of full attention; may be repeated.",
        ),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help=f"Policies to compare: {', '.join(all_policies.NAMES)}; others take such endings, too; of "
            "several plans, paper@NAME takes one.",
        ),
    ] = ",".join(POLICIES),
    budgets: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Several budgets, such as 128,256,512.")
    ] = None,
    block_sizes: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Several block sizes, such as 16,32.")
    ] = None,
    match_bytes: Annotated[
        bool,
        typer.Option(
            "--match-bytes",
            help="Give every policy the budget at which it reads as much as hybrid with the first plan.",
        ),
    ] = False,
    prompts: Annotated[int, typer.Option(help="Prompts of each kind.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="Start no batch after so many minutes; kinds of prompts share them by length.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and drawn tokens.")] = 0,
    temperature: Annotated[float, typer.Option(help="Temperature of drawn answers; 0 is greedy.")] = TEMPERATURE,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if hybrid's mean KL over all kinds of prompts exceeds this."),
    ] = None,
    resume: Resume = False,
    revision: Revision = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    json_file: Json = None,
    verbose: Verbose = False,
    help_all: HelpAll = False,
) -> None:  # fmt: skip
    """Compare policies' next-token distributions with full attention's, on fresh prompts."""
    check_writable(json_file)
    for name, value in (("--prompts", prompts), ("--batch-size", batch_size)):
        check_number(name, value, 1)
    check_sizes({"seed": seed})
    if minutes is not None and not minutes >= 0:
        raise ConfigError(f"--minutes must be at least 0, not {minutes}.")
    if max_kl is not None and not max_kl >= 0:
        raise ConfigError(f"--max-kl must be at least 0, not {max_kl}.")
    check_temperature("--temperature", temperature)
    names = [name.strip() for name in policies.split(",")]
    for name in names:
        check_policy(name)
    bare = {name.partition("@")[0] for name in names}
    if max_kl is not None and "hybrid" not in bare:
        raise ConfigError("--max-kl is about hybrid, which is not among --policies.")
    sweep = {
        "budget_tokens": parse_numbers("--budgets", budgets),
        "block_size": parse_numbers("--block-sizes", block_sizes),
    }
    for name, values in sweep.items():
        if values and name in form:
            raise ConfigError(f"Give --{name.replace('_', '-')} or several of them, not both.")
    config = HybridConfig(**{name: values[0] for name, values in sweep.items() if values} | form)
    if match_bytes and config.selection not in ("top_k", "ratio"):
        raise ConfigError(f"--match-bytes needs a budget: what {config.selection} reads is not known in advance.")
    kinds = tuple(map(_parse_kind, cells)) if cells else CELLS
    texts = {source: load_text(source) for source in sorted({kind.text for kind in kinds})}
    plans = _plans(plan, model, device, match_bytes or any(map(all_policies.needs_plan, bare)))
    compared = variants(names, plans, config, sweep["budget_tokens"], sweep["block_size"], match_bytes)
    settings = {
        "model": model, "plan": list(plans), "config": config.to_dict(), "cells": list(map(str, kinds)),
        "prompts": prompts, "seed": seed, "policies": [variant.label for variant in compared],
        "match_bytes": match_bytes, "temperature": temperature, "dtype": dtype,
    }  # fmt: skip
    with quiet(verbose):
        with progress(f"Loading {model}"):
            network, tokenizer = load_model(model, device=device, dtype=dtype, device_map=device_map, revision=revision)
        known = fingerprint(network, plans, texts)
        found = Result("evaluate fidelity", settings, fingerprint=known, options=options)
        if resume and json_file is not None:
            kept = continued(json_file, found.command, settings, known)
            if kept is None:
                say_it_begins(json_file)
            found = kept or found
        _keep(json_file, found)

        def on_cell(cell: str, scores: Mapping[str, Any]) -> None:
            nonlocal found
            found = found.with_cells({**found.cells, cell: scores})
            _keep(json_file, found)

        with says_what_is_kept(None if str(json_file) == "-" else json_file), Steps() as steps:
            measured = measure_fidelity(
                network, tokenizer, compared, kinds,
                prompts=prompts, batch_size=batch_size, seed=seed, temperature=temperature, match_bytes=match_bytes,
                minutes=minutes, finished=found.cells, on_cell=on_cell, report=steps.show,
            )  # fmt: skip
    if "hybrid" in bare and not any(sweep.values()):
        say_what_is_covered(max(kind.length for kind in kinds), config.budget_tokens)
    means = overall(measured)
    out = screen(json_file)
    for cell, scores in measured.items():
        _show(out, cell, scores)
    if len(measured) > 1:
        _show(out, "all kinds of prompts", means)
    # Of several plans or budgets, the one that strays most.
    ours = [means[variant.label]["kl_mean"] for variant in compared if variant.policy == "hybrid"]
    result: dict[str, Any] = {"overall": means}
    if ours:
        result |= {"kl_mean": max(ours), "max_kl": max_kl, "faithful": max_kl is None or max(ours) <= max_kl}
        out.print(f"mean KL of the plan: {max(ours):.4f} nats per answer token")
    save(json_file, found.with_cells(measured).add(**result))
    if not result.get("faithful", True):
        errors.print(f"lycheedecode: the mean KL {max(ours):.4f} exceeds {max_kl}.")
        raise typer.Exit(1)


def _keep(path: Path | None, unfinished: Result) -> None:
    """Save what was found so far, for a call that resumes this one."""
    save(None if str(path) == "-" else path, unfinished)


def _parse_kind(text: str) -> Cell | Long:
    """A kind of prompt from `TEXT:TOKENS:TASK:COUNT`; the task may be `long`."""
    source, *numbers = text.rsplit(":", 3)
    if len(numbers) != 3 or numbers[1] != "long":
        return parse_cell(text)
    if not (is_count(numbers[0]) and is_count(numbers[2]) and int(numbers[2]) >= 2):
        raise ConfigError(f"{text!r} is not TEXT:TOKENS:long:COUNT with at least 2 tokens to generate.")
    return Long(source, int(numbers[0]), int(numbers[2]))


def _plans(given: Sequence[str] | None, model: str, device: str, needed: bool) -> dict[str, HeadPlan]:
    """Plans by name; the bundled one of the model where none is given and one is needed or at hand."""
    if not given and not needed and model not in bundled_plans():
        return {}
    plans = (
        {name: load_plan(name, model, device) for name in given} if given else {model: load_plan(None, model, device)}
    )
    # Results do not say where files lie, unless they must.
    short = [Path(name).name.removesuffix(".json") for name in plans]
    return dict(zip(short, plans.values(), strict=True)) if len(set(short)) == len(short) else plans


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kl_mean": ("mean KL\n(nats)", "{:.4f}".format),
    "kl_p99": ("99% KL\n(nats)", "{:.4f}".format),
    "top1_agreement": ("same top\ntoken", "{:.1%}".format),
    "acceptance": ("drafts\ntaken", "{:.1%}".format),
    "first_divergence": ("tokens\nalike", "{:.1f}".format),
    "same_answer": ("same\nanswer", "{:.1%}".format),
    "exact_match": ("right\nanswer", "{:.1%}".format),
    "budget_tokens": ("budget\n(tokens)", str),
    "kv_bytes_per_token": ("KV read\na token", megabytes),
}
"""Headings and forms of what is shown of a score. Tokens alike: until an answer first differs from full attention's."""


def _show(console: Console, title: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
    for label, score in scores.items():
        if "left_out" in score:
            errors.print(f"{title}: {label} is left out. {score['left_out']}", style="dim")
    scores = {label: score for label, score in scores.items() if "left_out" not in score}
    shown = [name for name in _COLUMNS if any(score.get(name) is not None for score in scores.values())]
    rows = [
        [label, *("" if score.get(name) is None else _COLUMNS[name][1](score[name]) for name in shown)]
        for label, score in scores.items()
    ]
    show_table(console, title, ["", *(_COLUMNS[name][0] for name in shown)], rows)
