"""`python -m experiments serving-probe`: the plugin's kernels inside vLLM against their definition, step by step.

    stock vLLM                          -> tokens of some prompts
    the plugin, without CUDA graphs     -> in every layer of every step the kernels' output against the reference over
                                           the same selections, means and copies against the pages that they lie beside;
                                           requests that are off against the stock backend's tokens
    the plugin, with CUDA graphs        -> the tokens that it chose without

A model of random weights, a few layers of a well-known shape. Prompts share a beginning, and there are more than fit at
once, so that prefix cache, chunks of prompts beside decoding and all kinds of requests are in it. Random models choose
between near ties: a sequence is compared up to the first token that rounding may have chosen.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.ranks import RankAnswer, compare, generate
from lycheedecode.bench.harness import say, show
from lycheedecode.bench.models import random_config
from lycheedecode.bench.serving import closing, plan_of, require_vllm
from lycheedecode.bench.settings import KV_CACHE_DTYPES, SERVERS, BenchSettings, check_names
from lycheedecode.errors import MismatchError

_LENGTHS = (3000, 1700, 60, 2500, 900, 2100)
_SHARED = 800
"""Tokens of the prompts, and of the beginning that long ones share, on a GPU; a tenth of that elsewhere."""
_ROUNDING = {1: 0.1, 2: 0.03, 4: 2e-3}
"""Largest difference as a share of the largest output, by bytes of a number of the cache."""
_TIES = {1: 0.5, 2: 0.25, 4: 1e-3}
"""Log-probabilities that rounding may exchange, likewise."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(BenchSettings):
    """What `serving-probe` looks at.

    Attributes:
        model: shape of the model; weights are random.
        layers: so many of its.
        way: form of the plugin, as `bench serving` has them.
        kv_cache_dtype: auto or fp8.
        block_size: tokens of a block.
        tokens: of every answer.
        memory: share of the GPU's memory that vLLM may take.
    """

    budget_tokens: int = 512
    model: str = "llama-3-8b"
    layers: int = 4
    way: str = "hybrid+centroid"
    kv_cache_dtype: str = "auto"
    block_size: int = 32
    tokens: int = 40
    memory: float = 0.3

    def __post_init__(self) -> None:
        check_names("way", (self.way,), [way for way, form in SERVERS.items() if form is not None])
        check_names("kv_cache_dtype", (self.kv_cache_dtype,), KV_CACHE_DTYPES)


def run(settings: ProbeSettings, device: str) -> dict[str, Any]:
    """Compare; raises `MismatchError`."""
    require_vllm()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the plugin's layers are looked into from here
    scale = 1 if device == "cuda" else 10
    changes = {} if device == "cuda" else {"head_dim": 32}
    dtype = _dtype(device, settings)
    config = random_config(settings.model, settings.layers, max_position_embeddings=8192, dtype=dtype, **changes)
    shared = torch.randint(4, config.vocab_size, (_SHARED // scale,)).tolist()
    prompts = [torch.randint(4, config.vocab_size, (length // scale,)).tolist() for length in _LENGTHS]
    prompts = [shared + prompt[len(shared) :] if len(prompt) > len(shared) else prompt for prompt in prompts]
    itemsize = 1 if settings.kv_cache_dtype == "fp8" else torch.finfo(getattr(torch, dtype)).bits // 8
    seen: dict[str, Any] = {"steps": 0, "largest": 0.0, "means": 0, "copies": 0}
    mixed = ["off", None, f"budget_tokens={settings.budget_tokens // 2}"] * 2
    answers: dict[str, list[RankAnswer]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan_of(config, 1).save(Path(folder) / "plan.json")
        for name in ("stock", "eager", "graphs") if device == "cuda" else ("stock", "eager"):
            say(f"{name} ...")
            with closing(_start(folder, None if name == "stock" else settings.way, name, settings, device)) as llm:
                if name == "eager":
                    watch(llm, seen, _ROUNDING[itemsize])
                answers[name] = generate(llm, prompts, settings.tokens)
                if name != "stock":
                    answers[f"{name}, off"] = generate(llm, prompts, settings.tokens, ["off"] * len(prompts))
                    answers[f"{name}, mixed"] = generate(llm, prompts, settings.tokens, mixed)
            del llm  # an engine in this process keeps its memory for as long as somebody has it
    tie = _TIES[itemsize]
    rows = [{"compared": "off with stock", **_all(answers["stock"], answers["eager, off"], tie)}]
    off = slice(0, None, 3)
    rows.append({"compared": "off beside others", **_all(answers["stock"][off], answers["eager, mixed"][off], tie)})
    for kind in ("", ", off", ", mixed") if "graphs" in answers else ():
        pair = answers[f"eager{kind}"], answers[f"graphs{kind}"]
        rows.append({"compared": f"graphs with eager{kind}", **_all(*pair, tie)})
    show(said_of_steps(seen))
    for row in rows:
        show(
            f"{row['compared']}: {row['same_tokens']} of {row['tokens']} tokens of {row['sequences']} sequences, "
            f"log-probabilities {row['logprob_difference']:.2g} apart at most, ties of {row['gap_of_the_tie']:.2g}"
        )
    return {"rows": rows, "steps": seen}


def said_of_steps(seen: Mapping[str, Any]) -> str:
    """What `watch` saw, in a line."""
    return (
        f"{seen['steps']} layers of steps at most {seen['largest']:.2%} off their definition; "
        f"{seen['means']} means and {seen['copies']} copied keys are those of their pages"
    )


def _all(one: Sequence[RankAnswer], other: Sequence[RankAnswer], tie: float) -> dict[str, Any]:
    found = [compare(*pair, tie) for pair in zip(one, other, strict=True)]
    return {
        "sequences": len(found),
        "tokens": sum(row["tokens"] for row in found),
        "same_tokens": sum(row["same_tokens"] for row in found),
        "logprob_difference": max(row["logprob_difference"] for row in found),
        "gap_of_the_tie": max(row["gap_of_the_tie"] for row in found),
    }


def _dtype(device: str, settings: ProbeSettings) -> str:
    return "bfloat16" if device == "cuda" or settings.kv_cache_dtype == "fp8" else "float32"


def _start(folder: str, way: str | None, name: str, settings: ProbeSettings, device: str) -> Any:
    from vllm import LLM

    chosen: dict[str, Any] = {"attention_backend": "FLASH_ATTN"} if device == "cuda" else {}
    if way is not None:
        own = {
            "plan": f"{folder}/plan.json",
            "budget_tokens": settings.budget_tokens,
            "block_size": settings.block_size,
        }
        own |= SERVERS[way] or {}
        chosen = {"attention_backend": "CUSTOM", "additional_config": {"lycheedecode": own}}
    return LLM(
        folder,
        load_format="dummy",
        kv_cache_dtype=settings.kv_cache_dtype,
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        gpu_memory_utilization=settings.memory,
        enforce_eager=name == "eager" or device == "cpu",
        max_logprobs=20,
        seed=settings.seed,
        **chosen,
    )


def watch(llm: Any, seen: dict[str, Any], rounding: float) -> None:
    """Compare every layer of every hybrid step from now on with its definition; raises `MismatchError` there."""

    def into(worker: Any) -> None:
        builders = [group.get_metadata_builder() for groups in worker.model_runner.attn_groups for group in groups]
        for builder in builders:
            group = getattr(builder, "hybrid", None)
            if group is not None:
                group.attention = _CheckedAttention(group, seen, rounding)

    llm.collective_rpc(into)


class _CheckedAttention:
    """A group's attention, and what it should have given."""

    def __init__(self, group: Any, seen: dict[str, Any], rounding: float) -> None:
        self._stock, self._beside, self._seen, self._rounding = group.attention, group.beside, seen, rounding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __call__(self, layer: int, query: Any, kv: Any, state: Any, scale: float, **options: Any) -> Any:
        from lycheedecode.ops.attend import reference

        beside = compare_beside(self._beside, layer, kv, self._stock.scanned[layer])
        for name, checked in beside.items():
            self._seen[name] += checked
        found = self._stock(layer, query, kv, state, scale, **options)
        options.pop("out", None)
        rows = torch.tensor(self._stock.plan.donor_rows(layer), device=query.device)
        config, completion = self._stock.config, self._stock.completion_of(layer, state)
        right = reference.attend_blocks(
            query, kv, state.selections, rows, config.block_size, scale, completion=completion, **options
        )
        off = float((found.float() - right.float()).abs().max() / right.float().abs().max().clamp(min=1e-6))
        self._seen["steps"] += 1
        self._seen["largest"] = max(self._seen["largest"], off)
        if not off <= self._rounding:
            raise MismatchError(
                f"in layer {layer} the kernels are {off:.1%} off their definition, {tuple(query.shape)}."
            )
        return found


def compare_beside(beside: Any, layer: int, kv: Any, heads: tuple[int, ...]) -> dict[str, int]:
    """Compare means and copies with the pages that they lie beside, before a step of a layer.

    Returns how many means there were to compare, and how many copied keys. Raises `MismatchError`.
    """
    from lycheedecode.ops import reference

    found = {"means": 0, "copies": 0}
    counts = kv.token_counts()
    if layer in beside.means:
        fresh = torch.full_like(beside.means[layer], float("nan"))
        keys, values = fresh
        reference.write_means(kv._replace(lengths=counts - 1), beside.chunk, keys, values, None, 1 << 20)
        known = ~fresh.isnan()
        off = (beside.means[layer][known].float() - fresh[known].float()).abs()
        allowed = 0.02 * fresh[known].float().abs() + 1e-3
        found["means"] = int(known.sum()) // (2 * fresh.shape[-1])
        if not bool((off <= allowed).all()):
            raise MismatchError(f"in layer {layer} means are up to {float(off.max()):.3g} off those of their pages.")
    if layer in beside.copies:
        page = kv.keys.shape[2]
        for b, count in enumerate(counts.tolist()):
            pages = kv.page_table[b, : -(-max(count - 1, 0) // page)].long()
            mine = beside.copies[layer].views(lambda part, pages=pages: part[pages])
            fresh = mine.views(torch.zeros_like)
            reference.write_pages_to_copy(fresh, kv.keys[pages], heads, torch.arange(len(pages), device=pages.device))
            found["copies"] += len(heads) * max(count - 1, 0)
            for part, right in zip(mine, fresh, strict=True):
                if part is not None and not torch.equal(*(_first_bytes(x, count - 1) for x in (part, right))):
                    raise MismatchError(f"in layer {layer} copies of keys are not those of their pages.")
    return found


def _first_bytes(pages: torch.Tensor, tokens: int) -> torch.Tensor:
    """The bytes of the first tokens in pages `[n, R, page, ...]`."""
    return pages.view(torch.uint8).transpose(0, 1).flatten(1, 2)[:, : max(tokens, 0)]
