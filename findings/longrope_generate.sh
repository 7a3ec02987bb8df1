#!/usr/bin/env bash
# Software: transformers 5.17.0, torch 2.13.0; a tiny random Phi-3 with longrope.
# Input: `generate`, greedy, from a prompt shorter than the model's original length to beyond it.
# One would guess: past the original length `generate` reads the text anew, as its comment says, so its logits are those of a
#   pass over the whole text.
# What happens: it drops the cache and then feeds the last token alone; from there on the model has forgotten the text.
#   (5.23.0 reads the text anew.)
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

torch.manual_seed(0)
half = 6
rope = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * half,
    "long_factor": [1.5 + i for i in range(half)],
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
config = Phi3Config(
    vocab_size=260, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=64, initializer_range=0.3,
    pad_token_id=0, bos_token_id=None, eos_token_id=None, rope_parameters=rope,
)
model = Phi3ForCausalLM(config).eval()
prompt = torch.randint(4, 260, (1, 60))
with torch.no_grad():
    made = model.generate(
        prompt, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    errors = []
    for step, logits in enumerate(made.logits):
        whole = model(made.sequences[:, : prompt.shape[1] + step], use_cache=False).logits[:, -1]
        errors.append(float((logits - whole).abs().max()))
print(f"transformers {transformers.__version__}: largest difference of generate's logits from a pass over the whole text")
for step, error in enumerate(errors):
    print(f"  after {prompt.shape[1] + step} tokens: {error:.1e}")
lost = max(errors[:5]) < 1e-3 and min(errors[5:]) > 0.1
print("lost past the original length" if lost else "this has changed")
sys.exit(0 if lost else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
