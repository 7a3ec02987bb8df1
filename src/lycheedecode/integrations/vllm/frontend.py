"""What the process that starts an engine does, once it is known that the engine is to use the plugin.

It refuses what can be refused without a model, so that the refusal is the last line of the log and not buried in that
of another process; it refuses requests; and it shows what workers count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...ops import EVERYTHING
from . import counters, settings
from .parts import VLLMValidationError, get_pp_indices, input_processor, version
from .requests import NAME, Limits, RequestError, ServingError
from .wrap import wrap

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


@contextmanager
def drafting(arguments: Any) -> Iterator[None]:
    """Name a lossless server's own model as its draft model, while arguments become a configuration.

    So vLLM reserves cache entries for drafts; that the drafter is the model itself is up to the worker (see
    `lossless`). The first model runner is taken, which can draft in all known versions, unless the environment asks
    for the other.
    """
    if arguments.speculative_config is not None or getattr(arguments, "spec_method", None) is not None:
        raise ServingError("A lossless server drafts by itself: leave out the speculative configuration.")
    if arguments.worker_cls != "auto":
        raise ServingError("A lossless server has a worker class of its own: leave out worker_cls.")
    settings.check_runner(os.environ.setdefault(_RUNNER, "0") != "0", version)
    arguments.speculative_config = {
        "method": "draft_model",
        "model": arguments.model,
        "revision": arguments.revision,
        "num_speculative_tokens": settings.drafts(arguments),
        "draft_sample_method": "probabilistic",
    }
    arguments.worker_cls = f"{__package__}.lossless.DraftingWorker"
    try:
        yield
    finally:
        arguments.speculative_config, arguments.worker_cls = None, "auto"


def _check_drafting(vllm_config: Any) -> None:
    """Raise `ServingError` for features of vLLM that a lossless server cannot have."""
    settings.check_runner(vllm_config.use_v2_model_runner, version)
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    unlike = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "LoRA adapters": vllm_config.lora_config is not None,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "a multimodal model": model.is_multimodal_model,
        "prompts given as embeddings": model.enable_prompt_embeds,
        "layers that keep a state instead of a cache": model.has_inner_state,
        "positions of several dimensions": model.uses_mrope or getattr(model, "uses_xdrope_dim", 0) > 0,
    }
    for what, holds in unlike.items():
        if holds:
            raise ServingError(f"A lossless server cannot have {what}.")


def prepare(vllm_config: Any) -> None:
    """Check the configuration, let engines check requests, and show counters.

    Raises as `settings.read`, `settings.of_rank` and `settings.check_donors`.
    """
    if settings.drafts(vllm_config):
        _check_drafting(vllm_config)
    plan, parallel = settings.read(vllm_config).plan, vllm_config.parallel_config
    count = parallel.pipeline_parallel_size
    stages = [get_pp_indices(plan.num_layers, stage, count) for stage in range(count)]
    settings.of_rank(plan, 0, parallel.tensor_parallel_size, stages, 0)
    types = getattr(vllm_config.model_config.hf_text_config, "layer_types", None)
    if types and len(types) == plan.num_layers and not vllm_config.model_config.disable_sliding_window:
        settings.check_donors(plan, {layer for layer, kind in enumerate(types) if kind == "full_attention"})
    _check_requests(input_processor())
    counters.show(vllm_config.instance_id)


def _check_requests(processor: type) -> None:
    """Let engines refuse options that they cannot serve, and keep requests that are off to pages of their own.

    The prefix cache also holds what hybrid attention decoded; a salt hides it from requests for full attention.
    """
    wrap(processor, "_validate_params", _refusing)
    wrap(processor, "process_inputs", _salting)


def _refusing(stock: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_params(self: Any, params: Any, *others: Any, **named: Any) -> Any:
        result = stock(self, params, *others, **named)
        given = getattr(params, "extra_args", None)
        if given and NAME in given and settings.is_chosen(self.vllm_config):
            try:
                _limits(self).blocks(given)
            except RequestError as error:
                raise VLLMValidationError(str(error)) from None
        return result

    return _validate_params


def _salting(stock: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *others: Any, **named: Any) -> Any:
        request = stock(self, *others, **named)
        given = getattr(request.sampling_params, "extra_args", None)
        asks = given and NAME in given and settings.is_chosen(self.vllm_config)
        if asks and _limits(self).blocks(given) == EVERYTHING:
            request.cache_salt = f"{NAME}: off {request.cache_salt or ''}"
        return request

    return process_inputs


def _limits(processor: Any) -> Limits:
    if not hasattr(processor, "lycheedecode_limits"):
        processor.lycheedecode_limits = settings.read_config(processor.vllm_config)[1]
    return processor.lycheedecode_limits
