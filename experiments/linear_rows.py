"""`python -m experiments linear-rows`: linear layers of a pass over 17 to 64 rows, by our kernel and by cuBLAS.

    each projection   cuBLAS's products alone, nothing around them; ours with all around it, by every launch on trial
    two layers        as a model runs them, without attention: compiled with linear layers by cuBLAS, by ours with the
                      launches that won, and by ours but the norms apart

The layers decide: they have Inductor's norms, gates and sums around cuBLAS. Results are verified before they are timed.
`experiments.with_rows` runs other commands with what this finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import linear as study
from experiments.linear import LinearProblem
from experiments.projections import Projection, words
from experiments.with_rows import launches_of, linear_rows_up_to
from lycheedecode.bench.harness import say, show
from lycheedecode.bench.settings import BenchSettings, check_names
from lycheedecode.bench.timing import Call
from lycheedecode.bench.verify import check_close
from lycheedecode.errors import ConfigError
from lycheedecode.fusion import backend
from lycheedecode.fusion.operator import KERNEL_ROWS

STARTS = ({"prefetch": 512}, {"overlap": 4}, {"overlap": 64})
"""How the fastest launch overlaps with its neighbours; tried without compiling anything."""
WAYS = {"cublas": (16, True), "ours": (KERNEL_ROWS, True), "norms_apart": (KERNEL_ROWS, False)}
"""Rows up to which linear layers are ours, and whether norms are computed in them."""


class LayerShape(NamedTuple):
    """Sizes of a model: widths, outputs of query, key and value, vocabulary and layers."""

    hidden: int
    between: int
    qkv: tuple[int, int, int]
    vocabulary: int
    layers: int

    def projections(self) -> dict[str, Projection]:
        return {
            "qkv": Projection(self.qkv, self.hidden, norm=True),
            "o": Projection((self.hidden,), self.qkv[0], residual=True),
            "gate_up": Projection((self.between, self.between), self.hidden, norm=True, gated=True),
            "down": Projection((self.hidden,), self.between, residual=True),
            "head": Projection((self.vocabulary,), self.hidden),
        }


SHAPES = {
    "llama-3-8b": LayerShape(4096, 14336, (4096, 1024, 1024), 128256, 32),
    "qwen2.5-1.5b": LayerShape(1536, 8960, (1536, 256, 256), 151936, 28),
}
"""Biases of Qwen2.5 are left out, on both sides: a thousandth of the bytes."""


@dataclass(frozen=True, kw_only=True)
class LinearRowsSettings(BenchSettings):
    """What `linear-rows` times.

    Attributes:
        models: whose shapes.
        rows: of the input: sequences times tokens of a pass.
        seconds: spent on each measurement.
    """

    models: tuple[str, ...] = tuple(SHAPES)
    rows: tuple[int, ...] = (18, 24, 36, 48, 64)
    seconds: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("models", self.models, SHAPES)
        if not all(16 < rows <= KERNEL_ROWS for rows in self.rows):
            raise ConfigError(f"rows must be 17 to {KERNEL_ROWS}, not {', '.join(map(str, self.rows))}.")


def candidates(projection: Projection) -> list[Any]:
    """Launches that fit twice into a multiprocessor, or once with more loads; splits for two or four programs each."""
    from lycheedecode.fusion.launches import LinearTuning

    if projection.gated:
        tiles = [(64, 64, 4, 4), (64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 8, 4)]
        return [LinearTuning(rows, depth, 1, warps, stages, 16, 128) for rows, depth, warps, stages in tiles]
    tiles = [(64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)]
    found = []
    for rows, depth, warps, stages in tiles:
        programs, steps = sum(-(-size // rows) for size in projection.sizes), projection.columns // depth
        splits = [n for n in range(1, 17) if steps % n == 0]
        fewer, more = (max(n for n in splits if n == 1 or programs * n <= most) for most in (2 * 132, 4 * 132))
        found += [LinearTuning(rows, depth, n, warps, stages, 16, 128) for n in sorted({fewer, more})]
    return found


@torch.inference_mode()
def run(settings: LinearRowsSettings, device: str) -> Iterator[dict[str, Any]]:
    """A row for each projection, and one for two layers; raises `MismatchError` for a wrong result."""
    shapes = {name: SHAPES[name].projections() for name in settings.models}
    every = {p for projections in shapes.values() for p in projections.values()}
    study.compile_ahead([(p, rows, t) for p, rows in product(every, settings.rows) for t in [None, *candidates(p)]])
    bandwidth = study.measured_bandwidth()
    show(f"compiled; read bandwidth: {bandwidth / 1e12:.2f} TB/s\n{HEADER}")
    for model, projections in shapes.items():
        best: dict[int, list[dict[str, Any]]] = {rows: [] for rows in settings.rows}
        for name, projection in projections.items():
            problem = LinearProblem.random(projection, 1, study.rotations(projection.bytes, 1, 16))
            for rows in settings.rows:
                found = time_projection(problem.with_batch(rows), rows, settings.seconds)
                row = {"model": model, "projection": name, "rows": rows, **found}
                best[rows].append(row)
                row = {**row, "bound_us": projection.bytes / bandwidth * 1e6}
                show(format_row(row))
                yield row
            del problem
        weights = random_layers(SHAPES[model])
        for rows in settings.rows:
            times = time_layers(SHAPES[model], weights, rows, best[rows], settings.seconds)
            size = 2 * sum(weight.numel() for weight in weights[0])
            row = {"model": model, "projection": "2 layers", "rows": rows, **times, "bound_us": size / bandwidth * 1e6}
            show(format_row(row))
            yield row
        del weights


# ---------------------------------------------------------------------- one projection


def time_projection(problem: LinearProblem, rows: int, seconds: float) -> dict[str, Any]:
    """The products by cuBLAS, and ours: by default and by the launch that is fastest."""
    from lycheedecode.fusion import triton
    from lycheedecode.fusion.launches import LinearTuning, default_tuning

    projection = problem.projection
    default = default_tuning(rows, projection.sizes, projection.columns, torch.bfloat16, projection.gated)
    times: dict[LinearTuning, float] = {}

    def attempt(launch: LinearTuning) -> None:
        try:
            study.verify(problem, words(launch), triton.linear, tuning=launch)
            calls = problem.calls(lambda i: problem.compute(triton.linear, i, tuning=launch))
            times[launch] = study.time_calls(calls, seconds).ms * 1e3
        except triton.triton.runtime.errors.OutOfResources as error:
            say(f"  left out: {words(launch)}: {error}")

    for launch in dict.fromkeys([default, *candidates(projection)]):
        attempt(launch)
    fastest = min(times, key=times.__getitem__)
    for start in STARTS:
        attempt(fastest._replace(**start))
    fastest = min(times, key=times.__getitem__)
    products = problem.calls(lambda i: [F.linear(problem.inputs, weight) for weight in problem.weights(i)])
    kind = {name: getattr(projection, name) for name in ("sizes", "columns", "gated", "norm", "residual")}
    found = {
        "cublas_us": study.time_calls(products, seconds).ms * 1e3,
        "ours_us": times[fastest],
        "default_us": times[default],
        "launch": fastest._asdict(),
        "kind": {"rows": rows, **kind},
        "launches": {words(launch): us for launch, us in times.items()},
    }
    return found


# ---------------------------------------------------------------------- two layers


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as Hugging Face's models write it."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def layers(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Layers of nine weights each, where queries stand for what attention makes of them; keys and values come along."""
    kept = []
    for at in range(0, len(weights), 9):
        norm, q, k, v, o, second, gate, up, down = weights[at : at + 9]
        y = _rms_norm(x, norm)
        query = F.linear(y, q)
        kept += [F.linear(y, k), F.linear(y, v)]
        x = x + F.linear(query, o)
        y = _rms_norm(x, second)
        x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    return x, *kept


def random_layers(shape: LayerShape) -> list[list[Tensor]]:
    """Weights of two layers, in as many sets as go past the L2."""

    def matrix(out: int, columns: int) -> Tensor:
        return torch.empty(out, columns, dtype=torch.bfloat16, device=study.DEVICE).normal_(0, columns**-0.5)

    def layer() -> list[Tensor]:
        norms = [torch.ones(shape.hidden, dtype=torch.bfloat16, device=study.DEVICE) for _ in range(2)]
        qkv = [matrix(size, shape.hidden) for size in shape.qkv]
        mlp = [*(matrix(shape.between, shape.hidden) for _ in range(2)), matrix(shape.hidden, shape.between)]
        return [norms[0], *qkv, matrix(shape.hidden, shape.qkv[0]), norms[1], *mlp]

    size = 2 * sum(p.bytes for name, p in shape.projections().items() if name != "head")
    return [layer() + layer() for _ in range(study.rotations(size, 1, 4))]


def time_layers(
    shape: LayerShape, weights: list[list[Tensor]], rows: int, best: list[dict[str, Any]], seconds: float
) -> dict[str, float]:
    """Times of each way, and what a whole model's pass gains by the better of ours, its output layer included."""
    from lycheedecode.fusion.launches import tuned

    x = torch.empty(1, rows, shape.hidden, dtype=torch.bfloat16, device=study.DEVICE).normal_()
    right, times = layers(x, weights[0]), {}
    for way, (most, norms) in WAYS.items():
        torch._dynamo.reset()
        with linear_rows_up_to(most), tuned(launches_of(best)):
            ours = partial(backend, norms=norms)
            step: Callable[..., Any] = torch.compile(layers, fullgraph=True, dynamic=False, backend=ours)
            for result, expected in zip(step(x, weights[0]), right, strict=True):
                check_close(f"layers of {rows} rows, {way}", result, expected, 5e-2)
            calls: list[Call] = [lambda step=step, one=one: step(x, one) for one in weights]
            times[f"{way}_us"] = study.time_calls(calls, seconds).ms * 1e3
    head = next(row for row in best if row["projection"] == "head")
    fastest = min(times["ours_us"], times["norms_apart_us"])
    gain = (times["cublas_us"] - fastest) * shape.layers / 2 + head["cublas_us"] - head["ours_us"]
    return {**times, "pass_gains_ms": gain / 1e3}


# ---------------------------------------------------------------------- table


HEADER = f"{'model':13} {'':9} {'rows':>4} {'bound':>8} {'cuBLAS':>8} {'ours':>8} {'default':>8} {'apart':>8}  fastest"


def format_row(row: Mapping[str, Any]) -> str:
    """A line of the table under `HEADER`."""
    times: dict[str, Any] = {name: row.get(f"{name}_us") for name in ("cublas", "ours", "default", "norms_apart")}
    shown = " ".join(f"{us:8.1f}" if us is not None else " " * 8 for us in times.values())
    fastest = min((name for name in times if times[name] is not None), key=times.__getitem__)
    more = f"; a pass gains {row['pass_gains_ms']:+.2f} ms" if "pass_gains_ms" in row else ""
    if "launch" in row:
        more = "; ours by " + " ".join(f"{name} {value}" for name, value in row["launch"].items())
    return f"{row['model']:13} {row['projection']:9} {row['rows']:4} {row['bound_us']:8.1f} {shown}  {fastest}{more}"
