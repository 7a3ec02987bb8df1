"""Everything that the plugin takes from vLLM. When a version breaks the plugin, it breaks here.

Seen to work: 0.26.0 (GPU and CPU build), 0.27.1 and 0.32.0 (CPU builds); read, as its CPU build does not exist: 0.33.0.
`tests/integrations/test_vllm_parts.py` holds what is relied on besides the names, and says which version breaks it.
The classes that `cpu` and `cuda` extend are imported there.

Importing this refuses a version of vLLM that is not known.
"""

from __future__ import annotations

import vllm

from .settings import check_version

check_version(vllm.__version__)  # before names are imported that another version may lack

from vllm import envs  # noqa: E402
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config  # noqa: E402
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank  # noqa: E402
from vllm.distributed.utils import get_pp_indices  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.models.utils import extract_layer_index  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, is_quantized_kv_cache  # noqa: E402

__all__ = [
    "Attention",
    "AttentionCGSupport",
    "AttentionType",
    "CommonAttentionMetadata",
    "FullAttentionSpec",
    "envs",
    "extract_layer_index",
    "get_current_vllm_config",
    "get_layers_from_vllm_config",
    "get_pp_group",
    "get_pp_indices",
    "get_tensor_model_parallel_rank",
    "init_logger",
    "is_quantized_kv_cache",
]

FIELDS_OF_ROWS = {
    "seq_lens",
    "block_table_tensor",
    "slot_mapping",
    "positions",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "rswa_prefix_lens",
    "req_idx",
    "replayssm_decode_base_cpu",
    "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
}
"""Of `CommonAttentionMetadata`: an entry for each sequence, or for each token where every sequence has one."""

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
"""Of the batch as a whole; `from_row` makes them anew."""

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
