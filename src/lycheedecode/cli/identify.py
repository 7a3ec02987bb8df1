"""`lycheedecode identify`: the retrieval heads and donors of a model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..checks import check_model_path
from ..config import HybridConfig
from ..errors import ConfigError, ResumeError
from ..identify import Cell, IdentifySettings, Progress, paper_settings
from ..identify import identify as find_plan
from ..identify.checkpoint import STATE
from ..models.load import DEFAULT_MODEL, load_model
from ..plan import HeadPlan
from ..plan_views import caption, facts
from ..prompts.text import load_text
from ..results import Result, fingerprint, peak_gpu_memory
from .options import (
    Cells,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Resume,
    Revision,
    Verbose,
    parse_cell,
    takes,
    takes_form_with_top_p,
)
from .report import Steps, check_writable, errors, progress, quiet, save, screen
from .resumable import resumable, say_it_begins, says_what_is_kept
from .tiers import HelpAll, tiered

app = typer.Typer(add_completion=False)


_TABLES = ("config", "train_cells", "calibrate_cells", "texts", "completion_factors", "budget_scales")
"""Settings that are no single value; what of them a command line should say has options of its own."""


def _state(output: Path) -> Path:
    """The folder of what an interrupted call found so far."""
    return output.with_name(output.name + ".state")


def _kept(arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
    state = _state(arguments["output"])
    return Result.load(state / "call.json").options if (state / STATE).is_file() else None


@app.command(
    cls=tiered(
        "output preset text calibrate resume png dtype changes_num_retrieval_heads changes_head_budgets "
        "changes_batch_size changes_calibrate_prompts form_budget_tokens form_block_size form_completion"
    )
)
@resumable(_kept)
@takes("changes", IdentifySettings, leave_out=_TABLES)
@takes_form_with_top_p
def identify(
    output: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan to write (JSON).")],
    options: dict[str, Any],
    changes: dict[str, Any],
    form: dict[str, Any],
    model: Model = DEFAULT_MODEL,
    preset: Annotated[
        Literal["default", "paper"], typer.Option(help="Settings that other options change.")
    ] = "default",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Your own text to continue: a file, FILE.jsonl:COLUMN, ... \\[default: code "
            "and prose that come with Python]",
        ),
    ] = None,
    train: Annotated[list[str] | None, Cells] = None,
    calibrate: Annotated[list[str] | None, Cells] = None,
    resume: Resume = False,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw roles and donors; extra: plot.")] = None,
    gates_png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the gates as they polarise (with --roles gates).")
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    json_file: Json = None,
    verbose: Verbose = False,
    help_all: HelpAll = False,
) -> None:
    """Find the retrieval heads and donors of a model."""
    check_writable(output, png, gates_png, json_file)
    check_model_path(model)
    settings = _settings(preset, changes, form, text, train, calibrate)
    state = _state(output)
    if (state / STATE).is_file() and not resume:
        if any(state.glob("*.safetensors")):
            left = f"An interrupted identification left {str(state)!r}"
            raise ResumeError(f"{left}: add --resume, or remove that folder.")
        shutil.rmtree(state)  # nothing was found, as where prompts did not fit the text
    if resume and not (state / STATE).is_file() and output.exists():
        found = HeadPlan.load(output)
        errors.print(
            f"{output} is whole: {caption(found)}. Nothing is left to resume; leave --resume out to find another."
        )
        return
    if resume and not (state / STATE).is_file():
        say_it_begins(state)
    sources = sorted({*settings.texts, *(cell.text for cell in _cells(settings))})
    texts = {source: load_text(source) for source in sources}  # a mistake shows before the model is loaded
    if gates_png is not None and settings.roles != "gates":
        raise ConfigError("--gates-png draws trained gates: add --roles gates.")
    if png is not None or gates_png is not None:
        from ..plan_views.png import require_matplotlib

        require_matplotlib()

    with quiet(verbose):
        with progress(f"Loading {model}"):
            network, tokenizer = load_model(model, device=device, dtype=dtype, device_map=device_map, revision=revision)
        history: list[Progress] = []
        started = time.perf_counter()
        with says_what_is_kept(state), Steps("train" if settings.roles == "gates" else "measure") as steps:

            def report(progress: Progress) -> None:
                if progress.stage == "train" and _is_kept(progress):
                    history.append(progress)
                figures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in progress.figures.items())
                steps.show(progress.stage, progress.step, progress.steps, figures)

            Result("identify", options=options).save(state / "call.json")
            plan = find_plan(network, tokenizer, settings, folder=state, report=report)
        seconds = time.perf_counter() - started
    plan.save(output)
    shutil.rmtree(state, ignore_errors=True)

    screen(json_file).print(f"{output}: {caption(plan)}", soft_wrap=True)
    if png is not None or gates_png is not None:
        from ..plan_views import png as picture

        if png is not None:
            picture.save(plan, png, output.stem)
        if gates_png is not None:
            learnt = [(state.step, state.gate_means) for state in history if state.gate_means is not None]
            picture.save_gates([step for step, _ in learnt], [means for _, means in learnt], gates_png)
    kept = [{"step": state.step, **state.figures, "gate_means": state.gate_means.tolist()} for state in history]
    result = {**facts(plan), "seconds": round(seconds, 1), "peak_gpu_memory_gib": peak_gpu_memory(), "history": kept}
    asked = {"model": model, "preset": preset, **settings.to_dict()}
    save(
        json_file,
        Result("identify", asked, summary=result, fingerprint=fingerprint(network, {output.stem: plan}, texts)),
    )


def _is_kept(progress: Progress, number: int = 50) -> bool:
    """Whether a step belongs to the `number` or so that are written down."""
    every = max(progress.steps // number, 1)
    return progress.step % every == 0 or progress.step in (1, progress.steps)


def _settings(
    preset: str,
    changes: dict[str, Any],
    form: dict[str, Any],
    text: str | None,
    train: list[str] | None,
    calibrate: list[str] | None,
) -> IdentifySettings:
    base = paper_settings() if preset == "paper" else IdentifySettings()
    cells: dict[str, Any] = {} if text is None else {"texts": (text,)}
    for name, given in (("train_cells", train), ("calibrate_cells", calibrate)):
        kinds = tuple(map(parse_cell, given)) if given else getattr(base, name)
        cells[name] = kinds and _with_text(kinds, text)
    return replace(base, config=_changed(base.config, form), **cells, **changes)


def _changed(config: HybridConfig, form: dict[str, Any]) -> HybridConfig:
    """A preset's form with some options changed; what belongs to the budget is replaced as a whole."""
    budget = ("budget_tokens", "budget_ratio", "selection", "top_p", "threshold")
    kept = config.to_dict()
    if any(name in form for name in budget):
        kept = {name: value for name, value in kept.items() if name not in budget}
    return HybridConfig(**{**kept, **form})


def _cells(settings: IdentifySettings) -> tuple[Cell, ...]:
    trained = settings.train_cells if settings.roles == "gates" else ()
    return (*trained, *(settings.calibrate_cells or ()))


def _with_text(cells: tuple[Cell, ...], text: str | None) -> tuple[Cell, ...]:
    return (
        cells if text is None else tuple(replace(cell, text=text) if cell.text == "prose" else cell for cell in cells)
    )
