"""Files are written as a whole, or not at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .errors import OutputError


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file, and the folders above it; whoever interrupts this leaves what was there.

    A link stays one: what it points to is written. Pipes and devices, as /dev/stdout, take the text as it comes.

    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    partial = None
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except BaseException as error:
        if partial is not None:
            with suppress(OSError):
                partial.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"The file {str(path)!r} cannot be written: {error.strerror or error}.") from error
        raise
