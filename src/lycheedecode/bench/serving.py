"""`bench serving`: time per output token in vLLM, with its own attention and with the plugin's.

    a folder with a shape, no weights -> vLLM, stock -> the same prompts with the plugin

Both are driven through vLLM's public interface; weights are random. A prompt is prefilled before it is timed, and comes
from the prefix cache then; with `--fill` a KV connector (`integrations.vllm.fill`) fills the cache with random numbers
instead. What a token takes is timed while all sequences of a batch decode (`served`), and not said where they hardly
ever do. How many tokens of the first sequence are the stock backend's is said, but proves nothing: random models choose
between near ties. `prefill_ms` is the time of fresh prompts and their first token.

With `--mixed`, of every three requests of a batch one asks for nothing, one for full attention and one for half the
budget.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..engine.prefix import shared_tokens
from ..errors import ConfigError, PackageError
from ..plan import HeadPlan
from .harness import show
from .models import random_config
from .served import TOO_SHORT, Decoded, decode
from .settings import SERVERS, ServingSettings
from .workload import Shape, spread_plan

_PLUGIN = "lycheedecode"
"""Name of the entry point by which vLLM finds the plugin."""
_PAGE = 16
"""Tokens of a page, vLLM's default on a GPU."""


def run(settings: ServingSettings, device: str) -> Iterator[dict[str, Any]]:
    """Time every case with every way, one engine after the other, stock first; a row as soon as it is there."""
    require_vllm(settings.ways != ("stock",))
    if settings.kv_layout != "auto":
        os.environ["VLLM_KV_CACHE_LAYOUT"] = settings.kv_layout  # also of workers
    cases = sorted(settings.pairs)
    config = random_config(
        settings.model,
        settings.layers,
        max_position_embeddings=max(context for _, context in cases) + settings.tokens + 2 * _PAGE,
        dtype="bfloat16" if device == "cuda" else "float32",
        **({"head_dim": 32} if device == "cpu" else {}),  # the narrowest heads that vLLM has kernels for there
    )
    plan = plan_of(config, settings.tensor_parallel_size)
    longest = max(context for _, context in cases)
    texts = torch.randint(4, config.vocab_size, (max(batch for batch, _ in cases), longest)).tolist()
    stock: dict[tuple[int, int], dict[str, Any]] = {}
    show(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan.save(Path(folder) / "plan.json")
        for way in sorted(settings.ways, key=lambda way: way != "stock"):
            began = time.perf_counter()
            with closing(_engine(folder, way, cases, settings, device)) as llm:
                started = time.perf_counter() - began
                for row in _time_cases(llm, way, cases, texts, settings):
                    if way == "stock":
                        stock[row["batch"], row["context"]] = row
                    compared = _compared(row, stock.get((row["batch"], row["context"])))
                    show(format_row(compared))
                    yield {**compared, "start_seconds": started, "plan_retrieval_heads": len(plan.retrieval)}
            del llm  # in this process it would keep its memory
    show("same: tokens of the first sequence equal to the stock backend's before one differs.")


def require_vllm(plugin: bool = True) -> None:
    """Refuse, before an engine starts, where vLLM or the plugin is missing; make workers fit for GPUs."""
    if find_spec("vllm") is None:
        raise PackageError("This benchmark needs vLLM: pip install 'lycheedecode[vllm]'.")
    if plugin and not entry_points(group="vllm.general_plugins", name=_PLUGIN):
        raise PackageError(
            "vLLM does not find the plugin: install lycheedecode with pip; files on PYTHONPATH are not enough."
        )
    # This process has asked for GPUs, after which a fork could not use them.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


@contextmanager
def closing(llm: Any) -> Iterator[Any]:
    """vLLM's engine; its memory is free again afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.distributed.is_initialized():  # the engine was in this process
            cleanup_dist_env_and_memory()


def plan_of(config: Any, ranks: int) -> HeadPlan:
    """As `workload.spread_plan`, with an eighth of the heads, whose donors stay on their tensor-parallel rank."""
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    if kv_heads % ranks:
        raise ConfigError(f"{kv_heads} KV heads cannot be divided evenly over {ranks} ranks.")
    own = kv_heads // ranks
    shard = spread_plan(Shape(heads // ranks, own, config.head_dim, layers, max(layers * own // 8, own)))
    donors = [
        [(layer, head + rank * own) for rank in range(ranks) for layer, head in row] for row in shard.donors
    ]  # fmt: skip
    return HeadPlan.from_donors(donors)


def _engine(folder: str, way: str, cases: Sequence[tuple[int, int]], settings: ServingSettings, device: str) -> Any:
    """vLLM with room for the largest case."""
    from vllm import LLM

    chosen: dict[str, Any] = {"attention_backend": "FLASH_ATTN"} if device == "cuda" else {}
    form = SERVERS[way]
    if form is not None:
        own = {
            "plan": f"{folder}/plan.json",
            "budget_tokens": settings.budget_tokens,
            "block_size": settings.block_size,
            **form,
        }
        chosen = {"attention_backend": "CUSTOM", "additional_config": {"lycheedecode": own}}
    if settings.fill:
        numbers = {"fill_mean": 0.0, "fill_std": 1.0}
        chosen["kv_transfer_config"] = {
            "kv_connector": "FillConnector", "kv_connector_module_path": "lycheedecode.integrations.vllm.fill",
            "kv_role": "kv_both", "kv_connector_extra_config": numbers,
        }  # fmt: skip
    if settings.page_tokens is not None:
        chosen["block_size"] = settings.page_tokens
    if device == "cuda":  # no graphs but those that are timed
        chosen["compilation_config"] = {"cudagraph_capture_sizes": sorted({batch for batch, _ in cases})}
    return LLM(
        folder,
        load_format="dummy",
        kv_cache_dtype=settings.kv_cache_dtype,
        skip_tokenizer_init=True,
        max_model_len=max(context for _, context in cases) + settings.tokens + 2 * _PAGE,
        max_num_seqs=max(batch for batch, _ in cases),
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.memory,
        enable_prefix_caching=True,
        enforce_eager=device == "cpu",
        seed=settings.seed,
        **chosen,
    )


def _time_cases(
    llm: Any,
    way: str,
    cases: Sequence[tuple[int, int]],
    texts: Sequence[list[int]],
    settings: ServingSettings,
) -> Iterator[dict[str, Any]]:
    most = max(max(text) for text in texts)
    for batch, context in cases:
        prompts = [text[:context] for text in texts[:batch]]
        prefill = _generate(llm, prompts, 1).seconds
        tokens = _generate(llm, prompts, settings.tokens).token_ids[0]  # what comes once with decoding has then come
        row: dict[str, Any] = {"way": way, "batch": batch, "context": context, "requests": "alike"}
        row |= {"prefill_seconds": prefill, "prefill_ms": None, "token_ids": tokens}
        if not settings.fill:
            row["prefill_ms"] = median(_prefill_ms(llm, batch, context, most) for _ in range(settings.repeats))
        kinds: list[tuple[str, tuple[str | None, ...]]] = [("alike", ())]
        if settings.mixed and SERVERS[way] is not None and batch > 1:
            kinds.append(("mixed", (None, "off", f"budget_tokens={settings.budget_tokens // 2}")))
        for name, asked in kinds:
            yield {**row, "requests": name, **_times(llm, prompts, settings, asked)}


def _times(
    llm: Any, prompts: Sequence[Sequence[int]], settings: ServingSettings, asked: Sequence[str | None]
) -> dict[str, float | None]:
    """Milliseconds in which every sequence gets a token: median, fastest and slowest; None: too short to measure."""
    speeds = [_generate(llm, prompts, settings.tokens, asked).tokens_per_second for _ in range(settings.repeats)]
    times = sorted(len(prompts) * 1e3 / speed for speed in speeds if speed)
    if len(times) < len(speeds):
        return dict.fromkeys(("ms", "fast_ms", "slow_ms"))
    return {"ms": median(times), "fast_ms": times[0], "slow_ms": times[-1]}


def _prefill_ms(llm: Any, batch: int, context: int, most: int) -> float:
    """Milliseconds to prefill prompts that no cache holds."""
    return _generate(llm, torch.randint(4, most, (batch, context)).tolist(), 1).seconds * 1e3


def _generate(llm: Any, prompts: Sequence[Sequence[int]], count: int, asked: Sequence[str | None] = ()) -> Decoded:
    """Answers of so many tokens; `asked`: what requests say in turn of their attention."""
    from vllm import SamplingParams

    def of(said: str | None) -> SamplingParams:
        extra = None if said is None else {"lycheedecode": said}
        return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra)

    return decode(llm, prompts, [of(asked[i % len(asked)] if asked else None) for i in range(len(prompts))])


def _compared(row: dict[str, Any], stock: dict[str, Any] | None) -> dict[str, Any]:
    """The row with its speed-up over the stock backend, and how many of its first tokens are the same."""
    same = None
    if stock is not None:
        same = shared_tokens(stock["token_ids"], row["token_ids"])
    kept = {name: value for name, value in row.items() if name != "token_ids"}
    both = stock is not None and stock["ms"] and row["ms"]
    return {**kept, "speedup": stock["ms"] / row["ms"] if stock and both else None, "same_tokens": same}


# ---------------------------------------------------------------------- what is shown

HEADER = (
    f"{'':15} {'batch':>5} {'context':>8} {'ms/token':>8} {'fastest':>8} {'slowest':>8} {'vs stock':>8} {'prefill':>9} "
    f"{'same':>5}"
)


def format_row(row: Mapping[str, Any]) -> str:
    """A line of the table under `HEADER`."""
    speedup = f"{row['speedup']:7.2f}x" if row["speedup"] else " " * 8
    times = f"{row['ms']:8.3f} {row['fast_ms']:8.3f} {row['slow_ms']:8.3f}" if row["ms"] else f"{TOO_SHORT:26.26}"
    same = "" if row["same_tokens"] is None else row["same_tokens"]
    prefill = f"{row['prefill_ms']:9.1f}" if row.get("prefill_ms") else " " * 9
    way = row["way"] + (", mixed" if row.get("requests") == "mixed" else "")
    return f"{way:15} {row['batch']:5} {row['context']:8} {times} {speedup} {prefill} {same:>5}"
