"""Everything that the plugin takes from vLLM. When a version breaks the plugin, it breaks here.

Seen to work: 0.26.0 (GPU and CPU build), 0.27.1 and 0.32.0 (CPU builds, with both model runners), 0.33.0 (the same, its
Python code over 0.32's kernels).
`tests/integrations/test_vllm_parts.py` holds what is relied on besides the names, and says which version breaks it.
The classes that `cpu`, `cuda`, `lossless`, `drafter_v1` and `drafter_v2` extend are imported there.

Importing this refuses a version of vLLM that is not known.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import vllm

from .settings import check_version
from .wrap import wrap

check_version(vllm.__version__)  # before names are imported that another version may lack

from vllm import envs  # noqa: E402
from vllm.compilation.cuda_graph import CUDAGraphWrapper  # noqa: E402
from vllm.config import CUDAGraphMode, get_current_vllm_config, get_layers_from_vllm_config  # noqa: E402
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank  # noqa: E402
from vllm.distributed.utils import get_pp_indices  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.forward_context import BatchDescriptor, set_forward_context  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.models.utils import extract_layer_index  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

version = vllm.__version__

__all__ = [
    "Attention",
    "AttentionCGSupport",
    "AttentionType",
    "BatchDescriptor",
    "CUDAGraphMode",
    "CUDAGraphWrapper",
    "CommonAttentionMetadata",
    "FullAttentionSpec",
    "VLLMValidationError",
    "current_platform",
    "envs",
    "extract_layer_index",
    "get_current_vllm_config",
    "get_layers_from_vllm_config",
    "get_pp_group",
    "get_pp_indices",
    "get_tensor_model_parallel_rank",
    "init_logger",
    "input_processor",
    "reserve",
    "set_forward_context",
    "swap_whole_rows",
    "version",
]

_RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": ("_prepare_inputs", lambda runner, _: (runner.requests, runner.input_batch)),
    "vllm.v1.worker.gpu.model_runner": (
        "prepare_inputs",
        lambda runner, batch: (runner.req_states.req_id_to_index, batch),
    ),
}
"""Model runners, the second one called V2: the method after which the rows of a step are settled, and what then has the
requests that are alive, and `req_ids`, those of the rows."""


def input_processor() -> type:
    """What makes requests of prompts, and refuses them, in the process that starts an engine."""
    from vllm.v1.engine.input_processor import InputProcessor

    return InputProcessor


def follow_requests() -> None:
    """Let hybrid groups know which request is in which row of a step: metadata says so from 0.32 on only, by number.

    Wraps a method of the model runners that this process has loaded; without hybrid groups it does what it did.
    """
    for module, (method, rows_of) in _RUNNERS.items():
        runner = getattr(sys.modules.get(module), "GPUModelRunner", None)
        if runner is not None:
            wrap(runner, method, functools.partial(_telling, rows_of))


def swap_whole_rows() -> None:
    """Let rows of a batch keep their `allowed_token_ids` when vLLM sorts it, which it does for few backends but this.

    Up to 0.27 it swaps two rows of that mask as views, of which the second is then the first one's: one request obeys
    what another asked for.
    """
    batch = getattr(sys.modules.get("vllm.v1.worker.gpu_input_batch"), "InputBatch", None)
    if batch is not None:
        wrap(batch, "swap_states", _swapping_masks)


def _swapping_masks(stock: Callable[..., None]) -> Callable[..., None]:
    def swap_states(self: Any, first: int, second: int) -> None:
        mask = self.allowed_token_ids_mask_cpu_tensor
        swapped = None if mask is None else mask[[second, first]]  # a copy
        stock(self, first, second)
        if mask is not None:
            mask[[first, second]] = swapped

    return swap_states


def reserve(left: Callable[[Any], float]) -> None:
    """Let workers that this process has loaded give the cache less memory than vLLM would.

    Args:
        left: takes a worker, whose model is loaded; the share of the cache's memory that is left to it.
    """
    for module, name in (("vllm.v1.worker.gpu_worker", "Worker"), ("vllm.v1.worker.cpu_worker", "CPUWorker")):
        worker = getattr(sys.modules.get(module), name, None)
        if worker is not None:
            wrap(worker, "determine_available_memory", functools.partial(_reserving, left))


def _reserving(left: Callable[[Any], float], stock: Callable[[Any], int]) -> Callable[[Any], int]:
    def determine_available_memory(self: Any) -> int:
        return int(stock(self) * left(self))

    return determine_available_memory


def _telling(rows_of: Callable[[Any, Any], tuple[Any, Any]], stock: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(self: Any, scheduler_output: Any, *others: Any, **named: Any) -> Any:
        result = stock(self, scheduler_output, *others, **named)
        alive, batch = rows_of(self, result)
        for group in (group for groups in self.attn_groups for group in groups):
            hybrid = getattr(group.get_metadata_builder(), "hybrid", None)
            if hybrid is not None:
                new = {request.req_id: request.sampling_params for request in scheduler_output.scheduled_new_reqs}
                moved = {
                    *scheduler_output.scheduled_cached_reqs.resumed_req_ids,
                    *(scheduler_output.preempted_req_ids or ()),
                }
                hybrid.requests.note(new, alive, batch.req_ids, moved)
        return result

    return prepare


FIELDS_OF_ROWS = {
    "seq_lens",
    "block_table_tensor",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "rswa_prefix_lens",
    "req_idx",
    "replayssm_decode_base_cpu",
    "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
}
"""Of `CommonAttentionMetadata`: an entry for each sequence."""

FIELDS_OF_TOKENS = {"slot_mapping", "positions"}
"""An entry for each token of the step."""

FIELDS_OF_BATCH = {
    "query_start_loc",
    "query_start_loc_cpu",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "max_seq_len",
    "causal",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
}
"""Fields of the batch as a whole; `from_row` recomputes them."""

FIELDS_NOT_MET = {
    "logits_indices_padded",
    "num_logits_indices",
    "max_logits_per_req",
    "encoder_seq_lens",
    "encoder_seq_lens_cpu",
    "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu",
    "dcp_local_seq_lens_cpu_upper_bound",
    "mm_req_doc_ranges",
}
"""Set only where all layers or all rows stay dense: shared caches, encoders, context parallelism, images."""
