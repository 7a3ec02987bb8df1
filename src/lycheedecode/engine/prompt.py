"""Prompts in every form that a tokenizer, a chat or a program gives them -> token ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError, first_line

PromptLike = str | Sequence[int] | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Tensor | np.ndarray
"""One prompt: text; token ids; a message (`role` and `content`), or a chat, a list of them; what a tokenizer returns.
What it returns for several texts, and a tensor `[B, S]`, are several prompts."""


class PromptError(InputError):
    """A prompt that cannot be read; the message is one sentence."""


def encode(
    prompts: PromptLike | Sequence[PromptLike], tokenizer: Any = None, chat: bool = False, vocabulary: int = 0
) -> list[list[int]]:
    """Token ids of one or several prompts.

    Args:
        prompts: one prompt, or a list of prompts. Of what a tokenizer returns, tokens with an `attention_mask` of 0 are
            left out.
        tokenizer: needed for text and chats.
        chat: wrap text as one user message in the tokenizer's chat template.
        vocabulary: number of token ids that the model knows; 0 does not check.

    Raises:
        PromptError: not a prompt, an empty one, text without a tokenizer, a chat that the template refuses, ids beyond
            the vocabulary.
    """
    rows = [_encode_one(prompt, tokenizer, chat) for prompt in _split(prompts)]
    check_token_ids(rows, vocabulary)
    return rows


def check_token_ids(rows: Sequence[Sequence[int]], vocabulary: int = 0) -> None:
    """Raise `PromptError` unless there are prompts, none is empty, and their ids are below `vocabulary` (0: any)."""
    if not rows:
        raise PromptError("There is no prompt.")
    for number, row in enumerate(rows):
        which = f"Prompt {number + 1}" if len(rows) > 1 else "The prompt"
        if not len(row):
            raise PromptError("An empty prompt or answer cannot be decoded.")
        if wrong := _unknown(row, vocabulary):
            raise PromptError(f"{which} {wrong}.")


def _unknown(ids: Collection[int], vocabulary: int) -> str:
    """What is wrong with token ids that a model of so many (0: any) does not know; nothing where it knows all."""
    least, most = min(ids), max(ids)
    if least >= 0 and (not vocabulary or most < vocabulary):
        return ""
    limit = f"the model knows 0 to {vocabulary - 1}" if vocabulary else "ids begin at 0"
    remedy = "" if least < 0 else ": use its own tokenizer"
    return f"has the token id {least if least < 0 else most}; {limit}{remedy}"


def token_rows(token_ids: Any) -> list[list[int]]:
    """Sequences of token ids, one a prompt, as plain numbers; a tensor or array is `[B, S]`, or `[S]` for one."""
    if isinstance(token_ids, (Tensor, np.ndarray)):
        rows = _numbers(token_ids)
        return rows if token_ids.ndim == 2 else [rows]
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, (str, bytes)):
        raise PromptError(f"Token ids are a tensor or lists of numbers, not {_kind(token_ids)}.")
    if len(token_ids) and _is_number(token_ids[0]):
        token_ids = [token_ids]
    return [_ids(row) for row in token_ids]


def right_padded(token_ids: Any, vocabulary: int, device: torch.device) -> Tensor:
    """`token_rows` as int64 `[B, longest]`, shorter rows padded with 0; raises `PromptError` as `check_token_ids`."""
    rows = token_rows(token_ids)
    check_token_ids(rows, vocabulary)
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64, device=device)


def stop_conditions(stop: Any, tokenizer: Any, vocabulary: int = 0) -> tuple[list[str], set[int]]:
    """Stop strings and stop tokens.

    Args:
        stop: a string, a token id, or several of them; None is none.
        tokenizer: needed for strings.
        vocabulary: number of token ids that the model knows; 0 does not check.

    Raises:
        ConfigError: something else, an empty string, strings without a tokenizer, or ids beyond the vocabulary.
    """
    if stop is None:
        return [], set()
    if isinstance(stop, str) or _is_number(stop):
        stop = [stop]
    if not isinstance(stop, Iterable) or isinstance(stop, (bytes, Mapping)):
        raise ConfigError(f"stop is a string, a token id or a list of them, not {_kind(stop)}.")
    texts, ids = [], set()
    for condition in stop:
        if isinstance(condition, str):
            texts.append(condition)
        elif _is_number(condition):
            ids.add(int(condition))
        else:
            raise ConfigError(f"stop is a string, a token id or a list of them, not a list with {_kind(condition)}.")
    if texts and (tokenizer is None or not all(texts)):
        raise ConfigError("Stop strings must not be empty, and need a tokenizer.")
    if ids and (wrong := _unknown(ids, vocabulary)):
        raise ConfigError(f"stop {wrong}.")
    return texts, ids


# ---------------------------------------------------------------------- one or several


def _split(prompts: Any) -> Sequence[Any]:
    """One or several prompts as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return _rows_of_batch(prompts) if "input_ids" in prompts else [[prompts]]
    if isinstance(prompts, (Tensor, np.ndarray)):
        return token_rows(prompts)
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise PromptError(f"A prompt is text, token ids or messages, not {_kind(prompts)}.")
    if len(prompts) and (_is_number(prompts[0]) or _is_message(prompts[0])):
        return [prompts]
    return prompts


def _rows_of_batch(batch: Mapping[str, Any]) -> list[list[int]]:
    """What a tokenizer returns, without its padding."""
    rows = token_rows(batch["input_ids"])
    if batch.get("attention_mask") is None:
        return rows
    masks = _mask_rows(batch["attention_mask"])
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise PromptError("input_ids and attention_mask must have the same shape.")
    return [[token for token, seen in zip(row, mask, strict=True) if seen]
            for row, mask in zip(rows, masks, strict=True)]  # fmt: skip


def _mask_rows(mask: Any) -> list[Sequence[Any]]:
    rows = mask.tolist() if isinstance(mask, (Tensor, np.ndarray)) else mask
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise PromptError(f"An attention_mask is a tensor or lists of numbers, not {_kind(mask)}.")
    rows = rows if len(rows) and isinstance(rows[0], (Sequence, Tensor, np.ndarray)) else [rows]
    return [row.tolist() if isinstance(row, (Tensor, np.ndarray)) else row for row in rows]


# ---------------------------------------------------------------------- one prompt


def _encode_one(prompt: Any, tokenizer: Any, chat: bool) -> list[int]:
    if isinstance(prompt, str):
        return _encode_chat([{"role": "user", "content": prompt}], tokenizer) if chat else _tokens(prompt, tokenizer)
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            return _encode_chat([prompt], tokenizer)
        rows = _rows_of_batch(prompt)
        if len(rows) != 1:
            raise PromptError(f"Each of several prompts is one, not a batch of {len(rows)}.")
        return rows[0]
    if isinstance(prompt, Sequence) and len(prompt) and _is_message(prompt[0]):
        return _encode_chat(prompt, tokenizer)
    return _ids(prompt)


def _tokens(text: str, tokenizer: Any, **options: Any) -> list[int]:
    if tokenizer is None:
        raise PromptError("Text prompts need a tokenizer.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"The prompt is not valid Unicode: it has half a surrogate pair at {error.start}.") from None
    return list(tokenizer(text, **options)["input_ids"])


def _encode_chat(messages: Sequence[Any], tokenizer: Any) -> list[int]:
    for message in messages:
        known = set(message) if isinstance(message, Mapping) else set()
        if "role" not in known or not known & {"content", "tool_calls"} or not isinstance(message["role"], str):
            raise PromptError("A message of a chat is a mapping with a role and content.")
    if tokenizer is None:
        raise PromptError("Text prompts need a tokenizer.")
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("This tokenizer has no chat template.")
    messages = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except ImportError as error:  # of jinja2
        raise PromptError(f"The chat template cannot be used: {first_line(error)}.") from error
    except Exception as error:  # templates are programs; they raise what they like
        raise PromptError(f"The chat template refuses these messages: {first_line(error)}.") from error
    return _tokens(text, tokenizer, add_special_tokens=False)


def _ids(row: Any) -> list[int]:
    """Token ids of one prompt."""
    if isinstance(row, (Tensor, np.ndarray)):
        if row.ndim != 1:
            raise PromptError(f"The token ids of one prompt have one dimension, not {row.ndim}.")
        return _numbers(row)
    if not isinstance(row, Sequence) or isinstance(row, (str, bytes, bytearray)):
        raise PromptError(f"A prompt is text, token ids or messages, not {_kind(row)}.")
    for token in row:
        if not _is_number(token):
            raise PromptError(f"A prompt of token ids has {_kind(token)} in it.")
    return [int(token) for token in row]


def _numbers(ids: Tensor | np.ndarray) -> list[Any]:
    kind = str(ids.dtype).removeprefix("torch.")
    if not kind.startswith(("int", "uint")):
        raise PromptError(f"Token ids are whole numbers, not {ids.dtype}.")
    if ids.ndim not in (1, 2):
        raise PromptError(f"Token ids have one or two dimensions, not {ids.ndim}.")
    return ids.tolist()


def _is_number(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0 and not isinstance(value.item(), (float, complex))
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    """Whether it is meant to be one; whether it is a good one, `_encode_chat` says."""
    return isinstance(value, Mapping) and "input_ids" not in value


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, float, str)) else type(value).__name__
