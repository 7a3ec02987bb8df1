"""Runs decode steps the fastest way that works where the model is.

    compiled   the model compiled as a whole, replayed as a CUDA graph
    graph      the model as it is, replayed as a CUDA graph
    eager      the model as it is

Off a GPU the first two run without a graph: slower than eager, but the same computation.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..attention import DecodeAttention, State
from ..config import HybridConfig
from ..errors import ConfigError, LycheeWarning, first_line
from ..models.routing import AttentionRoute, Window
from ..models.state import ModelState
from . import step as steps
from .context import Context
from .offload import HostCache, OffloadStep
from .prefill import without_autocast
from .step import FixedStep, FlexibleStep, Forward
from .weights import model_of_steps

Execution = Literal["auto", "compiled", "graph", "eager"]
Made = TypeVar("Made")
_WARM_UPS = 2


class Decoder:
    """Decode steps of one model with one attention.

    Args:
        model: a Hugging Face decoder.
        attention: what its global layers do. An attention is `graph_safe` when it says so: its launches depend on
            shapes alone, and it reads nothing from the device.
        windows: how far back each layer looks.
        execution: one of the ways above, or `auto`: the first that works, on a GPU; `eager` elsewhere.
        backend: of `torch.compile`; None: ours, which is faster (`lycheedecode.fusion`).
        config: whether steps have weights of their own (`weights`).
    """

    def __init__(
        self,
        model: nn.Module,
        attention: DecodeAttention,
        windows: Sequence[Window],
        execution: Execution = "auto",
        backend: Any = None,
        config: HybridConfig | None = None,
    ) -> None:
        if execution not in get_args(Execution):
            raise ConfigError(f"execution must be one of {', '.join(get_args(Execution))}, not {execution!r}.")
        self.attention = attention
        self.model, self.windows = model, windows
        self._backend, self._config = backend, config
        self._state: ModelState | None = None
        self.catch_up()
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

    def catch_up(self) -> ModelState:
        """The model's present state. If the model was changed, steps of later contexts run a new copy of it."""
        state = ModelState(self.model)
        if state != self._state:
            self._use(self.model)  # frees the old copy first
            if self._config is not None:
                self._use(model_of_steps(self.model, self._config, state))
            self._state = state
        return state

    def _use(self, steps_of: nn.Module) -> None:
        self.steps_of = steps_of
        self.route = _Routes([steps.route(one) for one in dict.fromkeys([self.model, steps_of])])

    def logits(self, context: Context, token_ids: Tensor) -> Tensor:
        """Feed one token a sequence, int64 `[B]`; the context's cache then holds it.

        Returns:
            float32 `[B, V]`, overwritten by the next step.
        """
        with torch.inference_mode(), without_autocast(token_ids.device):
            replay = self.prepare(context, token_ids)
            if replay is None:
                return self._flexible(context, token_ids)
            with self.route:
                logits = replay(token_ids, context.cache.length + 1)
            context.cache.advance()
            return logits

    def prepare(self, context: Context, token_ids: Tensor) -> Replay | None:
        """Compile and capture the step to come, unless that is done; None where steps are eager. Arguments as above."""
        return self.attempt(context, lambda: self._replay(context, token_ids) if self.way != "eager" else None)

    def attempt(self, context: Context, make: Callable[[], Made]) -> Made:
        """What `make` makes for this context, in the first way that works."""
        while True:
            try:
                return make()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler can fail in any way; what is wrong with the model fails again
                if not self._may_fall_back or self.way == "eager":
                    raise
                self._step_down(context, error)

    def capture(
        self,
        run: Callable[[Forward, nn.Module], Tensor | None],
        kept: Sequence[Tensor],
        compiled: bool = True,
        model: nn.Module | None = None,
    ) -> Captured:
        """Capture `run` in the way that steps run (see above).

        Args:
            run: takes a `Forward` and the model.
            kept: as in `Captured`.
            compiled: False where compiling would not pay.
            model: another one of this decoder's to give it instead.
        """
        forward = self._forward() if compiled else steps.forward
        with self.route, torch.inference_mode():
            return Captured(lambda: run(forward, self.model if model is None else model), kept, self.way)

    def _forward(self) -> Forward:
        return steps.compiled_forward(self._backend) if self.way == "compiled" else steps.forward

    def _replay(self, context: Context, token_ids: Tensor) -> Replay:
        cache = context.cache
        state, refresh = cache.state_for(self.attention)
        kept = context.kept_steps
        if (self, refresh) not in kept:
            with self.route, torch.inference_mode():
                step = self._fixed(context, state, refresh)
                step.token_ids.copy_(token_ids)
                step.filled.fill_(cache.length + 1)
                kept[self, refresh] = Replay(step, self._forward(), self.steps_of, self.way)
        return kept[self, refresh]

    def _fixed(self, context: Context, state: State | None, refresh: bool) -> FixedStep:
        make = OffloadStep if isinstance(context.cache, HostCache) else FixedStep
        return make(context.cache, self.attention, self.windows, state, refresh, context.kv_bytes)

    def _flexible(self, context: Context, token_ids: Tensor) -> Tensor:
        cache = context.cache
        state, refresh = cache.state_for(self.attention)
        if isinstance(cache, HostCache):  # there is one way to decode from there
            fixed = self._fixed(context, state, refresh)
            fixed.token_ids.copy_(token_ids)
            fixed.filled.fill_(cache.length + 1)
            with self.route:
                logits = fixed.run(steps.forward, self.steps_of)
            fixed.check_layers()
            cache.advance()
            return logits
        filled = cache.length + 1
        lengths = torch.full_like(token_ids, filled, dtype=torch.int32)
        if cache.starts is not None:
            lengths -= cache.starts
        step = FlexibleStep(cache, self.attention, self.windows, state, refresh)
        with self.route, steps.running(step):
            logits = steps.forward(self.steps_of, token_ids, lengths, filled)
        cache.check_length(filled)
        self.attention.count_bytes(context.kv_bytes, lengths, state, refresh, cache.key_bytes)
        return logits

    def _step_down(self, context: Context, error: Exception) -> None:
        context.kept_steps.clear()
        what = {"compiled": "compiled", "graph": "captured as a CUDA graph"}[self._ways.pop(0)]
        warnings.warn(
            f"Decoding continues more slowly ({self.way}): the step cannot be {what} ({type(error).__name__}: "
            f"{first_line(error, 300)}).",
            LycheeWarning,
            stacklevel=5,
        )


class _Routes:
    """Routes that open together."""

    def __init__(self, routes: Sequence[AttentionRoute]) -> None:
        self._routes, self._open = routes, threading.local()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for route in self._routes:
                stack.enter_context(route)
            self._open.stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._open.stack.__exit__(*error)


class Captured:
    """A function over tensors that stay where they are: a CUDA graph of it, or the function itself.

    Compiles and captures when it is made.

    Args:
        run: may be called at any time, in the middle of a generation.
        kept: tensors that it changes; they are restored after the warm-up and the capture.
        way: of a `Decoder`.
    """

    def __init__(self, run: Callable[[], Tensor | None], kept: Sequence[Tensor], way: str) -> None:
        self._given, self._device = run, kept[0].device
        self._graph: torch.cuda.CUDAGraph | None = None
        before = [tensor.clone() for tensor in kept]
        if way != "eager" and kept[0].is_cuda:
            self._capture()
        elif way != "eager":
            self._run()
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)

    def __call__(self) -> Tensor | None:
        """What `run` returns, overwritten by the next call."""
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._result

    def _run(self) -> Tensor | None:
        with without_autocast(self._device):
            return self._given()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):  # compiles, tunes, and makes what is made once
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with without_collection(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._result = self._run()
        self._graph = graph


_capturing = threading.Lock()


@contextmanager
def without_collection() -> Iterator[None]:
    """Python collects no garbage while this is open, which one thread at a time can have.

    What is collected may be an older graph, or a compiled kernel; CUDA refuses to give them up during a capture, and
    the capture is lost (pytorch/pytorch#161037; PyTorch no longer collects before it captures).
    """
    with _capturing:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


class Replay:
    """A fixed step, captured.

    Args:
        step: ready to run, as it is in the middle of a generation.
        forward, model: what it runs.
        way: of a `Decoder`.
    """

    def __init__(self, step: FixedStep, forward: Forward, model: nn.Module, way: str) -> None:
        self._step = step
        self._captured = Captured(lambda: step.run(forward, model), step.counters, way)
        step.check_layers()

    def __call__(self, token_ids: Tensor, filled: int) -> Tensor:
        """Logits `[B, V]`, overwritten by the next call; `filled` counts the slots in use, the new token's included."""
        self._step.token_ids.copy_(token_ids)
        self._step.filled.fill_(filled)
        logits = self._captured()
        assert logits is not None  # steps return them
        return logits
