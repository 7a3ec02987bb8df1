#!/usr/bin/env bash
# Software: transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0.
# Input: a valid GGUF file of a tiny Llama whose metadata say `rope.scaling.type` = linear, `rope.scaling.factor` = 4,
#   and one with the tensor `rope_freqs.weight` that llama.cpp writes for Llama 3.1 to 3.3.
# One would guess: the loaded model scales its positions as the file says, or loading fails.
# What happens: it loads without a warning, with plain positions: every answer beyond the short context is of another
#   model than the file's.
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


def write(name, values, tensors):
    writer = gguf.GGUFWriter(f"{folder}/{name}", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(97 + i) for i in range(26)])
    for key, value in values.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    shapes = {"token_embd.weight": (26, 32), "output.weight": (26, 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.0.attn_{part}.weight": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "blk.0.ffn_down.weight": (32, 64)}
    shapes |= {f"blk.0.ffn_{part}.weight": (64, 32) for part in ("gate", "up")}
    for tensor, shape in shapes.items():
        writer.add_tensor(tensor, np.ones(shape, np.float32))
    for tensor, data in tensors.items():
        writer.add_tensor(tensor, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(name):
    options = {"gguf_file": name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.config.rope_parameters, model.model.rotary_emb.inv_freq.tolist()


write("plain.gguf", {}, {})
write("linear.gguf", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {})
factors = np.array([1, 1, 1, 1, 1, 2.5, 8, 8], np.float32)
write("factors.gguf", {}, {"rope_freqs.weight": factors})
plain, dropped = load("plain.gguf")[1], True
for name, expected in (("linear.gguf", np.array(plain) / 4), ("factors.gguf", np.array(plain) / factors)):
    rope, frequencies = load(name)
    print(f"{name}: rope_parameters {rope}")
    print(f"  frequencies   {[f'{value:.3g}' for value in frequencies]}")
    print(f"  the file says {[f'{value:.3g}' for value in expected]}")
    dropped &= frequencies == plain
print("position scaling is dropped without a word" if dropped else "this has changed: position scaling is read")
sys.exit(0 if dropped else 1)
PYTHON
TQDM_DISABLE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder"
