"""GGUF files: what their header says, read without their tensors.

A GGUF file (version 2 or 3, little-endian) is `magic | version | counts | metadata | tensor table | padding | tensors`.
transformers turns tensors into weights; what it leaves out of the metadata, `gguf_config` takes from here.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from .shape import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOAT32 = 0


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself.

    Attributes:
        path: of the file.
        values: the metadata; an array is represented by its number of elements.
        tensors: name -> (shape in PyTorch's order, ggml type, offset in the file).
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], int, int]]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        """A value of the architecture, such as `rope.scaling.type`; None where the file does not say."""
        return self.values.get(f"{self.architecture}.{key}")

    def floats(self, name: str) -> np.ndarray | None:
        """A small float32 tensor; None where there is none."""
        if name not in self.tensors:
            return None
        shape, kind, offset = self.tensors[name]
        if kind != _FLOAT32:
            raise ModelError(f"The tensor {name} of {str(self.path)!r} is not float32.")
        return np.fromfile(self.path, dtype="<f4", count=prod(shape), offset=offset).reshape(shape)


def is_gguf(path: Path) -> bool:
    """Whether a name is one of a GGUF file; `MODEL.GGUF` is."""
    return path.suffix.lower() == ".gguf"


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        ModelError: not a GGUF file, damaged, incomplete, or one part of several.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header, end = _parse(path, data)
            size = len(data)
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, ModelError):
            raise
        said = getattr(error, "strerror", None) or "its header is damaged"
        raise ModelError(f"The GGUF file {str(path)!r} cannot be read: {said}.") from None
    parts = header.values.get("split.count", 0)
    if parts > 1:
        number = header.values.get("split.no", 0) + 1
        raise ModelError(
            f"{str(path)!r} is part {number} of {parts} of a model: join them with `llama-gguf-split --merge`."
        )
    if end > size:
        raise ModelError(f"The GGUF file {str(path)!r} is incomplete: {size:,} of at least {end:,} bytes.")
    return header


def _parse(path: Path, data: mmap.mmap) -> tuple[Header, int]:
    """The header, and where the last tensor ends."""
    from gguf.constants import GGML_QUANT_SIZES

    magic, version, tensor_count, value_count = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF":
        raise ModelError(f"{str(path)!r} is not a GGUF file: it does not begin with GGUF.")
    if version not in (2, 3):
        raise ModelError(f"{str(path)!r} is a GGUF file of version {version}; versions 2 and 3 can be read.")
    at, values = 24, {}
    for _ in range(value_count):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        values[key], at = _value(data, at + 4, kind)
    table = []
    for _ in range(tensor_count):
        name, at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        if dimensions > 4:
            raise ValueError("a tensor has at most four dimensions")
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", data, at + 4)
        at += 16 + 8 * dimensions
        table.append((name, tuple(reversed(shape)), kind, offset))
    alignment = values.get("general.alignment", 32) or 1
    begin = -(-at // alignment) * alignment
    tensors, end = {}, begin
    for name, sizes, kind, offset in table:
        block, size = GGML_QUANT_SIZES.get(kind, (1, 0))
        tensors[name] = sizes, kind, begin + offset
        end = max(end, begin + offset + prod(sizes) // block * size)
    return Header(path, values, tensors), end


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise ValueError("a string reaches beyond the end of the file")
    return data[at + 8 : end].decode("utf-8", "replace"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """One value of the metadata, and where the next begins."""
    if kind in _SCALARS:
        (value,) = struct.unpack_from(f"<{_SCALARS[kind]}", data, at)
        return value, at + struct.calcsize(_SCALARS[kind])
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        raise ValueError("a value of an unknown type")
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in _SCALARS:
        return count, at + count * struct.calcsize(_SCALARS[kind])
    if kind != _STRING:
        raise ValueError("an array of an unknown type")
    unpack, size = struct.Struct("<Q").unpack_from, len(data)
    for _ in range(count):
        at += 8 + unpack(data, at)[0]
        if at > size:
            raise ValueError("a string reaches beyond the end of the file")
    return count, at


_parsing = Lock()


@contextmanager
def parsed_once():
    """Within this context transformers parses a GGUF file once.

    It does so for the config, the tokenizer's config and the weights, 5 s each time for 49,000 tokens, and builds the
    table of tensor names anew for every module.
    """
    import gguf

    with _parsing:
        kept = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = (lru_cache(maxsize=1)(function) for function in kept)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = kept
