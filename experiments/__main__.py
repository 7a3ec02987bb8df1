"""`python -m experiments`: how our numbers came about.

Without a word it lists the stages that make docs/results, with what each needs. The other commands look closer, and
take options of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

import experiments.real_models  # noqa: F401  # declares stages
from experiments.stages import STAGES, gpu_name
from experiments.stages import run as run_stage
from lycheedecode.bench.settings import StepSettings
from lycheedecode.cli.options import Json, takes
from lycheedecode.cli.program import Program
from lycheedecode.cli.report import check_writable, save, screen

TOOLS = {
    "linear": ("experiments.linear", "LinearSettings", "run", "The projections of a step against the memory's speed."),
    "linear-rows": (
        "experiments.linear_rows", "LinearRowsSettings", "run", "Linear layers of 17 to 64 rows, by ours and by cuBLAS."
    ),
    "profile": ("experiments.profile_step", None, "run", "Which kernels a decode step consists of."),
    "profile-memory": (
        "experiments.profile_memory", "MemorySettings", "run", "How long layers wait for blocks from host memory."
    ),
    "profile-round": (
        "experiments.profile_step", "LosslessSettings", "run_rounds", "Which kernels the parts of a lossless round are."
    ),
    "ranks": ("experiments.ranks", "RanksSettings", "run", "vLLM on several tensor-parallel ranks and on one."),
    "serving-lossless": (
        "experiments.serving_lossless", "ServedTextSettings", "run", "Real texts in vLLM: stock, hybrid and lossless."
    ),
    "serving-probe": (
        "experiments.serving_probe", "ProbeSettings", "run", "Kernels inside vLLM against their definition."
    ),
    "serving-soak": ("experiments.serving_soak", "SoakSettings", "run", "Clients of all kinds for minutes."),
    "tune-linear": ("experiments.linear", "TuneLinearSettings", "tune", "Search launches of the projections alone."),
    "tune-memory": (
        "experiments.tune_memory", "MemorySettings", "tune", "Search launches of fetches within a step."
    ),
    "tune-ops": ("experiments.tune_ops", "TuneOpsSettings", "tune", "Search launches of scan, select and attend."),
    "tune-step": ("experiments.tune_step", None, "tune", "Search launches of the projections within a step."),
}  # fmt: skip
"""Module, settings (None: those of `bench step`), function, and what it does."""
_ANYWHERE = ("ranks", "serving-lossless", "serving-probe", "serving-soak")
"""What runs without a GPU, too."""


class _Experiments(Program):
    summaries = {name: stage.makes for name, stage in STAGES.items()} | {name: tool[3] for name, tool in TOOLS.items()}

    def load(self, name: str) -> Any:
        own = typer.Typer(add_completion=False)
        own.command(name)(_stage(name) if name in STAGES else _tool(name))
        return typer.main.get_command(own)


app = typer.Typer(
    name="experiments", cls=_Experiments, help=__doc__.splitlines()[0], add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]}, pretty_exceptions_enable=False,
)  # fmt: skip


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is not None:
        return
    out = screen(None)
    out.print(f"{'stage':13} {'minutes':>7}  {'needs':31} what it makes")
    for name, stage in STAGES.items():
        out.print(f"{name:13} {stage.minutes:7}  {stage.needs:31} {stage.makes}", soft_wrap=True, markup=False)
    out.print("\nRun one with: python -m experiments STAGE --out FOLDER\n\nLook closer with:")
    for name, (*_, what) in TOOLS.items():
        out.print(f"{name:13} {what}")


def _stage(name: str) -> Callable[..., None]:
    def run(
        out: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path("build/results"),
        gpu: Annotated[
            str | None, typer.Option(help="What the GPU is called in their names. \\[default: as it says]")
        ] = None,
        model: Annotated[
            str | None, typer.Option(help="A folder, GGUF file or hub id for stages on a real model.")
        ] = None,
        data: Annotated[Path, typer.Option(metavar="DIR", help="Folder of data sets.")] = Path("data"),
        minutes: Annotated[
            float | None, typer.Option(help="End the stage after so many; results are written as they come.")
        ] = None,
        dry: Annotated[bool, typer.Option("--dry", help="Only print the commands.")] = False,
    ) -> None:
        run_stage(name, out.absolute(), gpu or gpu_name(), dry, model=model, data=data, minutes=minutes)

    run.__doc__ = f"Measure: {STAGES[name].makes}. Needs {STAGES[name].needs}, about {STAGES[name].minutes} minutes."
    return run


def _tool(name: str) -> Callable[..., None]:
    module, settings_name, function, what = TOOLS[name]
    loaded = import_module(module)
    settings = StepSettings if settings_name is None else getattr(loaded, settings_name)

    @takes("given", settings, leave_out=("smoke",), panels={})
    def run(given: dict[str, Any], json_file: Json = None) -> None:
        check_writable(json_file)
        from lycheedecode.bench.harness import measure

        asked, keep = settings(**given), None if str(json_file) == "-" else partial(save, json_file)
        work = getattr(loaded, function)
        with redirect_stdout(screen(json_file).file):  # rows are printed as they come
            result = measure(f"experiments {name}", asked, work, name not in _ANYWHERE, keep)
        save(json_file, result)

    run.__doc__ = what
    return run


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    app(prog_name="python -m experiments")
