"""A model from a checkpoint, whole: no weight that the file lacks, none that the model leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .gguf import Header
from .gguf_config import POSITION_TENSORS
from .shape import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_model(name: str, where: str, config: Any, **options: Any) -> PreTrainedModel:
    """Load a decoder with `from_pretrained`, and refuse what it would fill with random numbers.

    Args:
        name: what the user calls the model.
        config: of the model; None: what `from_pretrained` finds.
        where, options: as `AutoModelForCausalLM.from_pretrained` takes them.

    Raises:
        ModelError: not readable, not a decoder, or not the weights of this model; names the first tensor.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "is_encoder_decoder", False):  # a class for its decoder alone may exist, and is asked for below
        raise ModelError(f"The model {name!r} is an encoder-decoder ({config.model_type}); only decoders can be used.")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            where,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({} if config is None else {"config": config}),
            **options,
        )
    except Exception as error:  # whatever transformers and its readers stumble over in a file, it is the file's
        raise not_loaded(name, where, error) from error
    if _is_encoder(model):
        raise ModelError(f"The model {name!r} is an encoder ({type(model).__name__}); only decoders can be used.")
    _check_weights(name, model, info)
    return model


def not_loaded(name: str, where: str | Path, error: Exception) -> Exception:
    """What to raise for an error of transformers; memory that ran out stays what it is.

    Args:
        name: of the model, as it was given.
        where: a folder or file, or the name again: then it may be a hub id.
        error: of transformers.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return error
    if isinstance(error, KeyError):
        return ModelError(f"The model {name!r} cannot be loaded: {error} is missing.")
    missing = _missing(Path(name), str(error))
    if missing:
        return ModelError(f"The folder {name!r} is not a whole model: it has no {missing}.")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Validation of a config says first which of its functions found the error, and then the error.
    said = lines[1].split(": ", 1)[-1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    if str(where) == name and not Path(name).exists():
        return ModelError(
            f"There is no folder or file {name!r}, and it cannot be loaded from the hub: {said.rstrip('.')}."
        )
    return ModelError(f"The model {name!r} cannot be loaded: {said.rstrip('.')}.")


def _missing(folder: Path, said: str) -> str:
    """What a folder lacks, where that is why transformers failed: it names classes, and not the file."""
    if not folder.is_dir():
        return ""
    names = {path.name for path in folder.iterdir()}
    if not names & {"config.json", "adapter_config.json"}:
        return "config.json"
    has_tokenizer = any("token" in name or "vocab" in name or name.endswith(".model") for name in names)
    return "tokenizer (tokenizer.json)" if "tokenizer" in said and not has_tokenizer else ""


def check_gguf(name: str, model: nn.Module, header: Header) -> None:
    """Raise `ModelError` when a model is not all of its GGUF file.

    transformers passes over tensors that a model has no place for (a projection's bias, say), and 5.17 takes any
    shape.
    """
    with torch.device("meta"):
        shapes = {key: weight.shape for key, weight in type(model)(model.config).state_dict().items()}
    for key, weight in model.state_dict().items():
        if weight.shape != shapes.get(key, weight.shape):
            raise _other_shape(name, model, key, weight.shape, shapes[key])
    in_file, in_model = _count_by_block(_file_sizes(header)), _count_by_block(_model_sizes(model))
    for block in sorted(in_file | in_model):
        there, here = in_file.get(block, 0), in_model.get(block, 0)
        if there != here:
            where = "outside of its blocks" if block < 0 else f"in block {block}"
            raise ModelError(
                f"The GGUF file {str(header.path)!r} has {there:,} weights {where}, but {type(model).__name__}, "
                f"as transformers makes it of the file, has {here:,}."
            )


def _file_sizes(header: Header) -> Iterable[tuple[str, int]]:
    for name, (shape, _, _) in header.tensors.items():
        if name not in POSITION_TENSORS:
            size = 1
            for dimension in shape:
                size *= dimension
            yield name, size


def _model_sizes(model: nn.Module) -> Iterable[tuple[str, int]]:
    persistent = model.state_dict(keep_vars=True)
    seen = set()
    for name, tensor in persistent.items():
        if id(tensor) not in seen:  # tied weights are one tensor
            seen.add(id(tensor))
            yield name, tensor.numel()


def _count_by_block(sizes: Iterable[tuple[str, int]]) -> dict[int, int]:
    """Weights of every block, -1 standing for what is in none: the first number in a tensor's name is its block."""
    counts: dict[int, int] = {}
    for name, size in sizes:
        block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        counts[block] = counts.get(block, 0) + size
    return counts


def _is_encoder(model: nn.Module) -> bool:
    """BERT and its kin are decoders only if their config says so; else every token sees those after it."""
    if getattr(model.config, "is_decoder", None) is not False:
        return False
    return any(getattr(module, "is_causal", None) is False for module in model.modules())


def _check_weights(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    kind = type(model).__name__
    order = {key: place for place, key in enumerate(model.state_dict())}
    missing = sorted(info["missing_keys"], key=lambda key: order.get(key, len(order)))
    if missing:
        raise ModelError(
            f"The model {name!r} is not complete: its checkpoint has no {missing[0]}"
            f"{f' nor {len(missing) - 1} others' if len(missing) > 1 else ''}, which {kind} needs."
        )
    if info["mismatched_keys"]:
        key, there, here = min(info["mismatched_keys"], key=lambda item: order.get(item[0], len(order)))
        raise _other_shape(name, model, key, there, here)
    if info.get("error_msgs"):
        raise ModelError(f"The model {name!r} cannot be loaded: {' '.join(str(info['error_msgs'][0]).split())}.")
    modules = dict(model.named_modules())
    for key in sorted(info["unexpected_keys"]):
        parent, _, leaf = key.rpartition(".")
        # What has no module is none of the decoder's: an image encoder, say, or layers that predict further tokens.
        module = modules.get(parent)
        if module is not None and getattr(module, leaf, None) is None and any(True for _ in module.parameters(False)):
            raise ModelError(f"The model {name!r} has a tensor {key} in its checkpoint, which {kind} does not use.")


def _other_shape(name: str, model: nn.Module, key: str, there: Iterable[int], here: Iterable[int]) -> ModelError:
    return ModelError(
        f"The model {name!r} does not fit its config: {key} is {_shape(there)} in the checkpoint, "
        f"but {_shape(here)} in {type(model).__name__}."
    )


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(str(size) for size in sizes)
