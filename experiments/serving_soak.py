"""`python -m experiments serving-soak`: clients of all kinds for minutes, on a tiny model and too few pages.

    every prompt, every kind of request, alone in stock vLLM or with the plugin     -> the tokens that it should get
    clients that ask, read to the end or hang up, and ask again, until time is up   -> no other token, no leak, no error

A client's request asks for nothing, for full attention, or for a budget of its own; there are more clients than rows,
and more tokens than pages: sequences wait, and are preempted. What a preempted sequence has decoded is prefilled again,
so that its entries are those of full attention; its tokens are not compared, but every layer of every step is, with its
definition (`serving_probe`). A lossless server owes every request the tokens of stock vLLM, preempted or not.

The model's weights are wide enough for its texts to depend on what attention reads, or nothing would be proved: that is
checked, too.
"""

from __future__ import annotations

import logging
import operator
import os
import random
import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments import second_runner
from experiments.serving_probe import said_of_steps, watch
from lycheedecode.bench.harness import show
from lycheedecode.bench.models import build_from, random_config
from lycheedecode.bench.serving import closing, plan_of, require_vllm
from lycheedecode.bench.settings import BenchSettings
from lycheedecode.errors import MismatchError

_KINDS: tuple[str | None, ...] = (None, "off", "budget_tokens=48")
_PROMPTS, _TOKENS, _PAGES = 24, 40, 40
_GROWTH_MIB = 200
"""What the process may grow by after a third of the time."""


@dataclass(frozen=True, kw_only=True)
class SoakSettings(BenchSettings):
    """What `serving-soak` does.

    Attributes:
        minutes: for how long.
        clients: at once.
        aborts: share of the requests whose client hangs up before the end.
        watched: compare every layer of every step with its definition.
        drafts: of a round of a lossless server; without, the server is hybrid.
        second_runner: vLLM has its second model runner (V2), interpreted where there is no GPU; without, the one that
            it takes by itself.
    """

    budget_tokens: int = 32
    minutes: float = 10.0
    clients: int = 32
    aborts: float = 0.2
    watched: bool = True
    drafts: int | None = None
    second_runner: bool = False


class _Errors(logging.Handler):
    """What vLLM logs as errors, the plugin's included."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(settings: SoakSettings, device: str) -> dict[str, Any]:
    """Raises `MismatchError` for a wrong token, a leak or an error."""
    require_vllm()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # of the machine's memory vLLM would take nearly all
    if settings.second_runner:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        if device == "cpu":
            second_runner.interpret()
    rng = random.Random(settings.seed)
    config = random_config("tiny", 4, max_position_embeddings=512, dtype="float32", head_dim=32, initializer_range=0.1)
    begin = torch.randint(4, 512, (40,)).tolist()
    prompts = [
        begin[: rng.choice((0, 40))] + torch.randint(4, 512, (rng.randint(3, 150),)).tolist() for _ in range(_PROMPTS)
    ]
    seen: dict[str, Any] = {"steps": 0, "largest": 0.0, "means": 0, "copies": 0}
    errors = _Errors()
    logging.getLogger("vllm").addHandler(errors)
    try:
        with tempfile.TemporaryDirectory() as folder:
            build_from(config, "cpu", torch.float32).save_pretrained(folder)
            plan_of(config, 1).save(Path(folder) / "plan.json")
            right = _right(folder, prompts, settings)
            with closing(_start(folder, settings, num_gpu_blocks_override=_PAGES, max_num_seqs=12)) as llm:
                if settings.watched:
                    watch(llm, seen, 2e-3)
                counts = _serve(llm, prompts, right, settings, rng)
                if settings.drafts:
                    counts |= _drafted(llm)
    finally:
        logging.getLogger("vllm").removeHandler(errors)
    if errors.lines:
        raise MismatchError(f"vLLM logged {len(errors.lines)} errors, the first: {errors.lines[0]}")
    show("no wrong token, no leak, no error in the log")
    show(", ".join(f"{name} {value:.0f}" for name, value in counts.items()))
    show(said_of_steps(seen))
    return {"rows": [counts], "steps": seen}


def _right(folder: str, prompts: list[list[int]], settings: SoakSettings) -> dict[tuple[int, str | None], list[int]]:
    """The tokens of each prompt and kind of request; raises `MismatchError` if kinds do not differ."""
    with closing(_start(folder, settings, hybrid=False)) as llm:
        full = _answers(llm, prompts, None)
    right = {(i, kind): tokens for i, tokens in enumerate(full) for kind in _KINDS}
    if settings.drafts:
        return right
    with closing(_start(folder, settings)) as llm:
        for kind in (None, _KINDS[2]):
            own = _answers(llm, prompts, kind)
            if sum(map(operator.ne, own, full)) < len(prompts) // 2:
                raise MismatchError(f"requests that are {kind or 'hybrid'} cannot be told from those that are off.")
            right |= {(i, kind): tokens for i, tokens in enumerate(own)}
    return right


def _start(folder: str, settings: SoakSettings, hybrid: bool = True, **options: Any) -> Any:
    from vllm import LLM

    drafts = settings.drafts or 0
    own = {"plan": f"{folder}/plan.json", "budget_tokens": 32, "max_budget_tokens": 64, "block_size": 4}
    own |= {"sink_tokens": 4, "recent_tokens": 4, "completion": "centroid", "completion_chunk": 16}
    own |= {"scan_keys": "float8", "lossless": drafts}
    chosen = {"attention_backend": "CUSTOM", "additional_config": {"lycheedecode": own}} if hybrid else {}
    size = {"max_model_len": 256, "max_num_batched_tokens": 64 * (1 + drafts), "block_size": 32}
    llm = LLM(
        folder, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, seed=0,
        disable_log_stats=False, **{"max_num_seqs": 4, **size, **chosen, **options},
    )  # fmt: skip
    if settings.second_runner and not llm.llm_engine.vllm_config.use_v2_model_runner:
        raise MismatchError("vLLM has its first model runner.")
    return llm


def _params(kind: str | None) -> Any:
    from vllm import SamplingParams

    extra = None if kind is None else {"lycheedecode": kind}
    return SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra)


def _answers(llm: Any, prompts: list[list[int]], kind: str | None) -> list[list[int]]:
    """Of each prompt, one after the other."""
    asked = [[{"prompt_token_ids": prompt}] for prompt in prompts]
    return [list(llm.generate(each, _params(kind), use_tqdm=False)[0].outputs[0].token_ids) for each in asked]


def _serve(
    llm: Any, prompts: list[list[int]], right: Any, settings: SoakSettings, rng: random.Random
) -> dict[str, Any]:
    """Serve until time is up and nobody is left; how often what happened."""
    engine, core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
    counts: Counter[str] = Counter()
    alive: dict[str, tuple[int, str | None, int | None]] = {}
    preempted: set[str] = set()
    began, settled = time.monotonic(), 0.0
    while alive or time.monotonic() < began + 60 * settings.minutes:
        while len(alive) < settings.clients and time.monotonic() < began + 60 * settings.minutes:
            counts["requests"] += 1
            name, prompt, kind = f"r{counts['requests']}", rng.randrange(len(prompts)), rng.choice(_KINDS)
            hangs_up = rng.randrange(_TOKENS) if rng.random() < settings.aborts else None
            engine.add_request(name, {"prompt_token_ids": prompts[prompt]}, _params(kind))
            alive[name] = prompt, kind, hangs_up
        outputs = engine.step()
        counts["steps"] += 1
        waited = [name for name, request in core.scheduler.requests.items() if request.num_preemptions]
        preempted |= {name.partition("-")[0] for name in waited}  # vLLM appends to names
        for output in outputs:
            name, tokens = output.request_id, list(output.outputs[0].token_ids)
            prompt, kind, hangs_up = alive[name]
            _check(name, tokens, right[prompt, kind], name in preempted and not settings.drafts, kind)
            if output.finished or (hangs_up is not None and len(tokens) > hangs_up):
                counts["aborted" if not output.finished else f"finished, {kind or 'hybrid'}"] += 1
                counts["preempted"] += name in preempted
                if not output.finished:
                    engine.abort_request([name])
                del alive[name]
                preempted.discard(name)
        if not settled and time.monotonic() > began + 20 * settings.minutes:
            settled = _resident()
    grown = max(_resident() - settled, 0.0) if settled else 0.0
    _check_leaks(core, llm, grown)
    return {"seconds": time.monotonic() - began, "grown_mib": grown, **counts}


def _drafted(llm: Any) -> dict[str, float]:
    """How many tokens were drafted, and rejected; raises `MismatchError` if none was."""
    found = {metric.name.removeprefix("vllm:spec_decode_num_"): metric.value for metric in llm.get_metrics()
             if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")}  # fmt: skip
    drafted, accepted = found["draft_tokens"], found["accepted_tokens"]
    if not 0 < accepted < drafted:
        raise MismatchError(f"of {drafted} drafts {accepted} were accepted: that proves nothing.")
    return {"drafts": drafted, "rejected": drafted - accepted}


def _check(name: str, tokens: list[int], right: list[int], preempted: bool, kind: str | None) -> None:
    if not preempted and tokens != right[: len(tokens)]:
        raise MismatchError(f"request {name} ({kind or 'hybrid'}) got the tokens {tokens}, not {right[: len(tokens)]}.")


def _check_leaks(core: Any, llm: Any, grown: float) -> None:
    pool = core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    if free != _PAGES - 1:  # one is vLLM's own
        raise MismatchError(f"{free} of {_PAGES - 1} pages are free when nobody is served.")
    if core.scheduler.requests:
        raise MismatchError(f"{len(core.scheduler.requests)} requests are left in the scheduler.")

    def remembered(worker: Any) -> int:
        builders = [group.get_metadata_builder() for groups in worker.model_runner.attn_groups for group in groups]
        known = [builder.hybrid.requests for builder in builders if builder.hybrid is not None]
        return max(max(len(each._seen), len(each._asked)) for each in known)

    [names] = llm.collective_rpc(remembered)
    if names > 100:
        raise MismatchError(f"the plugin remembers {names} requests that are gone.")
    if grown > _GROWTH_MIB:
        raise MismatchError(f"the process has grown by {grown:.0f} MiB.")


def _resident() -> float:
    """MiB of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:  # not on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
