"""`lycheedecode evaluate tasks`: what policies score on tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from .. import policies as all_policies
from ..checks import check_number
from ..config import HybridConfig
from ..engine.decoder import Execution
from ..errors import ConfigError, PackageError
from ..evaluate.engines import coverage_for, make_engines
from ..evaluate.tasks import TaskOptions, catalogue, evaluate_tasks
from ..evaluate.tasks.summary import averages, rows
from ..evaluate.variants import Variant, variants
from ..models.load import DEFAULT_MODEL, load_model
from ..models.shape import ModelShape
from ..plan import bundled_plans
from ..prompts.makers import Cell
from ..prompts.text import load_text
from ..results import Result, digest_of, fingerprint
from .options import (
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Plan,
    Resume,
    Revision,
    Verbose,
    load_plan,
    megabytes,
    parse_numbers,
    takes_form_with_top_p,
)
from .report import Steps, check_writable, errors, progress, quiet, save, screen, show_table
from .resumable import options_of, resumable, say_it_begins, says_what_is_kept
from .tiers import HelpAll, tiered

if TYPE_CHECKING:
    from rich.console import Console

_CALIBRATION_TOKENS = 2048
_FREE = ("tasks", "lengths", "limit", "samples", "text", "data", "policy", "budgets", "batch_size", "execution")
"""Options that may change when an evaluation continues: answers are kept by policy, task and prompt."""


FIRST_OF_TASKS = tiered(
    "tasks policy budgets lengths limit samples data batch_size resume "
    "form_budget_tokens form_block_size form_scan_keys"
)


@resumable(options_of("evaluate tasks"), free=_FREE)
@takes_form_with_top_p
def tasks(
    options: dict[str, Any],
    form: dict[str, Any],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="ruler, ruler_synthetic (without the two that need data), longbench, aime24, olympiadbench, "
            "gsm8k_many_shot (after worked examples that fill --lengths), single tasks as niah_single_1, or any of the "
            "harness.",
        ),
    ] = "ruler",
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            "--policies",
            metavar="NAMES",
            help=f"Policies to compare with full attention: {', '.join(all_policies.NAMES)}.",
        ),
    ] = "hybrid",
    budgets: Annotated[str | None, typer.Option(metavar="NUMBERS", help="Several budgets, as 128,256,512.")] = None,
    match_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Give every policy the budget at which it reads as much as hybrid at this context."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="NUMBERS", help="Prompt lengths (RULER, GSM8K).")] = "4096",
    limit: Annotated[
        int | None, typer.Option(help="Items per task. \\[default: 100 where --lengths applies, else all]")
    ] = None,
    samples: Annotated[int, typer.Option(help="Solutions to each problem of aime24 and olympiadbench.")] = 1,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of data sets. \\[default: the hub]")
    ] = None,
    text: Annotated[str, typer.Option(help="Prose for RULER's haystacks: prose, or a text as for identify.")] = "prose",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template. \\[default: where the task suits it]"),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Instead of the tasks' own.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Instead of the tasks' own; 0 is greedy.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated items, sampling and intervals.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    execution: Annotated[Execution, typer.Option(help=f"How steps run: {', '.join(get_args(Execution))}.")] = "auto",
    model: Model = DEFAULT_MODEL,
    plan: Plan = None,
    revision: Revision = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    json_file: Json = None,
    resume: Resume = False,
    verbose: Verbose = False,
    help_all: HelpAll = False,
) -> None:  # fmt: skip
    """Score policies on tasks: RULER, LongBench, mathematics, and any of lm-evaluation-harness."""
    check_writable(json_file)
    if importlib.util.find_spec("lm_eval") is None:
        raise PackageError("Tasks need the package lm_eval: pip install 'lycheedecode[eval]'.")
    if not verbose:
        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    asked = TaskOptions(
        lengths=parse_numbers("--lengths", lengths), limit=limit, samples=samples, text=text, data=data, seed=seed,
        chat=chat, batch_size=batch_size, max_new_tokens=max_new_tokens, temperature=temperature,
    )  # fmt: skip
    compared = _variants(policy, budgets, form, plan, model, device, match_bytes)
    if data is not None and not data.is_dir():
        raise ConfigError(f"There is no folder {str(data)!r}.")
    texts = {text: load_text(text)}
    with quiet(verbose), progress("Reading tasks and data sets"):
        names = catalogue.expand([name.strip() for name in tasks.split(",")])
        catalogue.check_data(names, data)
    from ..evaluate.tasks.answer_log import Record, record_path

    path = None if json_file is None or str(json_file) == "-" else record_path(json_file)
    check_writable(path)
    decisive = {
        "revision": revision, "dtype": dtype, "seed": seed, "chat": chat,
        "max_new_tokens": max_new_tokens, "temperature": temperature, "match_bytes": match_bytes,
        "policy": {variant.label: _identity(variant) for variant in compared},
    }  # fmt: skip
    settings = {
        **decisive, "model": model, "plan": plan or model, "tasks": names, "lengths": list(asked.lengths),
        "limit": limit, "samples": samples, "text": text, "data": None if data is None else data.name,
        "batch_size": batch_size,
    }  # fmt: skip
    with quiet(verbose), progress(f"Loading {model}"):
        network, tokenizer = load_model(model, device=device, dtype=dtype, device_map=device_map, revision=revision)
    plans = {variant.plan_name: variant.plan for variant in compared if variant.plan_name and variant.plan}
    known = fingerprint(network, plans, texts)
    found = Result("evaluate tasks", settings, summary={"tasks": []}, fingerprint=known, options=options)
    again = resume and path is not None and path.is_file()
    if resume and path is not None and not again:
        say_it_begins(path)
    with Record(path, {**decisive, **known}, again) as record, quiet(verbose):
        save(json_file if path else None, found)
        with progress("Preparing policies"):
            tokens = min(_CALIBRATION_TOKENS, (ModelShape.of(network).max_positions or 2 * _CALIBRATION_TOKENS) // 2)
            coverage = coverage_for(network, tokenizer, compared, [Cell("prose", tokens), Cell("noise", tokens)])
            engines, left_out = make_engines(network, tokenizer, compared, execution, coverage, match_bytes or 0)
        for label, reason in left_out.items():
            errors.print(f"{label} is left out. {reason}", style="dim")
        with says_what_is_kept(None if str(json_file) == "-" else json_file), Steps() as steps:
            cells = evaluate_tasks(
                engines, names, asked, answers=record, report=steps.show,
                on_cell=lambda cells: save(json_file if path else None, _complete(found, cells, left_out)),
            )  # fmt: skip
    done = _complete(found, cells, left_out)
    save(json_file, done)
    _show(screen(json_file), cells, done.summary["averages"])


def _complete(found: Result, cells: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> Result:
    """With what is known of the tasks so far, so that a run that is cut off says as much as one of fewer tasks."""
    return found.add(rows(cells), averages=averages(cells), left_out=left_out, tasks=cells)


def _variants(
    policy: str,
    budgets: str | None,
    form: dict[str, Any],
    plan: str | None,
    model: str,
    device: str,
    match_bytes: int | None,
) -> list[Variant]:
    names = [name.strip() for name in policy.split(",")]
    for name in names:
        all_policies.check_name(name)
    several = parse_numbers("--budgets", budgets)
    if several and "budget_tokens" in form:
        raise ConfigError("Give --budget-tokens or several --budgets, not both.")
    config = HybridConfig(**({"budget_tokens": several[0]} if several else {}) | form)
    if match_bytes is not None:
        check_number("--match-bytes", match_bytes, 1)
    if match_bytes and config.selection not in ("top_k", "ratio"):
        raise ConfigError("--match-bytes needs a number of tokens, and a selection of top_k or ratio.")
    needed = match_bytes is not None or any(map(all_policies.needs_plan, names))
    plans = {plan or model: load_plan(plan, model, device)} if needed or plan or model in bundled_plans() else {}
    return variants(names, plans, config, several, match_bytes=match_bytes is not None)


def _identity(variant: Variant) -> dict[str, Any]:
    """What a policy's answers depend on."""
    config = variant.config.to_dict()
    names = config if all_policies.has_budget(variant.policy) else ("correction_every",)
    plan = variant.plan if all_policies.needs_plan(variant.policy) else variant.like
    by_plan = {} if plan is None else {"plan": digest_of(plan)}  # whatever the plan is called
    return {"policy": variant.policy, **{name: config[name] for name in names}, **by_plan}


def _show(out: Console, cells: Sequence[Mapping[str, Any]], means: Mapping[str, Mapping[str, float]]) -> None:
    for cell in cells:
        title = cell["task"] if cell["length"] is None else f"{cell['task']}, {cell['length']} tokens"
        if "skipped" in cell:
            errors.print(f"{title}: skipped, {cell['skipped']}.", style="dim")
            continue
        for policy, entry in cell["scores"].items():
            if entry["skipped"]:
                reason = entry["skipped"][0]["reason"]
                errors.print(f"{title}, {policy}: {len(entry['skipped'])} items skipped, as {reason}.", style="dim")
        metrics = dict.fromkeys(metric for entry in cell["scores"].values() for metric in entry["metrics"])
        for i, metric in enumerate(metrics):
            lines = [
                (policy, *_line(entry, entry["metrics"][metric], entry.get("difference") if i == 0 else None))
                for policy, entry in cell["scores"].items()
            ]
            columns = ("", "score", "95%\ninterval", "against\nfull", "items", "tokens an\nanswer", "KV read\na token")
            show_table(out, f"{title}, {metric}", columns, lines)
    for group, values in means.items():
        show_table(out, f"mean of {group}", ("", "score"), [(name, f"{value:.3f}") for name, value in values.items()])


def _line(entry: Mapping[str, Any], found: Mapping[str, Any], difference: Mapping[str, Any] | None) -> tuple[str, ...]:
    span = "" if found["low"] is None else f"{found['low']:.2f}-{found['high']:.2f}"
    change = ""
    if difference is not None:
        sure = difference["low"] is not None and not difference["low"] <= 0 <= difference["high"]
        change = f"{difference['value']:+.3f}{'*' if sure else ' '}"
    read = entry["kv_bytes_per_token"]
    tokens = f"{entry['tokens_per_answer']:.1f}"
    return f"{found['value']:.3f}", span, change, str(entry["items"]), tokens, "" if read is None else megabytes(read)
