"""`python -m experiments linear`: the projections of a decode step, verified, then timed against the memory's speed.

    each projection, and the four of a layer in a row, for every batch: cuBLAS, Inductor (if asked for), ours
    a whole step of a model without a past, compiled with Inductor's backend and with ours (`--step-layers`)

Times are those of a CUDA graph's replay over more weights than the L2 holds (see `timing`); bytes are the weights'.
`tune-linear` times every launch that might be fast; what wins goes into the kernel by hand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.projections import LAYER, LLAMA_3_8B, Projection, candidates, evenly, words
from lycheedecode.bench.harness import say, show
from lycheedecode.bench.settings import BenchSettings, check_names
from lycheedecode.bench.timing import Call, read_bandwidth, rotations, time_calls
from lycheedecode.bench.verify import check_close
from lycheedecode.fusion import backend, reference
from lycheedecode.fusion.operator import quantize

TOLERANCE = 1e-2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is no GPU, tests only
HEADER = f"{'projection':10} {'batch':>5} {'by':24} {'us':>8} {'TB/s':>6} {'of bound':>8}"


@dataclass(frozen=True, kw_only=True)
class LinearSettings(BenchSettings):
    """What `linear` times.

    Attributes:
        names: of the projections.
        batches: sequences decoded together.
        eight_bits: with weights in 8-bit floats.
        inductor: time what torch.compile makes of them, too.
        seconds: spent on each measurement.
        step_layers: time steps of a model with so many layers instead.
    """

    names: tuple[str, ...] = tuple(LLAMA_3_8B)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    eight_bits: bool = False
    inductor: bool = False
    seconds: float = 0.05
    step_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("names", self.names, LLAMA_3_8B)


@dataclass(frozen=True, kw_only=True)
class TuneLinearSettings(BenchSettings):
    """What `tune-linear` searches.

    Attributes:
        names: of the projections.
        batches: sequences decoded together.
        eight_bits: with weights in 8-bit floats.
        most: launches of a projection and batch that are timed.
        limit: seconds that it takes.
    """

    names: tuple[str, ...] = tuple(LLAMA_3_8B)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    eight_bits: bool = False
    most: int = 32
    limit: float = 85

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("names", self.names, LLAMA_3_8B)


@dataclass
class LinearProblem:
    """A projection on a batch, with several sets of weights; arguments as `linear` takes them."""

    projection: Projection
    inputs: Tensor
    fused: list[Tensor]
    scales: list[Tensor]
    norm: Tensor | None
    residual: Tensor | None

    @classmethod
    def random(cls, projection: Projection, batch: int, sets: int, empty: bool = False) -> LinearProblem:
        def numbers(*shape: int, scale: float = 1.0) -> Tensor:
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
            return tensor if empty else tensor.normal_(0, scale)

        rows, columns = sum(projection.sizes), projection.columns
        width = projection.sizes[0] if projection.gated else rows
        fused, scales = [numbers(rows, columns, scale=columns**-0.5) for _ in range(sets)], []
        if projection.eight_bits:
            fused, scales = map(list, zip(*map(quantize, fused), strict=True)) if sets else ([], [])
        return cls(
            projection,
            numbers(batch, 1, columns),
            fused,
            scales,
            numbers(columns) if projection.norm else None,
            numbers(batch, 1, width) if projection.residual else None,
        )

    def with_batch(self, batch: int) -> LinearProblem:
        """The same weights, other inputs."""
        new = LinearProblem.random(self.projection, batch, 0)
        return LinearProblem(self.projection, new.inputs, self.fused, self.scales, self.norm, new.residual)

    def weights(self, i: int) -> list[Tensor]:
        return list(self.fused[i % len(self.fused)].split(self.projection.sizes))

    def factors(self, i: int) -> list[Tensor]:
        """What rows of the weights are multiplied by; none in 16 bits."""
        return list(self.scales[i % len(self.scales)].split(self.projection.sizes)) if self.scales else []

    def compute(self, run: Callable[..., Tensor], i: int, x: Tensor | None = None, **more: Any) -> Tensor:
        """Compute the i-th call by `linear`, or something with its signature."""
        x = self.inputs if x is None else x
        biases: list[Tensor] = []
        projection = self.residual, self.norm, 1e-5, self.projection.gated, self.factors(i)
        return run(x, self.weights(i), biases, *projection, **more)

    def cublas(self, i: int) -> Tensor:
        """The bare product with the fused weight."""
        return F.linear(self.inputs, self.fused[i % len(self.fused)])

    def calls(self, run: Callable[[int], Any]) -> list[Call]:
        """Enough of them to go past the L2."""
        count = rotations(self.projection.bytes, 8, 16)
        return [lambda i=i: run(i) for i in range(count)]


def make_problems(names: Sequence[str], eight_bits: bool) -> dict[str, LinearProblem]:
    """Weights for each projection; random ones, more than the L2 holds."""
    sizes = {name: LLAMA_3_8B[name]._replace(eight_bits=eight_bits) for name in names}
    return {name: LinearProblem.random(p, 1, rotations(p.bytes, 2, 16)) for name, p in sizes.items()}


def verify(problem: LinearProblem, what: str, run: Callable[..., Tensor], **more: Any) -> float:
    """The relative error of the first result; raises `MismatchError` if it is large."""
    return check_close(what, problem.compute(run, 0, **more), problem.compute(reference, 0), TOLERANCE)


def layer(problems: dict[str, LinearProblem], run: Callable[..., Tensor], i: int) -> Tensor:
    """Four projections in a row, each reading what the one before it wrote."""
    x = problems["qkv"].compute(run, i)[..., : LLAMA_3_8B["o"].columns]
    x = problems["o"].compute(run, i, x)
    x = problems["gate_up"].compute(run, i, x)
    return problems["down"].compute(run, i, x)


@dataclass
class LinearMeter:
    """Times calls on a GPU of known read bandwidth, and prints and keeps what it finds."""

    bandwidth: float
    seconds: float
    rows: list[dict[str, Any]]

    def add(self, name: str, batch: int, by: str, calls: Sequence[Call], size: int) -> None:
        us = time_calls(calls, self.seconds).ms * 1e3
        share = size / self.bandwidth * 1e6 / us
        self.rows.append({"projection": name, "batch": batch, "by": by, "us": us, "bytes": size, "share": share})
        show(f"{name:10} {batch:5} {by:24} {us:8.2f} {size / us / 1e6:6.2f} {share:8.1%}")


@torch.inference_mode()
def run(settings: LinearSettings, device: str) -> dict[str, Any]:
    """Verify and time; raises `MismatchError`, and then there are no times."""
    if settings.step_layers:
        return time_steps(settings.step_layers, settings.batches, settings.seconds)
    return time_projections(settings)


def time_projections(settings: LinearSettings) -> dict[str, Any]:
    """Every projection by everyone who can."""
    from lycheedecode.fusion.triton import linear

    names, batches = settings.names, settings.batches
    inductor = settings.inductor and not settings.eight_bits
    problems = make_problems(names, settings.eight_bits)
    everything = {(name, batch): problems[name].with_batch(batch) for batch in batches for name in names}
    errors = {f"{name}, batch {batch}": verify(problem, f"{name}, batch {batch}", linear)
              for (name, batch), problem in everything.items()}  # fmt: skip
    meter = LinearMeter(measured_bandwidth(), settings.seconds, [])
    show(f"verified; read bandwidth: {meter.bandwidth / 1e12:.2f} TB/s\n{HEADER}")
    for (name, batch), problem in everything.items():
        size = problem.projection.bytes
        if not settings.eight_bits:
            meter.add(name, batch, "cuBLAS, bare product", problem.calls(problem.cublas), size)
        if inductor:
            torch._dynamo.reset()  # it counts compilations, and gives up at some number
            compiled = torch.compile(reference, dynamic=False, options={"coordinate_descent_tuning": True})
            runs = problem.calls(lambda i, problem=problem, run=compiled: problem.compute(run, i))
            meter.add(name, batch, "Inductor", runs, size)
        meter.add(name, batch, "ours", problem.calls(lambda i, problem=problem: problem.compute(linear, i)), size)
    if set(LAYER) <= set(names):
        size = sum(problems[name].projection.bytes for name in LAYER)
        ways = [("reference", reference), ("ours", linear)][settings.eight_bits :]
        for batch, (by, run) in product(batches, ways):
            own = {name: everything[name, batch] for name in LAYER}
            calls = [lambda i=i, own=own, run=run: layer(own, run, i) for i in range(4)]
            meter.add("layer", batch, by, calls, size)
    return {"read_tb_s": meter.bandwidth / 1e12, "rows": meter.rows, "errors": errors}


def time_steps(layers: int, batches: Sequence[int], seconds: float) -> dict[str, Any]:
    """A step of a Llama of the 8B shape that attends to one token only: all but the attention of a decode step."""
    meter, errors = LinearMeter(measured_bandwidth(), seconds, []), {}
    model = _random_llama(layers)
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    size = 2 * (sum(p.numel() for p in model.parameters()) - (0 if head is embedding else embedding.numel()))
    tuned = {"coordinate_descent_tuning": True}
    ways = {
        "ours": {"backend": backend},
        "Inductor": {"options": tuned},
        "ours, norms apart": {"backend": partial(backend, norms=False)},
    }
    show(f"read bandwidth: {meter.bandwidth / 1e12:.2f} TB/s; {layers} layers\n{HEADER}")
    for batch in batches:
        ids = torch.arange(batch, device=DEVICE)[:, None]
        right = model(input_ids=ids, use_cache=False).logits
        for by, how in ways.items():
            torch._dynamo.reset()
            step = torch.compile(model, fullgraph=True, dynamic=False, **how)
            result = step(input_ids=ids, use_cache=False).logits
            errors[f"{by}, batch {batch}"] = check_close(f"a step by {by}, batch {batch}", result, right, 5e-2)
            meter.add("step", batch, by, [lambda step=step, ids=ids: step(input_ids=ids, use_cache=False)], size)
    return {"read_tb_s": meter.bandwidth / 1e12, "layers": layers, "rows": meter.rows, "errors": errors}


def _random_llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, vocab_size=128256, dtype=torch.bfloat16,
        num_attention_heads=32, num_key_value_heads=8, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).eval().requires_grad_(False).to(torch.bfloat16)


def measured_bandwidth() -> float:
    """Bytes a second that this GPU reads."""
    return read_bandwidth(torch.empty(1 << 29, dtype=torch.int32, device="cuda").zero_())


# ---------------------------------------------------------------------- tune-linear


@torch.inference_mode()
def tune(settings: TuneLinearSettings, device: str) -> dict[str, Any]:
    """Time at most `most` launches of every projection, in about `limit` seconds; prints the best few."""
    names, batches, most, limit = settings.names, settings.batches, settings.most, settings.limit
    began = time.perf_counter()
    sizes = {name: LLAMA_3_8B[name]._replace(eight_bits=settings.eight_bits) for name in names}
    grids = {(name, batch): candidates(sizes[name], batch) for name, batch in product(names, batches)}
    grids = {key: evenly(grid, most) for key, grid in grids.items()}
    compile_ahead([(sizes[name], batch, t) for (name, batch), grid in grids.items() for t in grid])
    say(f"compiled {sum(map(len, grids.values()))} launches in {time.perf_counter() - began:.0f} s")
    problems, bandwidth, found = make_problems(names, settings.eight_bits), measured_bandwidth(), []
    for at, ((name, batch), grid) in enumerate(grids.items()):
        now = time.perf_counter()
        until = now + (began + limit - now) / (len(grids) - at)
        problem = problems[name].with_batch(batch)
        rows = _time_launches(problem, [None, *grid], bandwidth, until - (until - now) / 4)
        best = [row["tuning"] for row in rows if row["tuning"] is not None][:2]  # how they start, without compiling
        starts = [{"prefetch": 128}, {"prefetch": 2048}, {"overlap": 4}, {"overlap": 64}, {"prefetch": 0}]
        rows += _time_launches(problem, [t._replace(**new) for new in starts for t in best], bandwidth, until)
        rows.sort(key=lambda row: row["us"])
        show(f"{name}, batch {batch}: {len(rows)} launches")
        shown = rows[:7] + [row for row in rows[7:] if row["tuning"] is None]
        show("\n".join(f"  {row['us']:8.2f} us {row['share']:6.1%}  {_words(row['tuning'])}" for row in shown))
        found += [{"projection": name, "batch": batch, **row, "tuning": _words(row["tuning"])} for row in rows]
    return {"read_tb_s": bandwidth / 1e12, "candidates": found}


def _time_launches(
    problem: LinearProblem, launches: Sequence[Any], bandwidth: float, until: float
) -> list[dict[str, Any]]:
    """Time the launches that compute the right result, fastest first; stops at the time `until`."""
    from lycheedecode.fusion.triton import linear

    rows: list[dict[str, Any]] = []
    for tuning in launches:
        if time.perf_counter() > until:
            say(f"  out of time after {len(rows)} of {len(launches)}")
            break
        try:
            verify(problem, "it", linear, tuning=tuning)
            calls = problem.calls(lambda i, tuning=tuning: problem.compute(linear, i, tuning=tuning))
            us = time_calls(calls, 0.01).ms * 1e3
        except Exception as error:  # more shared memory than there is, or wrong
            say(f"  {_words(tuning)}: {str(error)[:100]}")
            continue
        rows.append({"tuning": tuning, "us": us, "share": problem.projection.bytes / bandwidth * 1e6 / us})
    return sorted(rows, key=lambda row: row["us"])


def _words(tuning: Any) -> str:
    return "default" if tuning is None else words(tuning)


def compile_ahead(launches: list[tuple[Projection, int, Any]]) -> None:
    """Into Triton's cache, in as many processes as there are cores; what fails will fail again where it is timed."""
    workers = max(min(len(os.sched_getaffinity(0)) - 1, 15, len(launches)), 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        list(processes.map(_compile_some, [launches[i::workers] for i in range(workers)]))


def _compile_some(launches: list[tuple[Projection, int, Any]]) -> None:
    from lycheedecode.fusion.triton import linear

    for projection, batch, tuning in launches:
        try:
            LinearProblem.random(projection, batch, 1, empty=True).compute(linear, 0, tuning=tuning)
        except Exception as error:
            say(f"  {projection.sizes}, {tuning}: {type(error).__name__}")
