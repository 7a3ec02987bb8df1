"""A folder that keeps the plain form of GGUF models: what took a minute to unpack is read in a second the next time.

    CACHE/NAME-KEY/source.json    which file this is the plain form of, and what unpacked it
    CACHE/NAME-KEY/tokenizer/     as `save_pretrained` writes it
    CACHE/NAME-KEY/float32/       the model, for each dtype that was asked for

CACHE is what the environment variable LYCHEEDECODE_CACHE says (`off`: keep nothing), else `lycheedecode` in the user's
folder for such things. A part appears whole or not at all; what cannot be written is not kept; a file that changed, or
another version of transformers, starts anew. Deleting the folder is safe at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

VARIABLE = "LYCHEEDECODE_CACHE"
MOST_BYTES = 8 << 30
"""Larger plain forms are not kept."""
_FORMAT = 1
_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """Where plain forms are kept; None: nowhere."""
    said = os.environ.get(VARIABLE, "").strip()
    if said.lower() in ("off", "0", "none", "no", "false"):
        return None
    if said:
        return Path(said).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(home).expanduser() / "lycheedecode"
    except RuntimeError:  # nobody's home
        return None


class Store:
    """What is kept of one GGUF file.

    Args:
        source: the file.
        enabled: False keeps and finds nothing.
    """

    def __init__(self, source: Path, enabled: bool = True) -> None:
        folder = cache_folder() if enabled else None
        self._source = source.resolve()
        key = hashlib.sha256(os.fsencode(self._source)).hexdigest()[:16]
        self._entry = folder and folder / f"{self._source.stem}-{key}"

    def find(self, part: str) -> Path | None:
        """The folder of a part (`tokenizer`, or a dtype), if there is one and it is of this file as it is now."""
        if self._entry is None or not (self._entry / part).is_dir():
            return None
        return self._entry / part if self._stamp_of_entry() == self._stamp() else None

    def keep(self, part: str, size: int, write: Callable[[Path], None]) -> None:
        """Add a part.

        Args:
            part: its name.
            size: bytes that it takes; it must leave as many free.
            write: writes it into a folder.
        """
        if self._entry is None or size > MOST_BYTES:
            return
        try:
            self._begin()
            if shutil.disk_usage(self._entry).free < 2 * size:
                return
            with tempfile.TemporaryDirectory(dir=self._entry, prefix=".partial-") as partial:
                made = Path(partial) / part
                made.mkdir()
                write(made)
                made.rename(self._entry / part)
        except (
            OSError
        ) as error:  # somebody else was faster, the disk is full or read-only: the model is there all the same
            _log.info("Nothing is kept of %s: %s", self._source, error)

    def drop(self, part: str) -> None:
        """Remove a part that cannot be read."""
        if self._entry is not None:
            shutil.rmtree(self._entry / part, ignore_errors=True)

    def _begin(self) -> None:
        """Make the entry; one of an earlier state of the file goes."""
        assert self._entry is not None
        if self._stamp_of_entry() == self._stamp():
            return
        shutil.rmtree(self._entry, ignore_errors=True)
        self._entry.mkdir(parents=True, exist_ok=True)
        partial = self._entry / f"source.json.{os.getpid()}"
        partial.write_text(json.dumps(self._stamp(), indent=2), encoding="utf-8")
        partial.replace(self._entry / "source.json")

    def _stamp(self) -> dict[str, object]:
        status = self._source.stat()
        return {
            "format": _FORMAT,
            "path": str(self._source),
            "bytes": status.st_size,
            "modified": status.st_mtime_ns,
            "transformers": version("transformers"),
            "gguf": version("gguf"),
        }

    def _stamp_of_entry(self) -> object:
        try:
            assert self._entry is not None  # the callers have one
            return json.loads((self._entry / "source.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
