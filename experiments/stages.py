"""The measurements behind docs/results: every stage, what it needs, and the commands that it runs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lycheedecode.errors import ConfigError, LycheeError, PackageError

ROOT = Path(__file__).parents[1]
Command = list[str]

FIDELITY = "evaluate fidelity --dtype float32 --block-size 16"
"""What the plan that ships is judged on, together with a budget of 512 tokens."""
BUDGET = f"{FIDELITY} --budget-tokens 512 --prompts 100"
EQUAL = "--match-bytes --policies hybrid,paper,same-index,kascade,tidaldecode,quest,duo,streaming"
HARD = "--cells noise:4096:passkey:1 --cells prose:4096:passkey:1"
RULER = "evaluate tasks --limit 100 --execution graph --block-size 16"


@dataclass(frozen=True)
class Stage:
    """A group of measurements.

    Attributes:
        makes: what it measures.
        needs: the machine.
        minutes: about so many, on an H100 or the CPU that its results were made on.
        commands: takes the folder of results and the GPU's name, gives the arguments of `lycheedecode`; those that
            begin with `-m` are modules of their own. OUT stands for the folder, MODEL and DATA for those that were
            named, MINUTES for what is left of the time.
        model: what MODEL stands for by default.
    """

    makes: str
    needs: str
    minutes: int
    commands: Callable[[Path, str], Iterator[str]]
    model: str = "Qwen/Qwen2.5-Coder-1.5B-Instruct"


class StageError(LycheeError):
    """A command of a stage that failed; it has said why."""

    exit_status = 1


STAGES: dict[str, Stage] = {}


def stage(
    makes: str, needs: str, minutes: int, **others: str
) -> Callable[[Callable[[Path, str], Iterator[str]]], Stage]:
    """Declare the stage that a function is named after."""

    def declare(commands: Callable[[Path, str], Iterator[str]]) -> Stage:
        return STAGES.setdefault(commands.__name__, Stage(makes, needs, minutes, commands, **others))

    return declare


@stage("kernels and compiled steps against the reference, and no stray access", "1 GPU, compute-sanitizer", 15)
def tests(out: Path, gpu: str) -> Iterator[str]:
    yield "-m pytest -q -n 12 tests/ops tests/engine tests/fusion tests/policies tests/bench"
    yield "sanitized bench ops --smoke"


@stage("operations of a decode step, by block size", "1 GPU", 6)
def ops(out: Path, gpu: str) -> Iterator[str]:
    yield f"bench ops --batches 1,8 --contexts 131072 --block-sizes 16,32,64 --json OUT/{gpu}-ops.json"


@stage("whole decode steps of models of 8B, and their kernels", "1 GPU of 80 GB or more", 15)
def step(out: Path, gpu: str) -> Iterator[str]:
    forms = "--forms full,hybrid,paper,hybrid+float8,hybrid+int4,hybrid+refresh2"
    contexts = "--batches 1,4 --contexts 32768,131072,524288"  # 4 x 524288 does not fit, and is left out
    yield f"bench step {contexts} {forms} --json OUT/{gpu}-step-llama-3-8b.json"
    yield f"bench step --model qwen3-8b --batches 1,4 --json OUT/{gpu}-step-qwen3-8b.json"
    yield f"bench step --layers 8 --contexts 1048576 --json OUT/{gpu}-step-1m.json"
    yield f"-m experiments profile --contexts 131072 {forms} --json OUT/{gpu}-profile-llama-3-8b.json"


@stage("generations, ours and Hugging Face's", "1 GPU of 80 GB or more", 5)
def generate(out: Path, gpu: str) -> Iterator[str]:
    yield f"bench generate --json OUT/{gpu}-generate.json"


@stage("the plan that ships, and one by the paper's own identification, for a model of 8K positions", "1 GPU", 10)
def plan(out: Path, gpu: str) -> Iterator[str]:
    common = "--num-retrieval-heads 14 --dtype float32"
    yield f"identify OUT/plans/smollm2-135m.json {common} --json OUT/identify-smollm2-135m.json"
    train = "--train prose:1024:passkey:10 --train prose:2048:passkey:10 --train prose:4096:passkey:10"
    paper = f"--preset paper --steps 1500 {train} --json OUT/identify-paper.json"
    yield f"identify OUT/plans/paper.json {common} {paper}"


@stage("the shipped plan and its controls, and what cuts the scan's bytes further", "1 GPU", 8)
def fidelity(out: Path, gpu: str) -> Iterator[str]:
    policies = "hybrid,hybrid+float8,hybrid+int4,hybrid+refresh2,paper,same-index,random:0,random:1,random:2,own-topk"
    yield f"{BUDGET} --batch-size 50 --policies {policies} --json OUT/fidelity.json"


@stage("every peer at hybrid's bytes", "1 GPU", 8)
def peers(out: Path, gpu: str) -> Iterator[str]:
    yield f"{BUDGET} --batch-size 50 {EQUAL} --json OUT/peers.json"


@stage("the same, from smaller budgets to larger ones", "1 GPU", 6)
def budgets(out: Path, gpu: str) -> Iterator[str]:
    sweep = "--prompts 100 --batch-size 50 --budgets 128,256,1024"
    yield f"{FIDELITY} {sweep} {EQUAL} {HARD} --json OUT/peers-by-budget.json"


@stage("after `plan`: the paper's form with roles and donors of its own identification", "1 GPU", 2)
def paper(out: Path, gpu: str) -> Iterator[str]:
    own = "--plan OUT/plans/paper.json --policies hybrid,paper"
    yield f"{BUDGET} --batch-size 50 {own} --json OUT/peers-paper-roles.json"


@stage("long answers, token by token, with and without Cache Correction", "1 GPU", 6)
def long(out: Path, gpu: str) -> Iterator[str]:
    answers = "--prompts 16 --batch-size 16 --cells prose:2048:long:1536 --temperature 0.7"
    policies = "--policies hybrid,hybrid+correction,full+correction"
    yield f"{FIDELITY} --budget-tokens 512 {answers} {policies} --json OUT/long.json"


@stage("ways to identify; how stable roles are; budgets by numbers of retrieval heads", "1 GPU", 12)
def roles(out: Path, gpu: str) -> Iterator[str]:
    yield "-m experiments.identification --json OUT/identification.json"
    yield "-m experiments.stability --json OUT/stability.json --plans OUT/plans"
    found = sorted((out / "plans").glob("*-retrieval-heads.json"))  # they are there when this command is asked for
    plans = " ".join(f"--plan OUT/plans/{name}" for name in ["seed-0.json", *(path.name for path in found)])
    sweep = f"--prompts 32 --batch-size 16 --policies hybrid --budgets 128,256,512,1024 {plans}"
    cells = "--cells noise:4096:passkey:1 --cells prose:4096:passkey:5"
    yield f"{FIDELITY} {sweep} {cells} --json OUT/heads-by-budget.json"


@stage("RULER by budget, at equal bytes and by length; longer items are skipped, and say so", "1 GPU", 10)
def tasks(out: Path, gpu: str) -> Iterator[str]:
    several = "--lengths 4096 --batch-size 100 --policies hybrid --budgets 256,512,1024"
    yield f"{RULER} --tasks ruler_synthetic {several} --json OUT/ruler.json"
    some = "--tasks niah_single_1,niah_single_2,niah_multikey_1"  # full attention solves about half of each, or more
    policies = "--policies hybrid,paper,quest,tidaldecode,duo,kascade,streaming"
    equal = f"--lengths 4096 --batch-size 100 --budgets 128,256,512,1024 --match-bytes 4000 {policies}"
    yield f"{RULER} {some} {equal} --json OUT/ruler-equal-bytes.json"
    lengths = "--lengths 2048,8000 --batch-size 50 --policies hybrid --budgets 256,512,1024"
    yield f"{RULER} {some} {lengths} --json OUT/ruler-lengths.json"


@stage("policies on plain continuations, with plans found on other texts; the second needs its model", "1 GPU", 20)
def continuations(out: Path, gpu: str) -> Iterator[str]:
    own = "--json OUT/continuations-smollm2-135m.json --plans OUT/plans/continuations-smollm2-135m"
    small = "--identify code:6144:continuation:64 prose:6144:continuation:64 --evaluate code:6000:continuation:64"
    forms = "budget_tokens=512:14,7 budget_tokens=512,recent_tokens=128:14 budget_tokens=512,completion_chunk=32:14"
    sizes = "--identify-prompts 24 --batch-size 8 --evaluate-batch 10 --block-size 16"
    yield f"-m experiments.continuations {small} prose:6000:continuation:64 --forms {forms} {sizes} {own}"
    own = "--json OUT/continuations-qwen2.5-coder-1.5b.json --plans OUT/plans/continuations-qwen2.5-coder-1.5b"
    forms = "budget_tokens=1024:28,14,7 budget_tokens=4096:14,7 budget_tokens=1024,recent_tokens=128:14,7"
    sizes = "--identify-prompts 24 --evaluate-batch 5"
    yield f"-m experiments.continuations --model Qwen/Qwen2.5-Coder-1.5B-Instruct --forms {forms} {sizes} {own}"


@stage("lossless decoding: attention of several tokens, rounds of drafts, and real texts", "1 GPU of 80 GB or more", 10)
def lossless(out: Path, gpu: str) -> Iterator[str]:
    shape = "bench lossless --contexts 131072"
    yield f"{shape} --batches 1,4 --parts attend --tune --json OUT/{gpu}-lossless-attend.json"
    both = "--weights model,float8"
    yield f"{shape} --batches 1 --parts rounds --refresh 1,8 {both} --json OUT/{gpu}-lossless-rounds.json"
    real = "--model smollm2-135m --plan smollm2-135m --contexts 4000,7000 --batches 4 --parts real"
    yield f"bench lossless {real} --budget-tokens 512 --block-size 16 --json OUT/{gpu}-lossless-real.json"


@stage("vLLM, stock and with hybrid attention", "1 GPU of 80 GB or more, vLLM", 25)
def serving(out: Path, gpu: str) -> Iterator[str]:
    cases = "--fill --cases 1x1024,1x32768,1x131072,4x131072"
    for model in ("llama-3-8b", "qwen3-8b"):
        yield f"bench serving --model {model} {cases} --json OUT/{gpu}-serving-{model}.json"


@stage("vLLM on one rank and on two: the same tokens, refusals, and times", "2 GPUs of 80 GB, vLLM", 25)
def parallel(out: Path, gpu: str) -> Iterator[str]:
    cases, two = "1x32768,4x32768,8x32768,1x131072,3x131072", "--tensor-parallel-size 2"
    yield f"-m experiments ranks {two} --json OUT/{gpu}x2-ranks.json"
    yield f"bench serving --fill --cases {cases} --json OUT/{gpu}x2-serving-1-rank.json"
    more = f"bench serving --fill --cases {cases},4x131072 {two}"  # beyond what one GPU of 80 GB holds
    yield f"{more} --json OUT/{gpu}x2-serving-2-ranks.json"
    yield f"{more} --model llama-3-70b --layers 24 --json OUT/{gpu}x2-serving-70b.json"


@stage("identification with the model on one GPU and on two", "2 GPUs", 4)
def spread(out: Path, gpu: str) -> Iterator[str]:
    common = "--num-retrieval-heads 14 --dtype float32 --calibrate-prompts 32"
    yield f"identify OUT/plans/gpus.json {common} --json OUT/{gpu}x2-identify.json"
    both = f"{common} --device-map balanced --json OUT/{gpu}x2-identify-2.json"
    yield f"identify OUT/plans/gpus-2.json {both}"


@stage("generation and fidelity without a GPU", "a quiet CPU", 90)
def cpu(out: Path, gpu: str) -> Iterator[str]:
    small = "--model smollm2-135m --contexts 7000 --tokens 64 --budget-tokens 512 --block-size 16"
    small += " --ways full,hybrid,hybrid+refresh2,transformers"
    yield f"bench generate {small} --json OUT/cpu-generate.json"
    cells = "--batch-size 10 --cells noise:2048:passkey:1 --cells prose:2048:passkey:1"
    policies = "--policies hybrid,hybrid+float8,hybrid+int4,hybrid+refresh2,paper,same-index,random:0,own-topk"
    yield f"{BUDGET} {cells} {policies} --json OUT/fidelity-2k-cpu.json"
    texts = "--cells code:2048:continuation:64 --cells prose:2048:continuation:64 --prompts 8 --batch-size 8"
    few = "--policies hybrid,hybrid+refresh2,paper,same-index,own-topk"
    yield f"{FIDELITY} --budget-tokens 512 {texts} {few} --json OUT/continuations-2k-cpu.json"
    quest = "--policies hybrid,quest --budgets 512,1232 --prompts 12 --batch-size 6"
    yield f"{FIDELITY} {quest} {HARD} --json OUT/quest-twice-the-bytes-cpu.json"
    texts = "--parts real --model smollm2-135m --contexts 7000 --batches 1 --tokens 128 --ways auto --texts code"
    yield f"bench lossless {texts} --budget-tokens 512 --block-size 16 --json OUT/cpu-lossless-smollm2-135m.json"
    cells = "--cells code:1000:continuation:64 --cells prose:1000:continuation:64 --prompts 4 --batch-size 4"
    eight = "--policies full+weights8,hybrid,hybrid+weights8 --budget-tokens 512 --block-size 16 --dtype float32"
    yield f"evaluate fidelity --model smollm2-135m {eight} {cells} --json OUT/cpu-weights8-smollm2-135m.json"


# ---------------------------------------------------------------------- running them


def run(
    name: str,
    out: Path,
    gpu: str,
    dry: bool = False,
    *,
    model: str | None = None,
    data: Path = Path("data"),
    minutes: float | None = None,
) -> None:
    """Run a stage, and say how long it took.

    Args:
        name: of the stage.
        out, gpu: as in `Stage.commands`.
        dry: only print its commands.
        model, data: what MODEL and DATA stand for; None: the stage's own model.
        minutes: after which it is ended, whatever it does; results are written as they come.

    Raises:
        ConfigError: there is no such stage, or no time for it.
        StageError: a command failed.
    """
    if name not in STAGES:
        raise ConfigError(f"There is no stage {name!r}: there are {', '.join(STAGES)}.")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes must be above 0, not {minutes}: leave it out to run a stage to its end.")
    began = time.perf_counter()
    places = {"OUT": str(out), "MODEL": model or STAGES[name].model, "DATA": str(data)}
    for words in map(str.split, STAGES[name].commands(out, gpu)):
        left = 60 * (minutes or STAGES[name].minutes) - (time.perf_counter() - began)
        places["MINUTES"] = f"{max(left - _STARTING, 0) / 60:.2f}"
        command = as_process([_placed(word, places) for word in words])
        print(" ".join(["python", *command[1:]] if command[0] == sys.executable else command), file=sys.stderr)
        status = 0 if dry else execute(command, None if minutes is None else max(left, 0))
        if status is None:
            print(f"{name} is out of time: what it found lies in {out}.", file=sys.stderr)
            break
        if status:
            raise StageError(f"{' '.join(words)} ended with status {status}.")
    print(f"{name} took {time.perf_counter() - began:.0f} s", file=sys.stderr)


_STARTING = 20
"""Seconds until a command has loaded its model."""


def _placed(word: str, places: Mapping[str, str]) -> str:
    name, slash, rest = word.partition("/")
    return places[name] + slash + rest if name in places else word


def execute(command: Command, seconds: float | None = None) -> int | None:
    """Run a process to its end; its exit status, or None where it took longer than `seconds`, and was ended."""
    try:
        return subprocess.run(command, cwd=ROOT, env=_environment(), timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None


def as_process(words: Command) -> Command:
    """The command line of a process."""
    if words[0] == "-m":
        return [sys.executable, *words]
    if words[0] != "sanitized":
        return [sys.executable, "-m", "lycheedecode", *words]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise PackageError("This stage needs compute-sanitizer, which comes with CUDA.")
    return [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *as_process(words[1:])]


def gpu_name() -> str:
    """What results of this machine's GPU are called: `h100`, `a100`, ...; `cpu` where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()
    return words[0].lower()


def _environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
