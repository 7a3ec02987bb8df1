"""What a head plan and a cache need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checks import shown
from ..errors import LycheeError
from .positions import Positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelError(LycheeError):
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
        inner = inner_model(model)
        config = text_config(inner)
        name = type(inner).__name__
        try:
            num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
            num_kv_heads = _kv_heads(config) or num_heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
            kinds = getattr(config, "layer_types", None)
        except (AttributeError, RuntimeError) as error:  # the latter: transformers' own, of sizes that layers differ in
            reason = str(error).split(".")[0]
            raise ModelError(f"{name} is not a decoder with KV heads of one shape ({reason}).") from None
        sizes = num_layers, num_heads, num_kv_heads, head_dim
        if not all(isinstance(size, int) for size in sizes):
            raise ModelError(f"{name} has layers of different shapes, which a head plan cannot describe.")
        if kinds is None:
            # Before `layer_types` a sliding window held for every layer (Mistral).
            kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * num_layers
        return cls(
            str(getattr(inner.config, "name_or_path", "") or name),
            name,
            *sizes,
            max_positions=Positions.of(config).longest,
            global_layers=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
        )

    def check_heads(self, layer: int, kv_heads: int) -> None:
        """Raise `ModelError` unless a layer has as many KV heads as its model's config says."""
        if kv_heads != self.num_kv_heads:
            raise ModelError(
                f"Layer {layer} of {self.architecture} has {kv_heads} KV heads, where its config says "
                f"{self.num_kv_heads}."
            )


def vocabulary_of(model: nn.Module) -> int:
    """How many token ids a model knows; a tokenizer may have fewer."""
    return inner_model(model).get_input_embeddings().weight.shape[0]


def inner_model(model: nn.Module) -> Any:
    """The transformers model that a wrapper (an adapter's, say) holds; the model itself where it is none.

    Raises:
        ModelError: there is none.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        hint = f"; load_model({model!r}) loads one" if isinstance(model, str) else ""
        raise ModelError(f"model must be a transformers model, not {shown(model)}{hint}.")
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ModelError(f"{type(model).__name__} is not a transformers model and does not contain one.")
    return found


def text_config(model: PreTrainedModel) -> Any:
    """The config of the decoder in a transformers model."""
    return model.config.get_text_config(decoder=True)


def positions_of(model: nn.Module) -> Positions:
    """How the position encoding of a model, or of the one in a wrapper, depends on the length of the text."""
    return Positions.of(text_config(inner_model(model)))


def _kv_heads(config: Any) -> int | None:
    return 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None)
