"""What a benchmark may be asked for. Importing this is light: the command line makes its options of these classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..checks import check_sizes, is_count
from ..errors import ConfigError

FORMS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "hybrid": {},
    "paper": {"retrieval_attention": "full"},
    "hybrid+float8": {"scan_keys": "float8"},
    "hybrid+int4": {"scan_keys": "int4"},
    "hybrid+refresh2": {"refresh_every": 2},
    "hybrid+centroid": {"completion": "centroid"},
    "hybrid+weights8": {"step_weights": "float8"},
    "hybrid+budgets": {},
}
"""Forms of decode attention: full, or hybrid with these settings; `paper`: with dense retrieval heads.

`hybrid+budgets`: with a plan that gives heads uneven budgets (`workload.uneven`).
"""
WAYS = (*FORMS, "hybrid+host", "transformers", "transformers+offloaded")
"""Who generates: our engine with a form of attention, or Hugging Face; either of them with its cache in host memory."""
SERVERS: dict[str, dict[str, Any] | None] = {
    "stock": None, **{name: FORMS[name] for name in ("hybrid", "hybrid+float8", "hybrid+int4", "hybrid+centroid")}
}  # fmt: skip
"""Attention in vLLM: its own, or the plugin's with these settings."""
KV_CACHE_DTYPES = ("auto", "fp8")
"""Dtypes of vLLM's cache: the model's own, or 8-bit floats."""
LEAST_STEPS = 4
"""Fewest steps of vLLM from which a rate is computed."""

Settings = TypeVar("Settings", bound="BenchSettings")
OfModel = TypeVar("OfModel", bound="ModelSettings")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What all benchmarks may be asked for.

    Attributes:
        budget_tokens: most tokens a selection may hold.
        seed: seed of random numbers.
        smoke: run a tiny case, whatever the other options say; needs no GPU.
    """

    budget_tokens: int = 4096
    seed: int = 0
    smoke: bool = False

    def __post_init__(self) -> None:
        check_sizes(vars(self))
        for name, value in vars(self).items():
            if name not in ("seed", "smoke") and (value == () or _smallest(value) <= 0):
                raise ConfigError(f"{name} must be above 0, not {value!r}.")
        if getattr(self, "tokens", 2) < 2:
            raise ConfigError(
                "tokens must be at least 2: the first one comes from the prompt, and times are of the rest."
            )

    def shrunk(self: Settings) -> Settings:
        """The tiny case of `smoke`."""
        return self


@dataclass(frozen=True, kw_only=True)
class OpsSettings(BenchSettings):
    """What `bench ops` times.

    Attributes:
        batches: batch sizes.
        contexts: tokens in each sequence's cache.
        block_sizes: tokens per block.
        pool_gib: GiB of random keys and values to read from.
        seconds: time spent on each measurement.
    """

    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (32768, 131072, 524288)
    block_sizes: tuple[int, ...] = (16, 32, 64)
    pool_gib: float = 40.0
    seconds: float = 0.15


@dataclass(frozen=True, kw_only=True)
class ModelSettings(BenchSettings):
    """What benchmarks of a whole model may be asked for.

    Attributes:
        model: a shape with random weights (llama-3-8b, qwen3-8b, ...), or a model with a bundled plan (smollm2-135m).
        layers: keep only so many of the model's layers.
        batches: batch sizes.
        contexts: tokens in each sequence's cache.
        block_size: tokens per block.
        backend: the torch.compile backend: ours or inductor.
    """

    model: str = "llama-3-8b"
    layers: int | None = None
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (131072,)
    block_size: int = 32
    backend: Literal["ours", "inductor"] = "ours"

    def shrunk(self: OfModel) -> OfModel:
        return replace(self, model="tiny", contexts=(300,), budget_tokens=64, block_size=16)


@dataclass(frozen=True, kw_only=True)
class StepSettings(ModelSettings):
    """What `bench step` times.

    Attributes:
        forms: of attention: full, hybrid, paper, hybrid+float8, hybrid+int4, hybrid+refresh2, hybrid+centroid,
            hybrid+weights8, hybrid+budgets.
        steps: number of timed steps.
        execution: how decode steps run.
    """

    forms: tuple[str, ...] = ("full", "hybrid")
    steps: int = 60
    execution: Literal["compiled", "graph", "eager"] = "compiled"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("forms", self.forms, FORMS)

    def shrunk(self) -> StepSettings:
        return replace(super().shrunk(), steps=4)


PARTS = ("attend", "rounds", "real", "exact")
"""What `bench lossless` times."""
YIELDS = {(8, "model"): 8.5, (8, "float8"): 8.13}
"""Drafts and their weights -> tokens of a round that selects once, in `docs/results/h100-lossless-real-4096.json`."""


@dataclass(frozen=True, kw_only=True)
class LosslessSettings(ModelSettings):
    """What `bench lossless` times.

    Attributes:
        parts: attend (attention of several tokens), rounds (of a model with random weights), real (how fast texts are),
            exact (whether texts are full attention's).
        drafts: drafts in a round (rounds).
        refresh: drafts per selection (rounds, real).
        weights: the drafts' weights: model or float8 (rounds, real, exact).
        tokens_per_round: that a round is assumed to yield (rounds); without it, what rounds of 8 drafts yielded on
            Qwen2.5-Coder-1.5B: 8.5, with 8-bit weights 8.13. parts=real measures it.
        steps: number of timed steps (rounds).
        tune: also try other launch settings (attend).
        plan: the head plan; the model's bundled one without (real, exact).
        ways: numbers of drafts in a round, auto, or hybrid (real, exact).
        texts: texts to continue (real, exact).
        tokens: new tokens for each text (real, exact).
        temperature: sampling temperature; greedy without (real).
        budgets: budgets in tokens (exact).
        seeds: seeds of sampling at temperature 0.7, besides greedy texts; top-p with min-p, and top-k, in turn (exact).
        dtype: the model's dtype (real, exact).
        execution: how decode steps run.
    """

    parts: tuple[str, ...] = ("rounds",)
    drafts: tuple[int, ...] = (8,)
    refresh: tuple[int, ...] = (1,)
    weights: tuple[str, ...] = ("model",)
    tokens_per_round: float | None = None
    steps: int = 20
    tune: bool = False
    plan: str | None = None
    ways: tuple[str, ...] = ("8", "auto")
    texts: tuple[str, ...] = ("code", "prose")
    tokens: int = 256
    temperature: float | None = None
    budgets: tuple[int, ...] = (64, 256, 1024)
    seeds: tuple[int, ...] = (1, 2, 3)
    dtype: str = "auto"
    execution: Literal["auto", "compiled", "graph", "eager"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("parts", self.parts, PARTS)
        check_names("weights", self.weights, ("model", "float8"))
        for way in self.ways:
            if way not in ("auto", "hybrid") and not is_count(way):
                raise ConfigError(f"ways must be auto, hybrid, or a number of drafts, not {way!r}.")

    def yield_of(self, drafts: int, weights: str) -> float:
        """Tokens that a round is assumed to yield; raises `ConfigError` if nothing is known or no round can."""
        found = self.tokens_per_round or YIELDS.get((drafts, weights))
        if found is None:
            raise ConfigError(f"What a round of {drafts} drafts yields was not measured: give tokens_per_round.")
        if not 1 <= found <= drafts + 1:
            raise ConfigError(f"A round of {drafts} drafts yields 1 to {drafts + 1} tokens, not {found:g}.")
        return found

    def shrunk(self) -> LosslessSettings:
        return replace(super().shrunk(), budget_tokens=128, steps=2, parts=("rounds",), execution="graph")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(ModelSettings):
    """What `bench generate` times.

    Attributes:
        ways: who generates: a form of attention as in `bench step`, hybrid+host, transformers, transformers+offloaded.
        tokens: new tokens in each sequence.
        execution: how our decode steps run.
    """

    ways: tuple[str, ...] = ("full", "hybrid", "transformers")
    tokens: int = 64
    execution: Literal["auto", "compiled", "graph", "eager"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("ways", self.ways, WAYS)

    def shrunk(self) -> GenerateSettings:
        return replace(super().shrunk(), tokens=6)


MEMORY_PARTS = ("steps", "prefill", "texts")
"""What `bench memory` times."""
MEMORY_FORMS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "hybrid+float8": {"scan_keys": "float8"},
    "hybrid+int4": {"scan_keys": "int4"},
    "hybrid+refresh2": {"refresh_every": 2},
    "hybrid+refresh4": {"refresh_every": 4},
}
"""Hybrid attention whose selections it replays, with these settings."""
READINGS = ("share", "budget", "none")
"""Which selections of a real model those of a case are like: of the same share of the context, or the same budget;
`none`: they stay as they are, which shows what steps cost without fetches."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings(BenchSettings):
    """What `bench memory` times.

    Attributes:
        parts: steps (random weights, selections that change as real ones do), prefill (of random tokens), texts (real
            texts continued).
        model: a shape with random weights, or a real model (texts).
        plan: the head plan of a real model; its bundled one without.
        layers: keep only so many of the model's layers.
        cases: batch sizes and contexts, such as 1x131072,3x131072.
        budgets: tokens that a selection may hold.
        block_size: tokens per block.
        store_percents: store sizes, in percent of a selection.
        reuse: a result of texts, whose misses are replayed (steps).
        readings: whose misses: those of selections of the same share of the context (share), or of the same budget
            (budget); none: selections stay, and nothing is fetched (steps).
        forms: of hybrid attention (steps).
        at_once: also time steps that fetch nothing ahead (steps).
        steps: number of timed steps (steps).
        texts: texts to continue (texts).
        tokens: new tokens in each sequence (texts).
        prefill_chunk: prompt tokens that pass through the model at once, the same for every cache (prefill, texts).
        execution: how decode steps run.
    """

    parts: tuple[str, ...] = ("texts",)
    model: str = "smollm2-135m"
    plan: str | None = None
    layers: int | None = None
    cases: tuple[str, ...] = ("1x4096",)
    budgets: tuple[int, ...] = (512,)
    block_size: int = 32
    store_percents: tuple[int, ...] = (100, 150, 200, 300)
    reuse: str | None = None
    readings: tuple[str, ...] = ("share", "budget")
    forms: tuple[str, ...] = ("hybrid",)
    at_once: bool = False
    steps: int = 60
    texts: tuple[str, ...] = ("code", "prose")
    tokens: int = 64
    prefill_chunk: int = 4096
    execution: Literal["auto", "compiled", "graph", "eager"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("parts", self.parts, MEMORY_PARTS)
        check_names("readings", self.readings, READINGS)
        check_names("forms", self.forms, MEMORY_FORMS)
        if min(self.store_percents) < 100:
            raise ConfigError("store_percents must be at least 100, so that the store holds a whole selection.")
        _ = self.pairs  # refuses what is none

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The cases as numbers."""
        return as_pairs(self.cases)

    def shrunk(self) -> MemorySettings:
        small = replace(self, model="tiny", plan=None, layers=None, cases=("1x400", "2x400"), reuse=None)
        return replace(small, budgets=(80,), block_size=16, steps=6, tokens=12, prefill_chunk=150)


@dataclass(frozen=True, kw_only=True)
class ServingSettings(BenchSettings):
    """What `bench serving` times.

    Attributes:
        model: the model's shape; its weights are random.
        layers: keep only so many of the model's layers.
        cases: batch sizes and contexts, such as 1x32768,4x131072.
        ways: vLLM's own attention (stock) or the plugin (hybrid), also with scans in 8 or 4 bits, or with completion.
        kv_cache_dtype: of the KV cache, for every way: auto or fp8.
        mixed: also time batches whose requests ask for different things.
        kv_layout: of its pages, for every way: NHD has the heads of a token together, HND the tokens of a head; auto:
            vLLM's choice.
        page_tokens: tokens of a page, for every way. [default: vLLM's choice]
        tensor_parallel_size: ranks that share the heads.
        block_size: tokens per block.
        tokens: of every answer.
        repeats: timed generations.
        memory: share of the GPU's memory that vLLM may use.
        fill: fill the cache with random numbers instead of running long prefills.
    """

    model: str = "llama-3-8b"
    layers: int | None = None
    cases: tuple[str, ...] = ("1x1024", "1x32768", "1x65536", "1x131072", "4x131072")
    ways: tuple[str, ...] = ("stock", "hybrid")
    kv_cache_dtype: str = "auto"
    mixed: bool = False
    kv_layout: Literal["auto", "NHD", "HND"] = "auto"
    page_tokens: int | None = None
    tensor_parallel_size: int = 1
    block_size: int = 32
    tokens: int = 256
    repeats: int = 3
    memory: float = 0.9
    fill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("ways", self.ways, SERVERS)
        check_names("kv_cache_dtype", (self.kv_cache_dtype,), KV_CACHE_DTYPES)
        if self.tokens < LEAST_STEPS + 2:
            raise ConfigError(f"tokens must be at least {LEAST_STEPS + 2}, not {self.tokens}.")
        _ = self.pairs  # refuses what is none

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The cases as numbers."""
        return as_pairs(self.cases)

    def shrunk(self) -> ServingSettings:
        small = replace(self, budget_tokens=64, block_size=16, tokens=12, repeats=1)
        return replace(small, model="tiny", cases=("1x100", "2x100"))


def _smallest(value: Any) -> float:
    numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, (int, float))]
    return min((n for n in numbers if not isinstance(n, bool)), default=1)


def as_pairs(cases: tuple[str, ...]) -> list[tuple[int, int]]:
    """Batches and contexts; raises `ConfigError` for what is none."""
    found = []
    for case in cases:
        batch, _, context = case.partition("x")
        if not (is_count(batch) and is_count(context) and int(batch) and int(context) > 1):
            raise ConfigError(f"{case!r} is not a batch and a context, like 4x131072.")
        found.append((int(batch), int(context)))
    return found


def check_names(name: str, given: tuple[str, ...], known: Any) -> None:
    """Raise `ConfigError` for a name that is not known."""
    for one in given:
        if one not in known:
            raise ConfigError(f"{name} must be of {', '.join(known)}, not {one!r}.")
