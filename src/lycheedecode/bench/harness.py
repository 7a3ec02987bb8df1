"""What the benchmarks of whole steps share: their command line around the work, and their report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DeviceError, LycheeError
from ..results import Result
from .models import MODELS


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """With the options that all of them have."""
    made = argparse.ArgumentParser(prog=f"bench {name}", description=description)
    numbers = {"type": int, "nargs": "+"}
    names = f"{', '.join(MODELS)} (random weights), or a bundled plan's"
    made.add_argument("--model", default="llama-3-8b", help=names)
    made.add_argument("--layers", type=int, help="of the model, when it is to be cut short")
    made.add_argument("--batches", **numbers, default=[1], help="sequences decoded together")
    made.add_argument("--contexts", **numbers, default=[131072], help="tokens of each sequence")
    made.add_argument("--budget", type=int, default=4096, help="tokens of a selection")
    made.add_argument("--block", type=int, default=32, help="block size")
    made.add_argument("--backend", choices=["ours", "inductor"], default="ours", help="of torch.compile")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--smoke", action="store_true", help="a tiny model, whatever else is said; runs without a GPU")
    made.add_argument("--json", type=Path, help="write the result to this file")
    return made


def main(
    made: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, str], dict[str, Any]],
    arguments: Sequence[str] | None,
    cpu: bool = False,
) -> int:
    """Parse, run, write the report; 0 done, 1 a mismatch, 2 bad input. `cpu`: real models may run on one."""
    options = made.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    try:
        if device == "cpu" and not options.smoke and not (cpu and options.model not in MODELS):
            raise DeviceError("There is no CUDA GPU here: steps are timed on one only. --smoke verifies without.")
        result = run(options, device)
    except LycheeError as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        return error.exit_status
    except torch.OutOfMemoryError as error:
        print(f"{made.prog}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        Result(made.prog, settings).add(**result).save(options.json)
    return 0


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
