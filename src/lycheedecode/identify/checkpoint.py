"""What an interrupted identification has found so far, kept on disk under the settings that it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ResumeError
from .settings import IdentifySettings


class Checkpoint:
    """Named groups of tensors in a folder, each a file that is replaced as a whole.

    Args:
        folder: where they are kept; None keeps nothing.
        settings: of the identification.

    Raises:
        ValueError: the folder holds the state of an identification with other settings.
    """

    def __init__(self, folder: Path | None, settings: IdentifySettings) -> None:
        self._folder, self._settings = folder, settings.to_dict()
        path = None if folder is None else folder / "settings.json"
        if path and path.is_file() and json.loads(path.read_text(encoding="utf-8")) != self._settings:
            raise ResumeError(
                f"The interrupted identification in {str(folder)!r} had other settings: "
                "give the same ones, or remove that folder."
            )

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under `name`; the first call makes the folder."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "settings.json").is_file():
            partial = self._folder / "settings.partial"
            partial.write_text(json.dumps(self._settings), encoding="utf-8")
            partial.replace(self._folder / "settings.json")
        partial = self._folder / f"{name}.partial"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial)
        partial.replace(self._folder / f"{name}.safetensors")

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors last saved under `name`, on the CPU; None when there are none."""
        if self._folder is None or not (path := self._folder / f"{name}.safetensors").is_file():
            return None
        return load_file(path)
