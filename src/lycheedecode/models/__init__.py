"""Models of Hugging Face transformers: loading them, their shape, and how our attention gets into them."""

from .load import DEFAULT_MODEL, load_model, load_tokenizer
from .routing import AttentionRoute, RoutedAttention, Window, check_plan, route_attention, supported_shape
from .shape import ModelError, ModelShape

__all__ = [
    "DEFAULT_MODEL",
    "AttentionRoute",
    "ModelError",
    "ModelShape",
    "RoutedAttention",
    "Window",
    "check_plan",
    "load_model",
    "load_tokenizer",
    "route_attention",
    "supported_shape",
]
