#!/usr/bin/env bash
# Software: transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0.
# Input: a valid GGUF file of a tiny Llama with a bias of its query projection (`blk.0.attn_q.bias`), as llama.cpp
#   writes and reads it for Llama models with attention biases.
# One would guess: the model has the bias, or loading fails, or at least `output_loading_info` names the tensor.
# What happens: it is left out; nothing is said, and `unexpected_keys` is empty. (From safetensors such a tensor is
#   reported as unexpected.)
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cat > "$folder/show.py" <<'PYTHON'
import sys

import gguf
import numpy as np
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

folder = sys.argv[1]
writer = gguf.GGUFWriter(f"{folder}/model.gguf", "llama")
writer.add_context_length(512)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(64)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_freq_base(10000.0)
writer.add_rope_dimension_count(16)
writer.add_tokenizer_model("gpt2")
writer.add_token_list([chr(97 + i) for i in range(26)])
shapes = {"token_embd.weight": (26, 32), "output.weight": (26, 32), "output_norm.weight": (32,)}
shapes |= {f"blk.0.attn_{part}.weight": (32, 32) for part in ("q", "k", "v", "output")}
shapes |= {"blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "blk.0.ffn_down.weight": (32, 64)}
shapes |= {f"blk.0.ffn_{part}.weight": (64, 32) for part in ("gate", "up")}
for name, shape in (shapes | {"blk.0.attn_q.bias": (32,)}).items():
    writer.add_tensor(name, np.ones(shape, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
model, info = AutoModelForCausalLM.from_pretrained(
    folder,
    gguf_file="model.gguf",
    quantization_config=GgufConfig(dequantize=True),
    output_loading_info=True,
)
bias = model.model.layers[0].self_attn.q_proj.bias
unexpected = list(info["unexpected_keys"])
print(f"the file has blk.0.attn_q.bias; the model's q_proj.bias is {bias}; unexpected_keys: {unexpected}")
dropped = bias is None and not unexpected
print("the tensor is left out without a word" if dropped else "this has changed")
sys.exit(0 if dropped else 1)
PYTHON
TQDM_DISABLE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder"
