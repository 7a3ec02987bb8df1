"""Generation options of the harness's tasks: honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..engine.sampling import Sampling
from ..errors import LycheeError

_WITHOUT_EFFECT = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0, "length_penalty": 1,
    "early_stopping": False, "num_return_sequences": 1, "n": 1, "min_new_tokens": 0, "min_tokens": 0, "min_p": 0,
    "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None, "min_length": 0, "penalty_alpha": 0,
    "use_cache": True, "ignore_eos": False, "skip_special_tokens": True,
}  # fmt: skip
"""Values at which an option changes nothing."""
_OF_DRAWING = {"min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
"""Options that say nothing about greedy decoding."""


class TaskRequestError(LycheeError):
    """A request that cannot be met; the message is one sentence."""


def sampling_of(kwargs: Mapping[str, Any], temperature: float | None = None) -> Sampling:
    """How a request's tokens are drawn.

    Args:
        kwargs: as `normalize_gen_kwargs` of the harness returns them.
        temperature: instead of the request's.

    Raises:
        TaskRequestError: an option that would change the text, and that `Sampling` does not have; a value that makes no
            sense.
    """
    said = (1.0 if kwargs.get("temperature") is None else kwargs["temperature"]) if kwargs.get("do_sample") else 0.0
    chosen: dict[str, Any] = {"temperature": said if temperature is None else temperature}
    known = {field.name for field in fields(Sampling)} - {"seed"}
    for name, value in kwargs.items():
        if value is None or name in ("do_sample", "until", "max_gen_toks", "temperature"):
            continue
        if name == "top_k" and value == -1:  # as vLLM says all of them
            continue
        if name in known:
            chosen[name] = value
        elif not _is_idle(name, value, greedy=not chosen["temperature"]):
            raise TaskRequestError(
                f"The task asks for generation with {name}={value!r}, which this engine does not have: the answers "
                f"would be those of another decoding (it has {', '.join(sorted(known))})."
            )
    try:
        return Sampling(**{name: _number(name, value) for name, value in chosen.items()})
    except (TypeError, ValueError) as error:
        raise TaskRequestError(f"The task's generation options make no sense: {str(error).rstrip('.')}.") from None


def _is_idle(name: str, value: Any, greedy: bool) -> bool:
    """Whether an option has no effect."""
    if name in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[name]:
        return True
    return greedy and name in _OF_DRAWING


def _number(name: str, value: Any) -> Any:
    return int(value) if name == "top_k" else float(value) if name in ("temperature", "top_p") else value
