"""Prompts to identify and to evaluate with, made over any text."""

from .makers import Cell, Prompt, PromptMaker, makers_for
from .text import TextError, load_text

__all__ = ["Cell", "Prompt", "PromptMaker", "TextError", "load_text", "makers_for"]
