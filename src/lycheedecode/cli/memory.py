"""`lycheedecode memory`: what fits where, from a model's config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, get_args

import numpy as np
import typer

from ..checks import check_number
from ..config import HybridConfig, ScanKeys
from ..engine.offload.attention import refuse_unfit
from ..engine.offload.pinned import MARGIN
from ..engine.offload.size import CacheSize, offloaded_size, resident_size
from ..errors import ConfigError
from ..models.shape import ModelShape
from ..plan import HeadPlan
from ..results import Result
from ..roles import check_budgets
from .options import Json, Revision, check_model_path, takes_form
from .report import check_writable, save, screen, show_table
from .tiers import HelpAll, tiered

app = typer.Typer(add_completion=False)
GIB = 2**30
FULL = "full attention"
BITS = {"float8": 8, "int4": 4}
MISSES = {1.0: 0.262, 1.5: 0.185, 2.0: 0.135, 3.0: 0.085}
"""Share of selected blocks that a full store lacks, by its size in budgets: Qwen2.5-Coder-1.5B, 30K tokens, budget 1024
(docs/results/h100-memory-qwen2.5-coder-1.5b.json)."""
BESIDE = 0.2
"""What the model loses beside a fetch, as a share of the fetch's time on the link: with it, steps from host memory take
as much more than predicted as steps over a resident cache do (docs/results/h100-memory-llama-3-8b.json)."""


@dataclass(frozen=True)
class Placement:
    """A way to decode, and the options that ask for it.

    Attributes:
        store_ratio: of a cache in host memory; 0: it is on the GPU.
        misses: share of the selected blocks that are fetched.
        pulled: of what they hold, the share that crosses the link.
        own: the share that heads of the selecting layer wait for.
    """

    name: str
    options: str
    size: CacheSize
    store_ratio: float = 0.0
    misses: float = 0.0
    pulled: float = 0.0
    own: float = 0.0

    def step_ms(self, weights: int, bandwidth: float, link: float) -> float:
        """At least: the model reads `weights` bytes and the cache, fetches for later layers run beside it.

        `bandwidth` and `link` in bytes a millisecond.
        """
        near, far = (weights + self.size.read) / bandwidth, self.misses * self.size.selected / link
        return max(near + far * (self.own + BESIDE * (self.pulled - self.own)), far * self.pulled)


@app.command(
    no_args_is_help=False,
    cls=tiered("context batch gpu host form_budget_tokens form_block_size form_scan_keys form_completion"),
)
@takes_form
def memory(
    form: dict[str, Any],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A shape (llama-3-8b, llama-3-70b, qwen3-8b), a directory, or a hub id."),
    ],
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of each sequence, prompt and answer.")],
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences at once.")] = 1,
    plan: Annotated[
        str | None, typer.Option("--plan", "-p", help="Head plan. \\[default: an eighth of the heads retrieve]")
    ] = None,
    store_ratio: Annotated[
        float, typer.Option(metavar="X", help="Blocks kept on the GPU, as a multiple of the budget.")
    ] = 2.0,
    gpu: Annotated[
        float, typer.Option(metavar="GIB", help="What the GPU has for weights and cache: 75 of a card of 80 GB.")
    ] = 75.0,
    host: Annotated[float, typer.Option(metavar="GIB", help="Host memory.")] = 128.0,
    bandwidth: Annotated[float, typer.Option(metavar="TB/S", help="GPU memory bandwidth.")] = 4.67,
    link: Annotated[float, typer.Option(metavar="GB/S", help="What it fetches from host memory.")] = 49.0,
    misses: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Selected blocks that the store lacks. \\[default: by its size, as measured]"
        ),
    ] = None,
    revision: Revision = None,
    json_file: Json = None,
    help_all: HelpAll = False,
) -> None:
    """Compute how much memory a KV cache needs, on the GPU and on the host, and what makes it fit."""
    check_writable(json_file)
    check_number("--context", context, 1)
    check_number("--batch", batch, 1)
    if not (0 < gpu < 1e9 and 0 <= host < 1e9):
        raise ConfigError("--gpu and --host are GiB of memory and must be above 0.")
    if not (0 < bandwidth < 1e9 and 0 < link < 1e9 and 0 <= (misses or 0) <= 1):
        raise ConfigError("--bandwidth and --link must be above 0, --misses a share from 0 to 1.")
    config, head_plan = HybridConfig(**form), None if plan is None else HeadPlan.load(plan)
    refuse_unfit(config, store_ratio)
    check_budgets(head_plan, config)
    if head_plan is not None and head_plan.completion is None and config.completion == "plan":
        config = replace(config, completion="none")  # the plan completes nothing
    shape, weights, table = _model(model, revision)
    retrieval = _retrieval(shape, head_plan)
    ways = [
        _fetching(way, shape, head_plan, retrieval, "--scan-keys" in way.options, misses)
        for way in _ways(shape, batch, context, config, retrieval, store_ratio, head_plan)
    ]
    rows = [_row(way, weights, gpu, host) for way in ways]
    for way, row in zip(ways, rows, strict=True):
        row |= {
            "misses": way.misses,
            "own": way.own,
            "step_ms": way.step_ms(weights - table, bandwidth * 1e9, link * 1e6),
        }
    cells = [[row["way"], *(_gib(row[name]) for name in ("gpu_bytes", "total_bytes", "host_bytes")),
              "yes" if row["fits"] else "no", f"{row['step_ms']:.1f}"] for row in rows]  # fmt: skip
    console = screen(json_file)
    title = f"{model}, {batch} x {context} tokens: GiB, of {gpu:g} on the GPU and {host:g} in host memory"
    heads = ["", "cache", "with weights", "in host memory", "fits", "ms a step, at least"]
    show_table(console, title, heads, cells)
    found = next((way for way, row in zip(ways, rows, strict=True) if row["fits"]), None)
    most = _most(shape, context, config, retrieval, store_ratio, weights, gpu, host, head_plan)
    if found is None:
        advice = f"Nothing fits: {most} sequences of {context} tokens would." if most else "Not even one sequence fits."
    else:
        advice = _advice({row["way"]: row for row in rows}, found)
    console.print(advice)
    if 0 < shape.max_positions < context:
        console.print(f"But this model has {shape.max_positions} positions, and refuses longer texts.")
    if head_plan is not None and head_plan.budgets is not None:
        console.print("Left out: host memory, where all heads have room for equally many blocks.")
    settings = {"model": model, "context": context, "batch": batch, "plan": plan, "config": config.to_dict(),
                "store_ratio": store_ratio, "gpu_gib": gpu, "host_gib": host,
                "bandwidth_tb_s": bandwidth, "link_gb_s": link, "misses": misses}  # fmt: skip
    summary = {"weight_bytes": weights, "retrieval_heads": retrieval, "fits": found and found.name, "most": most}
    save(json_file, Result("memory", settings, rows=rows, summary=summary))
    if found is None:
        raise typer.Exit(1)


def _ways(
    shape: ModelShape,
    batch: int,
    slots: int,
    config: HybridConfig,
    retrieval: int,
    ratio: float,
    plan: HeadPlan | None = None,
) -> Iterator[Placement]:
    """Ways of hybrid attention, from most to least memory on the GPU, then full attention to compare them with.

    With budgets of heads, all is on the GPU.
    """
    yield Placement("hybrid", "", resident_size(shape, batch, slots, 2, config, retrieval, plan))
    if plan is None or plan.budgets is None:
        yield from _from_host(shape, batch, slots, config, retrieval, ratio)
    yield Placement(FULL, "--full", resident_size(shape, batch, slots, 2))


def _from_host(
    shape: ModelShape, batch: int, slots: int, config: HybridConfig, retrieval: int, ratio: float
) -> Iterator[Placement]:
    forms = [("host", config, ratio)]
    smaller = list(get_args(ScanKeys))[get_args(ScanKeys).index(config.scan_keys) + 1 :]
    forms += [(f"host, {BITS[keys]}-bit scan", replace(config, scan_keys=keys), ratio) for keys in smaller]
    if ratio > 1:
        forms.append(("host, least", replace(config, scan_keys="int4"), 1.0))
    for name, form, kept in forms:
        options = "--cache host"
        options += f" --scan-keys {form.scan_keys}" if form.scan_keys != "cache" else ""
        options += f" --store-ratio {kept:g}" if kept != 2 else ""
        yield Placement(name, options, offloaded_size(shape, batch, slots, 2, form, retrieval, kept), kept)


def _advice(rows: Mapping[str, Any], found: Placement) -> str:
    """The first way that fits, beside full attention."""
    way, full = rows[found.name], rows[FULL]
    said = f"Fits: {found.name}{f' ({found.options})' if found.options else ''}"
    if found.name == FULL:
        return f"{said} alone, {way['step_ms']:.1f} ms a step at least."
    also = "also fits" if full["fits"] else "does not fit"
    return (
        f"{said}, {way['step_ms']:.1f} ms a step at least. Full attention (--full) {also}: {full['step_ms']:.1f} ms, "
        f"{_gib(full['gpu_bytes'])} GiB of cache."
    )


def _fetching(
    way: Placement, shape: ModelShape, plan: HeadPlan | None, retrieval: int, small: bool, misses: float | None
) -> Placement:
    """With what it fetches; without a plan, retrieval heads alone read what their layer selects.

    `small`: their keys are on the GPU in 8 or 4 bits only.
    """
    if not way.store_ratio:
        return way
    heads, own = len(shape.global_layers) * shape.num_kv_heads, retrieval
    if plan is not None:
        own = sum(donor[0] == layer for layer in shape.global_layers for donor in plan.donors[layer])
    share = float(np.interp(way.store_ratio, list(MISSES), list(MISSES.values()))) if misses is None else misses
    near = 0 if small else retrieval / 2
    return replace(way, misses=share, pulled=1 - near / heads, own=(own - near) / heads)


def _row(way: Placement, weights: int, gpu: float, host: float) -> dict[str, Any]:
    total = weights + way.size.gpu
    fits = total <= gpu * GIB and way.size.host <= host * GIB - MARGIN * bool(way.size.host)
    return {"way": way.name, "options": way.options, "gpu_bytes": way.size.gpu, "host_bytes": way.size.host,
            "total_bytes": total, "fits": fits, **asdict(way.size)}  # fmt: skip


def _most(
    shape: ModelShape,
    slots: int,
    config: HybridConfig,
    retrieval: int,
    ratio: float,
    weights: int,
    gpu: float,
    host: float,
    plan: HeadPlan | None,
) -> int:
    """Most sequences of so many tokens that fit in any of the ways."""
    one = [way.size for way in _ways(shape, 1, slots, config, retrieval, ratio, plan)]
    counts = [
        min((gpu * GIB - weights) // size.gpu, (host * GIB - MARGIN) // size.host if size.host else 2**31)
        for size in one
    ]
    return max(int(max(counts)), 0)


def _model(name: str, revision: str | None) -> tuple[ModelShape, int, int]:
    """Shape, and the bytes of 16-bit weights, of a model of which only the config is read.

    The last number is what a step does not read of them: the table of embeddings, but for a row a sequence.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..bench.models import MODELS, random_config
    from ..models.load import load_config

    if name in MODELS:
        config = random_config(name)
    else:
        check_model_path(name)
        config = load_config(name, revision=revision)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    inputs, outputs = network.get_input_embeddings(), network.get_output_embeddings()
    table = 0 if outputs is not None and outputs.weight is inputs.weight else 2 * inputs.weight.numel()
    return ModelShape.of(network), 2 * sum(weight.numel() for weight in network.parameters()), table


def _retrieval(shape: ModelShape, plan: HeadPlan | None) -> int:
    """Retrieval heads in layers with full attention."""
    if plan is None:
        return max(len(shape.global_layers) * shape.num_kv_heads // 8, 1)
    plan.check_fits(num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, architecture=shape.architecture)
    return sum(len(plan.retrieval_heads(layer)) for layer in shape.global_layers)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
