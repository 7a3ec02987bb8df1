"""What a GGUF file says about heads and positions and transformers leaves out: set in the config, or refused.

transformers 5.17 to 5.24 read most architectures through a table of metadata keys. What is not in the table is dropped
without a word: the type and factor of position scaling, the frequency factors of Llama 3.1 and its successors, Qwen3's
size of a head. A model that lacks them answers well at first and badly in long contexts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .gguf import Header
from .shape import ModelError

_FREQUENCY_FACTORS = "rope_freqs.weight"
_LONG_FACTORS, _SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
POSITION_TENSORS = frozenset({_FREQUENCY_FACTORS, _LONG_FACTORS, _SHORT_FACTORS})
"""Tensors that say how positions are rotated; they are no weights of a model."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Every model with frequency factors that llama.cpp converts was trained with these."""


def complete(config: Any, header: Header) -> None:
    """Set in a decoder's config what the file says, in place.

    Raises:
        ModelError: the file says something that cannot be set.
    """
    config = config.get_text_config(decoder=True)
    _set_head_dim(config, header)
    _set_window(config, header)
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        if header.get("rope.scaling.type") not in (None, "none") or POSITION_TENSORS & set(header.tensors):
            raise _refused(header, "scales positions, which its architecture does not do in transformers")
        return
    nested = rope.get("full_attention") if "rope_type" not in rope else None
    old = rope if nested is None else nested
    new = {**old, **_scaling(config, header, old)}
    theta = header.get("rope.freq_base")
    if theta:
        new["rope_theta"] = float(theta)
    if new["rope_type"] == "longrope" and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = new["original_max_position_embeddings"]  # of Phi-3, read first
    config.rope_parameters = new if nested is None else {**rope, "full_attention": new}


def _refused(header: Header, why: str) -> ModelError:
    return ModelError(f"The GGUF file {str(header.path)!r} {why}.")


def _set_head_dim(config: Any, header: Header) -> None:
    size = header.get("attention.key_length")
    if not size or header.get("attention.key_length_mla"):
        return
    value_size = header.get("attention.value_length")
    if value_size not in (None, size):
        raise _refused(header, f"has keys of {size} and values of {value_size} elements; they must be equal")
    known = {getattr(config, name, None) for name in ("head_dim", "global_head_dim", "d_kv")}
    if size not in known:
        config.head_dim = size


def _set_window(config: Any, header: Header) -> None:
    window = header.get("attention.sliding_window")
    if window is None and header.architecture == "llama":
        window = 0  # files of Mistral are such; its config has a window unless it is told otherwise
    if window is not None and hasattr(config, "sliding_window") and (config.sliding_window or 0) != window:
        config.sliding_window = window or None


def _scaling(config: Any, header: Header, old: dict[str, Any]) -> dict[str, Any]:
    """What to change in `rope_parameters`."""
    kind = header.get("rope.scaling.type") or "none"
    factor = header.get("rope.scaling.factor") or header.get("rope.scale_linear")
    if kind == "none" and header.get("rope.scale_linear"):  # written before there were types
        kind = "linear"
    factors = header.floats(_FREQUENCY_FACTORS)
    if factors is not None and not np.all(factors == 1):
        if kind != "none":
            raise _refused(header, f"scales positions twice: {kind}, and by {_FREQUENCY_FACTORS}")
        return _llama3(config, header, factors, old)
    if kind == "longrope" or _LONG_FACTORS in header.tensors:
        return _longrope(config, header)
    if kind == "none" or old.get("rope_type") == kind:
        return {}
    if kind not in ("linear", "yarn") or not factor or factor < 1:
        raise _refused(header, f"scales positions by {kind} (factor {factor}), which cannot be read")
    return {"rope_type": "linear", "factor": float(factor)} if kind == "linear" else _yarn(config, header, factor)


def _yarn(config: Any, header: Header, factor: float) -> dict[str, Any]:
    for key in ("yarn_log_multiplier", "yarn_ext_factor"):
        if header.get(f"rope.scaling.{key}") not in (None, 1.0):
            raise _refused(header, f"has rope.scaling.{key}, which cannot be read")
    original = header.get("rope.scaling.original_context_length") or config.max_position_embeddings
    new = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)}
    for name in ("beta_fast", "beta_slow"):
        if header.get(f"rope.scaling.yarn_{name}") is not None:
            new[name] = float(header.get(f"rope.scaling.yarn_{name}"))
    gain = header.get("rope.scaling.yarn_attn_factor") or header.get("rope.scaling.attn_factor")
    if gain is not None:  # beside what YaRN itself multiplies cosines and sines with
        new["attention_factor"] = float(gain) * (0.1 * math.log(factor) + 1)
    return new


def _longrope(config: Any, header: Header) -> dict[str, Any]:
    long, short = header.floats(_LONG_FACTORS), header.floats(_SHORT_FACTORS)
    original = header.get("rope.scaling.original_context_length")
    if long is None or short is None or not original:
        raise _refused(
            header, f"scales positions by longrope, without {_LONG_FACTORS}, {_SHORT_FACTORS} or the original length"
        )
    new = {
        "rope_type": "longrope",
        "long_factor": [float(factor) for factor in long],
        "short_factor": [float(factor) for factor in short],
        "original_max_position_embeddings": int(original),
        "factor": config.max_position_embeddings / original,
    }
    gain = header.get("rope.scaling.attn_factor")
    return new if gain is None else {**new, "attention_factor": float(gain)}


def _llama3(config: Any, header: Header, factors: np.ndarray, old: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's parameters, when they make the very factors of the file."""
    theta, highest = float(header.get("rope.freq_base") or old["rope_theta"]), float(factors.max())
    frequencies = theta ** -(np.arange(len(factors)) / len(factors))
    low, high, length = _LLAMA3.values()
    smooth = np.clip((length * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / highest + smooth), rtol=1e-3):
        raise _refused(header, f"has {_FREQUENCY_FACTORS} that are not Llama 3's, which cannot be read")
    return {"rope_type": "llama3", "factor": highest, **_LLAMA3}
