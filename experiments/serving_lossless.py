"""`python -m experiments serving-lossless`: real texts continued in vLLM by its own attention, hybrid and losslessly.

    a real model, its plan, slices of texts -> vLLM, stock; the plugin, hybrid; the plugin, lossless  -> tokens a second

Prompts come from the prefix cache when they are timed, and what comes once is left out as in `bench serving`: the
difference between a long and a short generation. Greedy, so that a lossless text is the stock backend's, but for near
ties, which the pass over several tokens may round another way: how many tokens are the same until then is said.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lycheedecode.bench.harness import same_tokens, say
from lycheedecode.bench.lossless_texts import prompts_of
from lycheedecode.bench.serving import closing, require_vllm
from lycheedecode.bench.settings import SHORT, BenchSettings, LosslessSettings, as_pairs, check_names
from lycheedecode.errors import ConfigError
from lycheedecode.models.load import load_model
from lycheedecode.plan import HeadPlan, bundled_plan_of
from lycheedecode.results import Result

_WAYS = ("stock", "hybrid", "lossless")
_ROUNDS, _DRAFTED, _ACCEPTED = (
    f"vllm:spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens")
)


@dataclass(frozen=True, kw_only=True)
class ServedTextSettings(BenchSettings):
    """What `serving-lossless` compares.

    Attributes:
        model: with a bundled plan, or with `plan`: a name, a folder or a GGUF file.
        plan: a file or a bundled plan's name.
        cases: batches and contexts, like 4x8000.
        texts: code, prose, or files; prompts are slices of them.
        ways: stock, hybrid, lossless.
        drafts: of a round.
        form: completion of the drafts: plan, centroid or none.
        block_size: tokens of a block.
        tokens: of every answer.
        repeats: times that each generation is timed.
        memory: share of the GPU's memory that vLLM may take.
        eager: without CUDA graphs, as always on a CPU.
    """

    budget_tokens: int = 1024
    model: str = "smollm2-135m"
    plan: str | None = None
    cases: tuple[str, ...] = ("1x4000",)
    texts: tuple[str, ...] = ("code", "prose")
    ways: tuple[str, ...] = _WAYS
    drafts: int = 8
    form: str = "plan"
    block_size: int = 32
    tokens: int = 192
    repeats: int = 2
    memory: float = 0.8
    eager: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("ways", self.ways, _WAYS)
        as_pairs(self.cases)


def run(settings: ServedTextSettings, device: str) -> Iterator[dict[str, Any]]:
    """A row for every way and case, as soon as it is there; stock first."""
    require_vllm()
    plan = HeadPlan.load(settings.plan) if settings.plan else bundled_plan_of(settings.model)
    if plan is None:
        raise ConfigError(f"No plan ships for {settings.model}: give one with --plan.")
    model, tokenizer = load_model(settings.model, dtype=_dtype(device), device="cpu")
    texts = LosslessSettings(texts=settings.texts)
    cases = {(batch, length): prompts_of(tokenizer, texts, length, batch) for batch, length in as_pairs(settings.cases)}
    stock: dict[tuple[int, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        plan.save(Path(folder) / "plan.json")
        for way in (way for way in _WAYS if way in settings.ways):
            with closing(_start(folder, way, list(cases), settings, device)) as llm:
                for case, prompts in cases.items():
                    row = {"way": way, "batch": case[0], "context": case[1], **_time(llm, prompts, settings)}
                    first = stock.setdefault(case, row)
                    same = [same_tokens(*pair) for pair in zip(first["token_ids"], row["token_ids"], strict=True)]
                    row |= {"speedup": row["tokens_per_second"] / first["tokens_per_second"], "same_tokens": same}
                    say(_line(row))
                    yield {name: value for name, value in row.items() if name != "token_ids"}
            del llm


def _dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def _start(folder: str, way: str, cases: Sequence[tuple[int, int]], settings: ServedTextSettings, device: str) -> Any:
    from vllm import LLM

    chosen: dict[str, Any] = {"attention_backend": "FLASH_ATTN"} if device == "cuda" else {}
    if way != "stock":
        own = {"plan": f"{folder}/plan.json", "budget_tokens": settings.budget_tokens, "completion": settings.form}
        own |= {"block_size": settings.block_size, "lossless": settings.drafts if way == "lossless" else 0}
        chosen = {"attention_backend": "CUSTOM", "additional_config": {"lycheedecode": own}}
    batches, at_once = sorted({batch for batch, _ in cases}), settings.drafts + 1 if way == "lossless" else 1
    if device == "cuda" and not settings.eager:  # no graphs but those that are timed
        chosen["compilation_config"] = {"cudagraph_capture_sizes": [batch * at_once for batch in batches]}
    return LLM(
        folder,
        dtype=_dtype(device),
        skip_tokenizer_init=True,
        max_model_len=max(length for _, length in cases) + settings.tokens + 2 * settings.drafts,
        max_num_seqs=batches[-1],
        gpu_memory_utilization=settings.memory,
        enforce_eager=settings.eager or device == "cpu",
        disable_log_stats=False,
        seed=settings.seed,
        **chosen,
    )


def _time(llm: Any, prompts: Sequence[Sequence[int]], settings: ServedTextSettings) -> dict[str, Any]:
    few, many = settings.tokens // SHORT, settings.tokens
    _generate(llm, prompts, few)  # the prefill
    before = _counts(llm)
    timed = [(_generate(llm, prompts, few)[0], *_generate(llm, prompts, many)) for _ in range(settings.repeats)]
    rounds, drafted, accepted = (new - old for new, old in zip(_counts(llm), before, strict=True))
    seconds = median(long - short for short, long, _ in timed)
    return {
        "tokens": many,
        "tokens_per_second": len(prompts) * (many - few) / seconds,
        "tokens_a_round": 1 + accepted / rounds if rounds else 1.0,
        "accepted": accepted / drafted if drafted else None,
        "token_ids": timed[-1][2],
    }


def _counts(llm: Any) -> list[float]:
    metrics = llm.get_metrics()
    return [sum(one.value for one in metrics if one.name == name) for name in (_ROUNDS, _DRAFTED, _ACCEPTED)]


def _generate(llm: Any, prompts: Sequence[Sequence[int]], count: int) -> tuple[float, list[list[int]]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - began, [list(output.outputs[0].token_ids) for output in outputs]


def _line(row: Mapping[str, Any]) -> str:
    drafts = "" if row["accepted"] is None else f", {row['tokens_a_round']:.2f} tokens a round"
    same = row["same_tokens"]
    return (
        f"{row['way']:8} {row['batch']} x {row['context']}: {row['tokens_per_second']:8.1f} tokens/s, "
        f"{row['speedup']:.2f}x{drafts}; the first {min(same)} to {max(same)} of {row['tokens']} tokens are stock's"
    )


def lines(result: Result) -> Iterator[str]:
    """The rows, a line each."""
    yield from map(_line, result.rows)
