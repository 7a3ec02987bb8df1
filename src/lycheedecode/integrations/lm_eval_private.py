"""What we take from private parts of lm-evaluation-harness.

Seen to work in lm_eval 0.4.13; `tests/test_private.py` names the version in which something is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

from ..errors import InputError, first_line

TAKEN = (
    "lm_eval.__main__.cli_evaluate",
    "lm_eval.filters.build_filter_ensemble",
    "lm_eval.models.utils.normalize_gen_kwargs",
    "lm_eval.tasks._yaml_loader.load_yaml",
    "lm_eval.utils.simple_parse_args_string",
)


def run_command(arguments: Sequence[str]) -> None:
    """What `lm_eval ARGUMENTS` does, in this process: it reads `sys.argv` alone.

    Raises:
        InputError: the harness itself refuses its arguments; in other people's code and ours an error stays what it is.
    """
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        *_, (frame, _line) = walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("lm_eval."):
            raise
        raise InputError(f"lm-evaluation-harness cannot do this: {first_line(error)}.") from error
    finally:
        sys.argv = before


def keep_samples(task: Any, samples: int) -> None:
    """Ask for several answers to each item of a task, and hand all of them to its scores."""
    from lm_eval.filters import build_filter_ensemble

    task.set_config("repeats", samples)
    task._filters = [build_filter_ensemble("none", [("take_first_k", {"k": samples})])]


def task_file(*names: str) -> dict[str, Any]:
    """A task's YAML file of the harness, below its folder of tasks, without running what it names."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(lm_eval.tasks.__file__).parent.joinpath(*names), resolve_func=False)
