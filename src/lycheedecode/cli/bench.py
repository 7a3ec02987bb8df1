"""`lycheedecode bench`: verify, then time."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from typing import Any

import typer

from ..bench.settings import (
    BenchSettings,
    GenerateSettings,
    LosslessSettings,
    MemorySettings,
    OpsSettings,
    ServingSettings,
    StepSettings,
)
from ..errors import PackageError
from .options import Json, takes
from .report import check_writable, quiet, save, screen
from .tiers import HelpAll, Tiered

app = typer.Typer(add_completion=False, no_args_is_help=True)

_RENAMED = {
    "--budget": "--budget-tokens",
    "--block": "--block-size",
    "--blocks": "--block-sizes",
    "--pool": "--pool-gib",
}
_SEVERAL = ("--batches", "--contexts", "--block-sizes", "--forms", "--ways", "--cases")


class _Benchmark(Tiered):
    """Also takes options as they were before 0.2: `--batches 1 4` for `--batches 1,4`, `--budget`, `--block`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        new = as_of_now(args)
        if new != args:
            print(f"lycheedecode: this way of writing options will go; write {' '.join(new)}", file=sys.stderr)
        return super().parse_args(ctx, new)


def as_of_now(args: list[str]) -> list[str]:
    """Options as they are written now."""
    new: list[str] = []
    for word in args:
        if len(new) > 1 and new[-2] in _SEVERAL and not word.startswith("-") and not new[-1].startswith("-"):
            new[-1] += f",{word}"
        else:
            new.append(_RENAMED.get(word, word))
    return new


@app.callback()
def bench() -> None:
    """Verify, then time."""


def _run(name: str, settings: BenchSettings, json_file: Any, needs_gpu: bool = True, runs_anywhere: str = "") -> None:
    """`runs_anywhere`: options with which the command runs without a GPU, too."""
    check_writable(json_file)
    with quiet(verbose=False), redirect_stdout(screen(json_file).file):  # rows are printed as they come
        try:
            module, harness = (import_module(f"...bench.{part}", __name__) for part in (name, "harness"))
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise PackageError(
                f"bench {name} times kernels of Triton, which comes with PyTorch on Linux and is not there."
            ) from None
        keep = None if str(json_file) == "-" else partial(save, json_file)
        without_gpu = "--smoke verifies" + (f", and {runs_anywhere} runs" if runs_anywhere else "")
        result = harness.measure(f"bench {name}", settings, module.run, needs_gpu, keep, without_gpu)
    save(json_file, result)


@app.command(cls=_Benchmark)
@takes("given", OpsSettings, panels={})
def ops(given: dict[str, Any], json_file: Json = None, help_all: HelpAll = False) -> None:
    """Verify and time the operations of a decode step."""
    _run("ops", OpsSettings(**given), json_file)


@app.command(cls=_Benchmark)
@takes("given", StepSettings, panels={})
def step(given: dict[str, Any], json_file: Json = None, help_all: HelpAll = False) -> None:
    """Verify and time whole decode steps of a model."""
    _run("step", StepSettings(**given), json_file)


@app.command(cls=Tiered)
@takes("given", LosslessSettings, panels={})
def lossless(given: dict[str, Any], json_file: Json = None, help_all: HelpAll = False) -> None:
    """Verify and time lossless rounds: drafts and the pass that verifies them."""
    settings = LosslessSettings(**given)
    needs_gpu = not set(settings.parts) <= {"real", "exact"}
    _run("lossless", settings, json_file, needs_gpu, "--parts real or exact (--model smollm2-135m)")


@app.command(cls=Tiered)
@takes("given", MemorySettings, leave_out=("budget_tokens",), panels={})
def memory(given: dict[str, Any], json_file: Json = None, help_all: HelpAll = False) -> None:
    """Verify and time generation with the KV cache in host memory."""
    settings = MemorySettings(**given)
    _run("memory", settings, json_file, settings.parts != ("texts",), "--parts texts")


@app.command(cls=_Benchmark)
@takes("given", GenerateSettings, panels={})
def generate(given: dict[str, Any], json_file: Json = None, help_all: HelpAll = False) -> None:
    """Time generation, ours and Hugging Face's."""
    settings = GenerateSettings(**given)
    from ..bench.models import MODELS

    _run("generate", settings, json_file, settings.model in MODELS, "a real model (--model smollm2-135m)")


@app.command(cls=_Benchmark)
@takes("given", ServingSettings, panels={})
def serving(given: dict[str, Any], json_file: Json = None, help_all: HelpAll = False) -> None:
    """Time vLLM with its own attention and with the plugin."""
    _run("serving", ServingSettings(**given), json_file)
