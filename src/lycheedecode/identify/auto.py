"""`plan="auto"`: the bundled plan of a model, the one found before, or one that is found now.

What is found is kept in a cache folder under a digest of the model's weights and of the settings, so the next call
takes no time. The folder is `$LYCHEEDECODE_CACHE`, else `lycheedecode` in `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..config import HybridConfig
from ..errors import ConfigError, OutputError
from ..models.load import load_tokenizer
from ..models.routing import supported_shape
from ..models.shape import ModelError
from ..plan import HeadPlan, PlanError, bundled_plan_of
from ..results import digest, fingerprint
from . import identify
from .progress import Progress, Report
from .settings import IdentifySettings


def auto_plan(
    model: nn.Module,
    tokenizer: Any = None,
    config: HybridConfig | None = None,
    *,
    settings: IdentifySettings | None = None,
    folder: str | Path | None = None,
    report: Report | None = None,
    say: Callable[[str], None] | None = None,
) -> HeadPlan:
    """A head plan for a model, wherever it comes from.

    Args:
        model: Hugging Face decoder in eval mode.
        tokenizer: its tokenizer; None: loaded by the model's name if it is needed.
        config: the decode form that the plan is for.
        settings: of an identification; `config` takes the place of theirs.
        folder: of the cache; None: as above.
        report: told how an identification gets on; None: lines on stderr.
        say: told what happens, a sentence each; None: lines on stderr.

    Raises:
        ModelError: a model that cannot be decoded with a plan.
        ConfigError: no tokenizer to identify with.
    """
    say, report = say or _print, report or _Lines()
    shape = supported_shape(model, None)
    if (bundled := bundled_plan_of(shape.name)) is not None and _fits(bundled, model):
        return bundled
    settings = replace(settings or IdentifySettings(), config=_form(config or HybridConfig()))
    known = fingerprint(model)["model"]
    key = digest({"settings": settings.to_dict(), **{name: value for name, value in known.items() if name != "name"}})
    path = Path(folder or cache_folder()) / f"{_slug(shape.name)}-{key}.json"
    if path.is_file():
        try:
            plan = HeadPlan.load(path)
        except PlanError as error:
            say(f"{error} It is made again.")
        else:
            if _fits(plan, model):
                return plan
    tokenizer = tokenizer or _tokenizer(shape.name)
    kept = _is_writable(path.parent)
    where = f"and kept in {path}" if kept else f"but {path.parent} cannot be written, so the next call does it again"
    say(f"No head plan is known for {shape.name}: one is identified now, {where}.")
    plan = identify(model, tokenizer, settings, report=report)
    if kept:
        try:
            plan.save(path)
        except OutputError as error:  # a disk that is full
            say(f"The plan cannot be kept, so the next call identifies again: {error}")
    return plan


def cache_folder() -> Path:
    """Where plans that were found are kept."""
    if given := os.environ.get("LYCHEEDECODE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lycheedecode"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _form(config: HybridConfig) -> HybridConfig:
    """What a plan depends on: not how often a step selects, corrects or verifies, nor on which copies it works."""
    config = replace(config, scan_keys="cache", step_weights="model")
    return replace(config, refresh_every=1, correction_every=0, verify_every=0)


def _fits(plan: HeadPlan, model: nn.Module) -> bool:
    try:
        supported_shape(model, plan)
    except PlanError:
        return False
    return True


def _tokenizer(name: str) -> Any:
    try:
        return load_tokenizer(name)
    except ModelError:
        raise ConfigError(
            f"No head plan is known for {name}, and without its tokenizer none can be found: give the tokenizer."
        ) from None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", Path(name).name.lower()).strip("-") or "model"


def _print(sentence: str) -> None:
    print(f"lycheedecode: {sentence}", file=sys.stderr, flush=True)


class _Lines:
    """A line every ten seconds."""

    def __init__(self) -> None:
        self._said = time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        if time.perf_counter() - self._said > 10 or progress.step == progress.steps:
            self._said = time.perf_counter()
            _print(f"{progress.stage}: {progress.step} of {progress.steps}")
