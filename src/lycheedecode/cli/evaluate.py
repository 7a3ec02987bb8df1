"""`lycheedecode evaluate`: what hybrid decoding changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import HybridConfig
from ..evaluate.fidelity import CELLS, Score, measure_fidelity, policies
from ..identify import Cell
from ..identify.text import load_text
from ..models import DEFAULT_MODEL, load_model
from .options import (
    Cells,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Plan,
    Revision,
    Verbose,
    load_plan,
    megabytes,
    parse_cell,
    takes_form,
)
from .report import check_writable, errors, progress, quiet, write_json

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def evaluate() -> None:
    """Measure what hybrid decoding changes."""


@app.command()
@takes_form
def fidelity(
    form: dict[str, Any],
    model: Model = DEFAULT_MODEL,
    plan: Plan = None,
    cells: Annotated[list[str] | None, Cells] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of each kind.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the prompts and the random plans.")] = 0,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Also measure the same roles inherited by index, and more.")
    ] = True,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Exit with 1 when the plan's mean KL over all kinds of prompts exceeds this."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the --json file holds already.")] = False,
    revision: Revision = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    json_file: Json = None,
    verbose: Verbose = False,
) -> None:
    """Compare the output distributions of a plan with those of full attention, on fresh prompts."""
    check_writable(json_file)
    for name, value in (("--prompts", prompts), ("--batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
    config, head_plan = HybridConfig(**form), load_plan(plan, model)
    kinds = tuple(map(parse_cell, cells)) if cells else CELLS
    for source in sorted({kind.text for kind in kinds}):
        load_text(source)
    plans = policies(head_plan, config) if controls else {"hybrid": head_plan}
    settings = {
        "model": model, "plan": plan or model, "config": config.to_dict(), "cells": list(map(str, kinds)),
        "prompts": prompts, "seed": seed, "policies": ["full", *plans], "dtype": dtype,
    }  # fmt: skip
    results = _earlier(json_file, settings) if resume else {}

    def on_cell(cell: Cell, scores: dict[str, Score]) -> None:
        results[str(cell)] = {name: vars(score) for name, score in scores.items()}
        write_json(json_file, "evaluate fidelity", settings, {"cells": results})
        errors.print(f"{cell}: mean KL {scores['hybrid'].kl_mean:.4f}", style="dim")

    with quiet(verbose):
        with progress(f"Loading {model}"):
            network, tokenizer = load_model(model, device=device, dtype=dtype, device_map=device_map, revision=revision)
        with progress("Measuring"):
            measured = measure_fidelity(
                network, tokenizer, plans, config, kinds,
                prompts=prompts, batch_size=batch_size, seed=seed, finished=results, on_cell=on_cell,
            )  # fmt: skip
    mean = sum(scores["hybrid"]["kl_mean"] for scores in measured.values()) / len(measured)
    _show(measured)
    print(f"\nmean KL of the plan: {mean:.4f} nats per answer token")
    faithful = max_kl is None or mean <= max_kl
    result = {"cells": measured, "kl_mean": mean, "max_kl": max_kl, "faithful": faithful}
    write_json(json_file, "evaluate fidelity", settings, result)
    if not faithful:
        errors.print(f"lycheedecode: the mean KL {mean:.4f} exceeds {max_kl}.")
        raise typer.Exit(1)


def _earlier(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Cells of an interrupted call's file; refuses one with other settings."""
    if path is None or not path.is_file():
        raise ValueError("--resume needs the --json file of an interrupted call.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        earlier, cells = report["settings"], report["result"]["cells"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{str(path)!r} is not a result file of evaluate fidelity.") from None
    if earlier != settings:
        changed = next(name for name in settings if earlier.get(name) != settings[name])
        raise ValueError(f"{str(path)!r} was made with another {changed}: give the same settings, or another file.")
    return cells


def _show(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for cell, scores in measured.items():
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=cell, title_justify="left")
        for name in ("", "KL mean", "KL p99", "top-1", "exact match", "KV per token"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True, min_width=0 if name else 12)
        for name, score in scores.items():
            table.add_row(
                name, f"{score['kl_mean']:.4f}", f"{score['kl_p99']:.4f}", f"{score['top1_agreement']:.1%}",
                f"{score['exact_match']:.1%}", megabytes(score["kv_bytes_per_token"]),
            )  # fmt: skip
        Console(highlight=False).print(table)
