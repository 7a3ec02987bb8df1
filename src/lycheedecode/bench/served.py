"""Answers of vLLM's engine, and the time of their tokens while all sequences of a batch decode.

    requests -> engine, step by step -> tokens of all, and when they came    from the last one's first token on
                                                                             until the first one ends

Sequences start one after the other, and with speculation they do not end together. Between these two moments every step
gives tokens to all, so the time between them is that of whole batches: nothing is subtracted that was measured apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from .settings import LEAST_STEPS

TOO_SHORT = "too short to measure (more --tokens)"


class Decoded(NamedTuple):
    """What sequences got.

    Attributes:
        token_ids: of each sequence.
        seconds: from the first request to the last token.
        steps: of the engine, or rounds, in which all sequences decoded.
        step_tokens: that they got in these.
        step_seconds: that these took.
    """

    token_ids: list[list[int]]
    seconds: float
    steps: int
    step_tokens: int
    step_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of all sequences together; None: they decoded together for too few steps to say."""
        return self.step_tokens / self.step_seconds if self.steps >= LEAST_STEPS else None


def decode(llm: Any, prompts: Sequence[Sequence[int]], samplings: Sequence[Any]) -> Decoded:
    """Let vLLM's `LLM` answer prompts; `samplings`: parameters of each.

    Past its `generate`, which hands on nothing before a text is complete.
    """
    began, engine = time.perf_counter(), llm.llm_engine
    for row, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        engine.add_request(str(row), {"type": "token", "prompt_token_ids": list(prompt)}, sampling)
    texts: dict[str, list[int]] = {}
    moments: list[tuple[float, int]] = []
    ended = False
    while engine.has_unfinished_requests():
        outputs = engine.step()
        for output in outputs:
            texts[output.request_id] = list(output.outputs[0].token_ids)
            ended = ended or output.finished
        if outputs and len(texts) == len(prompts) and not ended:
            moments.append((time.perf_counter(), sum(map(len, texts.values()))))
    seconds = time.perf_counter() - began
    token_ids = [texts[str(row)] for row in range(len(prompts))]
    if not moments:
        return Decoded(token_ids, seconds, 0, 0, 0.0)
    (first, before), (last, after) = moments[0], moments[-1]
    return Decoded(token_ids, seconds, len(moments) - 1, after - before, last - first)
