#!/usr/bin/env bash
# Software: transformers 5.24.0, torch 2.13.0; a tiny random Llama.
# Input: `generate`, greedy, with a cache that holds the beginning of the prompt: plain, and with `prompt_lookup_num_tokens`.
# One would guess: both texts are the same, since candidates only save time; without the cache they are.
# What happens: the first pass of assisted decoding feeds the whole prompt on top of the part that is cached, so that the
#   cache holds the beginning twice, and the text is another one, without a warning.
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
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=260, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(4, 260, (1, 20)).repeat(1, 3)


def generate(prefix, **options):
    cache = DynamicCache(config=config)
    if prefix:
        model(prompt[:, :prefix], past_key_values=cache)
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, past_key_values=cache, **options)
    return made[0, prompt.shape[1] :].tolist(), cache.get_seq_length()


with torch.no_grad():
    found = {(prefix, name): generate(prefix, **options) for prefix in (0, 37)
             for name, options in (("plain", {}), ("prompt lookup", {"prompt_lookup_num_tokens": 4}))}
print(f"transformers {transformers.__version__}: {prompt.shape[1]} tokens of prompt, 12 new")
for (prefix, name), (text, slots) in found.items():
    print(f"  {prefix} cached, {name}: {slots} tokens in the cache at the end, {text}")
texts = {key: text for key, (text, _) in found.items()}
right = texts[0, "plain"] == texts[0, "prompt lookup"] == texts[37, "plain"]
wrong = texts[37, "prompt lookup"] != texts[37, "plain"]
print("the prefix is fed twice" if right and wrong else "this has changed")
sys.exit(0 if right and wrong else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
