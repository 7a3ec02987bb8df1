"""`python -m experiments ranks`: on several tensor-parallel ranks the plugin decodes what it does on one, or refuses.

    a small random model -> vLLM with the plugin, on one rank and on several -> the same tokens, but for near ties
    a plan whose donors cross ranks, and more ranks than KV heads             -> the engine does not start, and says why

Ranks add up their parts in another order than one rank does, so a sequence may take another token where two are about
as probable, and goes its own way from there: it is compared up to that token.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lycheedecode.bench.harness import say, show
from lycheedecode.bench.models import build_from, random_config
from lycheedecode.bench.serving import closing, plan_of, require_vllm
from lycheedecode.bench.settings import BenchSettings
from lycheedecode.engine.prefix import shared_tokens
from lycheedecode.errors import ConfigError, MismatchError
from lycheedecode.plan import HeadPlan

_LENGTHS = (2000, 700, 60, 1500)
"""Tokens of the prompts, on a GPU; a tenth of that elsewhere."""
_TIES = {"cuda": 0.2, "cpu": 1e-3}
"""Log-probabilities, in bfloat16 and float32, that rounding may exchange."""
_NEXT = 20
"""Most probable tokens whose log-probabilities are kept."""


@dataclass(frozen=True, kw_only=True)
class RanksSettings(BenchSettings):
    """What `ranks` compares.

    Attributes:
        tensor_parallel_size: ranks that share the heads.
        block_size: tokens of a block.
        tokens: of every answer.
        memory: share of the GPU's memory that vLLM may take.
    """

    budget_tokens: int = 512
    tensor_parallel_size: int = 2
    block_size: int = 32
    tokens: int = 64
    memory: float = 0.5


class RankAnswer(NamedTuple):
    """Token ids of a sequence, and at every step the log-probabilities of the most probable tokens."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def run(settings: RanksSettings, device: str) -> dict[str, Any]:
    """Compare and refuse; raises `MismatchError`."""
    require_vllm()
    if settings.tensor_parallel_size < 2:
        raise ConfigError(f"--tensor-parallel-size must be at least 2, not {settings.tensor_parallel_size}.")
    ranks, scale = settings.tensor_parallel_size, 1 if device == "cuda" else 10
    with tempfile.TemporaryDirectory() as name:
        folder, prompts = Path(name), [torch.randint(4, 2048, (n // scale,)).tolist() for n in _LENGTHS]
        config = _save_model(folder / "model", device, ranks)
        plan_of(config, ranks).save(folder / "plan.json")
        answers = []
        for size in (1, ranks):
            say(f"{size} of {ranks} ranks ...")
            with closing(_start(folder / "model", folder / "plan.json", size, settings, device)) as llm:
                answers.append(generate(llm, prompts, settings.tokens))
        rows = [compare(one, many, _TIES[device]) for one, many in zip(*answers, strict=True)]
        for row in rows:
            show(
                f"{row['same_tokens']} of {row['tokens']} tokens are the same; log-probabilities differ by at most "
                f"{row['logprob_difference']:.2g}"
            )
        crossing = HeadPlan.from_donors([[(0, 0)] * config.num_key_value_heads] * config.num_hidden_layers)
        crossing.save(folder / "crossing.json")
        narrow = _save_model(folder / "narrow", device, ranks, num_key_value_heads=1)
        plan_of(narrow, 1).save(folder / "narrow.json")
        refused = {
            "a plan whose donors cross ranks": _refusal(folder / "model", folder / "crossing.json", ranks, settings),
            "more ranks than KV heads": _refusal(folder / "narrow", folder / "narrow.json", ranks, settings),
        }
        for what, why in refused.items():
            show(f"refused, {what}: {why}")
    return {"rows": rows, "refused": refused}


def compare(one: RankAnswer, many: RankAnswer, tie: float) -> dict[str, Any]:
    """How far two answers are the same; raises `MismatchError` where they part and it is no near tie."""
    length = shared_tokens(one.tokens, many.tokens)
    pairs = zip(one.tokens[:length], one.logprobs, many.logprobs, strict=False)
    largest = max((abs(mine[token] - theirs[token]) for token, mine, theirs in pairs), default=0.0)
    gap = 0.0
    if length < len(one.tokens):
        there = one.logprobs[length]
        gap = there[one.tokens[length]] - there.get(many.tokens[length], float("-inf"))
    if max(gap, largest) > tie:
        raise MismatchError(
            f"on several ranks token {length} of a sequence is another one, or its log-probability differs by "
            f"{max(gap, largest):.2g} (rounding explains {tie})."
        )
    return {"tokens": len(one.tokens), "same_tokens": length, "logprob_difference": largest, "gap_of_the_tie": gap}


def _save_model(folder: Path, device: str, ranks: int, **changes: Any) -> Any:
    """A small model with random weights; returns its config."""
    heads = {"num_attention_heads": 4 * ranks, "num_key_value_heads": 2 * ranks, **changes}
    head_dim, hidden = (128, 1024) if device == "cuda" else (32, 64)
    size = {"head_dim": head_dim, "hidden_size": hidden, "vocab_size": 2048, "max_position_embeddings": 4096}
    # So wide that attention prefers some tokens, and the model some answers: an error is then no near tie.
    config = random_config("tiny", 4, initializer_range=1.5 * hidden**-0.5, **heads, **size)
    build_from(config, "cpu", torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
    return config


def _start(folder: Path, plan: Path, ranks: int, settings: RanksSettings, device: str) -> Any:
    from vllm import LLM

    own = {"plan": str(plan), "budget_tokens": settings.budget_tokens, "block_size": settings.block_size}
    return LLM(
        str(folder),
        attention_backend="CUSTOM",
        additional_config={"lycheedecode": own},
        tensor_parallel_size=ranks,
        dtype="bfloat16" if device == "cuda" else "float32",
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_seqs=len(_LENGTHS),
        gpu_memory_utilization=settings.memory,
        enforce_eager=device == "cpu",
        max_logprobs=_NEXT,
        seed=settings.seed,
    )


def generate(llm: Any, prompts: Sequence[list[int]], tokens: int, asked: Sequence[str | None] = ()) -> list[RankAnswer]:
    """Answers of so many tokens; `asked`: what each request says of its attention."""
    from vllm import SamplingParams

    def of(said: str | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=_NEXT,
            extra_args=None if said is None else {"lycheedecode": said},
        )  # fmt: skip

    sampling = [of(said) for said in asked or [None] * len(prompts)]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    return [
        RankAnswer(
            list(each.token_ids), [{token: entry.logprob for token, entry in step.items()} for step in each.logprobs]
        )
        for each in found
    ]


def _refusal(folder: Path, plan: Path, ranks: int, settings: RanksSettings) -> str:
    """Start the engine in a process of its own, and return the sentence with which it refuses."""
    command = [sys.executable, "-m", "experiments.ranks", str(folder), str(plan), str(ranks), str(settings.memory)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    said = re.search(r"(?:PlanError|ServingError|ModelError|ConfigError|ValueError): (.+)", done.stdout + done.stderr)
    if done.returncode == 0 or said is None:
        raise MismatchError(
            f"vLLM should have refused {plan.stem} on {ranks} ranks: {(done.stdout + done.stderr)[-300:]}"
        )
    return said[1].strip()


if __name__ == "__main__":  # what `_refusal` starts
    _folder, _plan, _ranks, _memory = sys.argv[1:]
    _asked = RanksSettings(tensor_parallel_size=int(_ranks), memory=float(_memory))
    with closing(
        _start(Path(_folder), Path(_plan), int(_ranks), _asked, "cuda" if torch.cuda.is_available() else "cpu")
    ):
        pass
