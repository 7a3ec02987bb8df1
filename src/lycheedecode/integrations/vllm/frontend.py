"""What the process that starts an engine does, once it is known that the engine is to use the plugin.

It refuses what can be refused without a model, so that the refusal is the last line of the log and not buried in that
of another process; it refuses requests; and it shows what workers count.
"""

from __future__ import annotations

import functools
from typing import Any

from . import counters, settings
from .parts import VLLMValidationError, get_pp_indices, input_processor
from .requests import NAME, Limits, RequestError


def prepare(vllm_config: Any) -> None:
    """Raise as `settings.read`, `settings.of_rank` and `settings.check_donors`."""
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
    """Let engines refuse requests for hybrid attention that they cannot serve."""
    stock = processor._validate_params
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def _validate_params(self: Any, params: Any, *others: Any, **named: Any) -> Any:
        result = stock(self, params, *others, **named)
        given = getattr(params, "extra_args", None)
        if given and NAME in given and settings.is_chosen(self.vllm_config):
            try:
                _limits(self).blocks(given)
            except RequestError as error:
                raise VLLMValidationError(str(error)) from None
        return result

    processor._validate_params = _validate_params


def _limits(processor: Any) -> Limits:
    if not hasattr(processor, "lycheedecode_limits"):
        processor.lycheedecode_limits = settings.read_config(processor.vllm_config)[1]
    return processor.lycheedecode_limits
