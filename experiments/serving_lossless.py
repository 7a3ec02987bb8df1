"""`python -m experiments serving-lossless`: real texts continued in vLLM by its own attention, hybrid and losslessly.

    a real model, its plan, slices of texts -> vLLM, stock; the plugin, hybrid; the plugin, lossless  -> tokens a second
                                                                                                      -> the same texts?

Prompts come from the prefix cache when they are timed, and the time is that in which all sequences decode. Greedy, so
that a lossless text is the stock backend's, but for near ties: the pass over several tokens may round them another way.
`near_ties` shows that it leaves stock's nowhere else, or the command fails.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from experiments.near_ties import StockTexts, said
from experiments.ranks import generate
from lycheedecode.bench.harness import show
from lycheedecode.bench.lossless_texts import prompts_of
from lycheedecode.bench.served import TOO_SHORT, decode
from lycheedecode.bench.serving import closing, require_vllm
from lycheedecode.bench.settings import BenchSettings, LosslessSettings, as_pairs, check_names
from lycheedecode.errors import ConfigError, MismatchError
from lycheedecode.models.load import load_model
from lycheedecode.plan import HeadPlan, bundled_plan_of

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
        dtype: of the model and its cache; auto: bfloat16 on a GPU, float32 elsewhere.
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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("ways", self.ways, _WAYS)
        as_pairs(self.cases)


def run(settings: ServedTextSettings, device: str) -> Iterator[dict[str, Any]]:
    """A row for every way and case, as soon as it is there, stock first; then `MismatchError` where one is wrong."""
    require_vllm()
    plan = HeadPlan.load(settings.plan) if settings.plan else bundled_plan_of(settings.model)
    if plan is None:
        raise ConfigError(f"No plan ships for {settings.model}: give one with --plan.")
    dtype = settings.dtype if settings.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    model, tokenizer = load_model(settings.model, dtype=dtype, device="cpu")
    texts = LosslessSettings(texts=settings.texts)
    cases = {(batch, length): prompts_of(tokenizer, texts, length, batch) for batch, length in as_pairs(settings.cases)}
    stock: dict[tuple[int, int], dict[str, Any]] = {}
    truths: dict[tuple[int, int], StockTexts] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        plan.save(Path(folder) / "plan.json")
        for way in (way for way in _WAYS if way in settings.ways):
            with closing(_start(folder, way, list(cases), settings, device, dtype)) as llm:
                for case, prompts in cases.items():
                    row = {"way": way, "batch": case[0], "context": case[1], **_time(llm, prompts, settings)}
                    if way == "stock":
                        stock[case], truths[case] = row, StockTexts.of(llm, prompts, settings.tokens)
                        row |= truths[case].row()
                    elif case in truths:
                        answers = generate(llm, [list(prompt) for prompt in prompts], settings.tokens)
                        row |= truths[case].compare(answers, way == "lossless")
                    row["speedup"] = _speedup(row, stock.get(case))
                    wrong += row.get("wrong", ())
                    show(_line(row))
                    yield row
            del llm
    if wrong:
        raise MismatchError(f"lossless texts are not full attention's: {'; '.join(wrong)}.")


def _speedup(row: Mapping[str, Any], stock: Mapping[str, Any] | None) -> float | None:
    speeds = row["tokens_per_second"], stock and stock["tokens_per_second"]
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else None


def _start(
    folder: str, way: str, cases: Sequence[tuple[int, int]], settings: ServedTextSettings, device: str, dtype: str
) -> Any:
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
        dtype=dtype,
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
    """Speed, and what became of drafts."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=settings.tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    decode(llm, prompts, [greedy] * len(prompts))  # the prefill, and what comes once
    before = _counts(llm)
    speeds = [decode(llm, prompts, [greedy] * len(prompts)).tokens_per_second for _ in range(settings.repeats)]
    rounds, drafted, accepted = (new - old for new, old in zip(_counts(llm), before, strict=True))
    known = [speed for speed in speeds if speed]
    return {
        "tokens": settings.tokens,
        "tokens_per_second": median(known) if len(known) == len(speeds) else None,
        "tokens_per_round": 1 + accepted / rounds if rounds else 1.0,
        "accepted_share": accepted / drafted if drafted else None,
    }


def _counts(llm: Any) -> list[float]:
    metrics = llm.get_metrics()
    return [sum(one.value for one in metrics if one.name == name) for name in (_ROUNDS, _DRAFTED, _ACCEPTED)]


def _line(row: Mapping[str, Any]) -> str:
    speed, gain = row["tokens_per_second"], row["speedup"]
    parts = [TOO_SHORT if speed is None else f"{speed:8.1f} tokens/s" + ("" if gain is None else f", {gain:.2f}x")]
    if row["accepted_share"] is not None:
        parts.append(f"{row['tokens_per_round']:.2f} tokens a round")
    if "same_tokens" in row:
        parts += said(row)
    return f"{row['way']:8} {row['batch']} x {row['context']}: {'; '.join(parts)}"
