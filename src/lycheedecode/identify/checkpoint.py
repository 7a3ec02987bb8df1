"""What an interrupted identification has found so far, kept on disk under the settings that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..results import Result, resume
from .settings import IdentifySettings

STATE = "state.json"
"""The file of a checkpoint's folder that says what it belongs to."""


class Checkpoint:
    """Named groups of tensors in a folder, each a file that is replaced as a whole.

    Args:
        folder: where they are kept; None keeps nothing.
        settings: of the identification.
        fingerprint: of model and texts, as `results.fingerprint` makes it.

    Raises:
        ResumeError: the folder holds the state of an identification with other settings, or of another model or text.
    """

    def __init__(
        self, folder: Path | None, settings: IdentifySettings, fingerprint: Mapping[str, Any] | None = None
    ) -> None:
        self._folder = folder
        if folder is None:
            return
        asked, known = settings.to_dict(), fingerprint or {}
        mend = "give the same, or remove that folder"
        if resume(folder / STATE, "identify", asked, known, place=folder, mend=mend) is None:
            Result("identify", asked, fingerprint=known).save(folder / STATE)

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under `name`."""
        if self._folder is None:
            return
        partial = self._folder / f"{name}.partial"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial)
        partial.replace(self._folder / f"{name}.safetensors")

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors last saved under `name`, on the CPU; None when there are none."""
        if self._folder is None or not (path := self._folder / f"{name}.safetensors").is_file():
            return None
        return load_file(path)

    def load_all(self, name: str) -> list[dict[str, Tensor]]:
        """What was saved under `NAME-0`, `NAME-1`, ..., as far as it goes."""
        found: list[dict[str, Tensor]] = []
        while (kept := self.load(f"{name}-{len(found)}")) is not None:
            found.append(kept)
        return found
