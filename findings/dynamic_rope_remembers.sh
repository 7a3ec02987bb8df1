#!/usr/bin/env bash
# Software: transformers 5.24.0 (5.17.0 as well), torch 2.13.0; a tiny random Llama with rope type "dynamic" of 64 positions.
# Input: texts of 63 and of 64 tokens, which the model reads unscaled; before them one of 128, for which it scales.
# One would guess: logits are a function of the weights and the text; the frequencies go back for every text that fits.
# What happens: they go back for fewer tokens than the original positions, not for exactly as many. A text of 64 tokens
#   is read with the frequencies of whatever long text was read before it, and gets other logits than in a fresh model,
#   until a shorter text has passed. A server whose requests are padded to the original length meets it every time.
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
)
model = transformers.LlamaForCausalLM(config).eval()
text = torch.randint(64, (1, 128))


@torch.no_grad()
def logits(length):
    return model(text[:, :length]).logits


fresh = {length: logits(length) for length in (63, 64)}
logits(128)
moved = []
print(f"transformers {transformers.__version__}: largest change of the logits after a text of 128 tokens")
for length in (64, 63, 64):
    moved.append((logits(length) - fresh[length]).abs().max().item())
    print(f"    {length} tokens: {moved[-1]:.1e}")
sys.exit(not (moved[0] > 1e-5 and moved[1] == moved[2] == 0))
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py"
