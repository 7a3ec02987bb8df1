"""Runs decode steps the fastest way that works where the model is.

    compiled   the model compiled as a whole, replayed as a CUDA graph
    graph      the model as it is, replayed as a CUDA graph
    eager      the model as it is

Off a GPU the first two run without a graph: slower than eager, but the same computation.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..attention import DecodeAttention
from ..errors import ConfigError
from ..models.routing import Reach
from . import step as steps
from .context import Context
from .step import FixedStep, FlexibleStep, Forward

Execution = Literal["auto", "compiled", "graph", "eager"]
_WARM_UPS = 2


class Decoder:
    """Decode steps of one model with one attention.

    Args:
        model: a Hugging Face decoder.
        attention: what its global layers do. An attention is `graph_safe` when it says so: its launches depend on
            shapes alone, and it reads nothing from the device.
        reaches: of every layer.
        execution: one of the ways above, or `auto`: the first that works, on a GPU; `eager` elsewhere.
        backend: of `torch.compile`; None: ours, which is faster (`lycheedecode.fusion`).
    """

    def __init__(
        self,
        model: nn.Module,
        attention: DecodeAttention,
        reaches: Sequence[Reach],
        execution: Execution = "auto",
        backend: Any = None,
    ) -> None:
        if execution not in get_args(Execution):
            raise ConfigError(f"execution must be one of {', '.join(get_args(Execution))}, not {execution!r}.")
        self.attention = attention
        self._model, self._reaches = model, reaches
        self._route = steps.route(model)
        self._backend = backend
        self._ways = [execution]
        self._may_fall_back = execution == "auto"
        if execution == "auto":
            on_gpu = next(model.parameters()).is_cuda
            fixed = on_gpu and getattr(attention, "graph_safe", False)
            self._ways = ["compiled", "graph", "eager"] if fixed else ["eager"]

    @property
    def way(self) -> str:
        """How the next step runs."""
        return self._ways[0]

    def logits(self, context: Context, token_ids: Tensor) -> Tensor:
        """Feed one token a sequence, int64 `[B]`; the context's cache then holds it.

        Returns:
            float32 `[B, V]`, overwritten by the next step.
        """
        with torch.inference_mode():
            replay = self.prepare(context, token_ids)
            if replay is None:
                return self._flexible(context, token_ids)
            with self._route:
                logits = replay(token_ids, context.cache.length + 1)
            context.cache.advance()
            return logits

    def prepare(self, context: Context, token_ids: Tensor) -> Replay | None:
        """Compile and capture the step to come, unless that is done; None where steps are eager. Arguments as above."""
        while self.way != "eager":
            try:
                return self._replay(context, token_ids)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler can fail in any way; what is wrong with the model fails again
                if not self._may_fall_back:
                    raise
                self._step_down(context, error)
        return None

    def _replay(self, context: Context, token_ids: Tensor) -> Replay:
        cache = context.cache
        state, refresh = cache.state_for(self.attention)
        kept = context.kept_steps
        if (self, refresh) not in kept:
            with self._route, torch.inference_mode():
                step = FixedStep(cache, self.attention, self._reaches, state, refresh, context.kv_bytes)
                step.token_ids.copy_(token_ids)
                step.filled.fill_(cache.length + 1)
                forward = steps.forward if self.way == "graph" else steps.compiled_forward(self._backend)
                kept[self, refresh] = Replay(step, forward, self._model)
        return kept[self, refresh]

    def _flexible(self, context: Context, token_ids: Tensor) -> Tensor:
        cache = context.cache
        state, refresh = cache.state_for(self.attention)
        lengths = torch.full_like(token_ids, cache.length + 1, dtype=torch.int32)
        if cache.starts is not None:
            lengths -= cache.starts
        step = FlexibleStep(cache, self.attention, self._reaches, state, refresh)
        with self._route, steps.running(step):
            logits = steps.forward(self._model, token_ids, lengths)
        self.attention.count_bytes(context.kv_bytes, lengths, state, refresh, cache.key_bytes)
        return logits

    def _step_down(self, context: Context, error: Exception) -> None:
        context.kept_steps.clear()
        what = {"compiled": "compiled", "graph": "captured as a CUDA graph"}[self._ways.pop(0)]
        reason = next(iter(str(error).strip().splitlines()), "")
        warnings.warn(
            f"Decoding goes on more slowly ({self.way}): the step cannot be {what} ({type(error).__name__}: "
            f"{reason[:300]}).",
            stacklevel=5,
        )


class Replay:
    """A fixed step as a CUDA graph; on other devices the step itself. Compiles and captures when it is made.

    Args:
        step: ready to run, as it is in the middle of a generation.
        forward, model: what it runs.
    """

    def __init__(self, step: FixedStep, forward: Forward, model: nn.Module) -> None:
        self._step = step
        self._run = lambda: step.run(forward, model)
        self._graph: torch.cuda.CUDAGraph | None = None
        counted = step.kv_bytes.clone()
        if step.token_ids.is_cuda:
            self._capture()
        else:
            self._run()
        step.kv_bytes.copy_(counted)

    def __call__(self, token_ids: Tensor, filled: int) -> Tensor:
        """Logits `[B, V]`, overwritten by the next call; `filled` counts the slots in use, the new token's included."""
        self._step.token_ids.copy_(token_ids)
        self._step.filled.fill_(filled)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._logits

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):  # compiles, tunes, and makes what is made once
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._run()
        self._graph = graph
