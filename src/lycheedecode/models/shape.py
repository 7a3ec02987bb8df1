"""What a head plan and a cache need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import LycheeError


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
