"""Tasks of lm-evaluation-harness under several policies: scores with intervals, KV bytes, a resumable record.

The harness makes the requests and the scores. Each task is run once for every policy, but decoded once: the first run
answers for all policies after one prefill of each batch, the others find their answers in the record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...checks import LARGEST, check_sizes, check_temperature
from ...engine.engine import Engine
from ...errors import ConfigError
from . import catalogue
from .intervals import difference, score

if TYPE_CHECKING:
    from ...integrations.lm_eval import Answer, Key, LycheeLM

__all__ = ["TaskOptions", "evaluate_tasks"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is asked of the model.

    Attributes:
        lengths: tokens of the items that are made (RULER, gsm8k_many_shot), their answers included.
        limit: items of each task; by default 100 of a generated one, and all of a data set.
        samples: solutions to each problem of a mathematical set.
        text: source of RULER's prose haystacks, as in `load_text`.
        data: folder of data sets; None asks the hub.
        seed: of generated items, of sampling and of intervals.
        chat: put prompts into the chat template; None: where there is one and the task is ours and made for it.
        batch_size: prompts decoded together.
        max_new_tokens, temperature: replace what tasks ask for.
    """

    lengths: tuple[int, ...] = (4096,)
    limit: int | None = None
    samples: int = 1
    text: str = "prose"
    data: Path | None = None
    seed: int = 0
    chat: bool | None = None
    batch_size: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        least = {"limit": 1, "samples": 1, "batch_size": 1, "max_new_tokens": 1, "seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ConfigError(f"{name} must be at least {smallest}, not {value}.")
        check_sizes(vars(self))
        check_temperature("temperature", self.temperature or 0)
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths must be numbers of tokens, not {list(self.lengths)}.")


@dataclass(frozen=True)
class _Cell:
    """A task, at a length where it has one."""

    task: str
    length: int | None = None

    def __str__(self) -> str:
        return self.task if self.length is None else f"{self.task} {self.length}"


def evaluate_tasks(
    engines: Mapping[str, Engine],
    tasks: Sequence[str],
    options: TaskOptions | None = None,
    *,
    answers: MutableMapping[Key, Answer] | None = None,
    on_cell: Callable[[list[dict[str, Any]]], None] = lambda cells: None,
    report: Callable[[str, int, int], None] = lambda stage, step, steps: None,
) -> list[dict[str, Any]]:
    """Evaluate engines of one model on tasks.

    Args:
        engines: by name; what comes after the first is compared with it, item by item.
        tasks: names of tasks and groups: `ruler`, `longbench`, `aime24`, ... or any that the harness has.
        options: what is asked.
        answers: finished items, which are not decoded again; a `Record` keeps them in a file.
        on_cell: called after every task and length with all that is finished.
        report: told of a stage, its steps and how many there are.

    Returns:
        for each task and length `{"task", "length", "scores": {engine: {...}}}`, or `{"task", "length", "skipped"}`
        with a reason. Scores have `metrics` (name -> value, low, high), `items`, `skipped` (items with reasons),
        `tokens_per_answer`, `prompt_tokens`, `cut_off` (answers that reached their limit), `kv_bytes_per_token`, and
        after the first engine `difference` (of the first metric, paired).

    Raises:
        TaskNameError, DataError, TaskLengthError, TextError, TaskRequestError: see there; each is one sentence.
    """
    from ...integrations.lm_eval import LycheeLM

    options = options or TaskOptions()
    stage = ""
    lm = LycheeLM(
        engines, batch_size=options.batch_size, answers=answers, seed=options.seed,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        report=lambda done, all_of_them: report(stage, done, all_of_them),
    )  # fmt: skip
    names, cells = catalogue.expand(tasks), []
    catalogue.check_data(names, options.data)
    most = lm.max_length or LARGEST
    for cell in _cells(names, [min(options.lengths)]):
        if cell.length is not None and cell.length <= most:
            _load(cell, lm, replace(options, limit=1))  # whether there is room shows before any task takes its time
    for cell in _cells(names, options.lengths):
        entry: dict[str, Any] = {"task": cell.task, "length": cell.length}
        if cell.length is not None and cell.length > most:
            entry["skipped"] = f"{cell.length} tokens are more than the model's {most} positions"
        else:
            stage = str(cell)
            task = _load(cell, lm, options)
            entry["scores"] = _run(task, cell, lm, options)
        cells.append(entry)
        on_cell(cells)
    return cells


def _cells(tasks: Sequence[str], lengths: Sequence[int]) -> list[_Cell]:
    generated = [name for name in tasks if catalogue.is_generated(name)]
    return [_Cell(name, length) for length in lengths for name in generated] + [
        _Cell(name) for name in tasks if not catalogue.is_generated(name)
    ]


# ---------------------------------------------------------------------- one cell


def _load(cell: _Cell, lm: LycheeLM, options: TaskOptions) -> Any:
    metadata = {
        "seed": options.seed,
        "text": options.text,
        "data": None if options.data is None else str(options.data),
    }
    if cell.length is not None:
        count = _counter(lm, _chats(cell.task, lm, options))
        metadata |= {"length": cell.length, "items": options.limit or 100, "count": count}
    task = catalogue.load(cell.task, metadata, options.samples)
    task.set_fewshot_seed(options.seed)
    return task


def _chats(task: str, lm: LycheeLM, options: TaskOptions) -> bool:
    if options.chat is None:
        return bool(lm.tokenizer.chat_template) and catalogue.may_chat(task)
    return options.chat


def _counter(lm: LycheeLM, chat: bool) -> Callable[[str, str], int]:
    """Counts the tokens of a question and the beginning of its answer, joined as the harness joins them."""

    def count(text: str, prefix: str) -> int:
        lm.templated = chat
        if chat:
            messages = [{"role": "user", "content": text}]
            messages += [{"role": "assistant", "content": prefix}] if prefix else []
            return len(lm.tok_encode(lm.apply_chat_template(messages, add_generation_prompt=not prefix)))
        return len(lm.tok_encode(f"{text} {prefix}" if prefix else text))

    return count


def _run(task: Any, cell: _Cell, lm: LycheeLM, options: TaskOptions) -> dict[str, Any]:
    """Scores of every engine."""
    from lm_eval.evaluator import evaluate

    chat = _chats(cell.task, lm, options)
    scores: dict[str, Any] = {}
    base: dict[int, float] = {}
    for name in lm.engines:
        lm.chosen, lm.templated = name, chat
        result = evaluate(
            lm, {"tasks": {task.task_name: task}}, limit=options.limit, bootstrap_iters=0, apply_chat_template=chat
        )
        items = [_Item.of(sample, task.task_name, lm) for sample in result["samples"][task.task_name]]
        for item in items:
            item.note(cell, lm)
        scores[name], values = _score(items, task, options.seed)
        shared = [document for document in base if document in values]
        if shared:
            paired = difference([values[one] for one in shared], [base[one] for one in shared], options.seed)
            scores[name]["difference"] = paired._asdict()
        base = base or values
    return scores


@dataclass(frozen=True)
class _Item:
    """What the harness made of one document with one of a task's filters, and the answers behind it."""

    document: int
    filter: str
    prompt_hash: str
    metrics: Mapping[str, Any]
    answers: Mapping[Key, Answer]

    @classmethod
    def of(cls, sample: Mapping[str, Any], task: str, lm: LycheeLM) -> _Item:
        from ...integrations.lm_eval import request_key

        requests = zip(sample["arguments"], sample["resps"], strict=True)
        keys = [
            (lm.chosen, request_key(task, sample["doc_id"], index, number, arguments))
            for index, (arguments, responses) in enumerate(requests)
            for number in range(len(responses))
        ]
        prompt = hashlib.sha256(str(sample["arguments"][0][0]).encode()).hexdigest()[:16]
        metrics = {name: sample[name] for name in sample["metrics"]}
        return cls(sample["doc_id"], sample["filter"], prompt, metrics, {key: lm.answers[key] for key in keys})

    @property
    def skipped(self) -> str | None:
        return next((answer.skipped for answer in self.answers.values() if answer.skipped), None)

    def named(self) -> dict[str, Any]:
        """Metrics by name; tasks with several filters have them under each."""
        return {
            name if self.filter == "none" else f"{name}, {self.filter}": value for name, value in self.metrics.items()
        }

    def note(self, cell: _Cell, lm: LycheeLM) -> None:
        """Put it into the record, where there is one."""
        note = getattr(lm.answers, "note", None)
        if note is None:
            return
        for number, key in enumerate(self.answers):
            facts = {"task": cell.task, "length": cell.length, "document": self.document, "number": number}
            note(key, **facts, prompt_hash=self.prompt_hash)
            if self.skipped is None:
                note(key, **{f"score {name}": value for name, value in self.named().items()})


def _score(items: Sequence[_Item], task: Any, seed: int) -> tuple[dict[str, Any], dict[int, float]]:
    """A row of results, and the first metric of each document that has one which is a number."""
    kept = [item for item in items if item.skipped is None]
    metrics: dict[str, list[Any]] = {}
    for item in kept:
        for name, value in item.named().items():
            metrics.setdefault(name, []).append(value)
    aggregations = task.aggregation()
    entry: dict[str, Any] = {
        "metrics": {
            name: score(values, aggregations.get(name.split(",")[0], fmean), seed)._asdict()
            for name, values in metrics.items()
        },
        "items": len({item.document for item in kept}),
        "skipped": [
            {"document": document, "reason": reason}
            for document, reason in {item.document: item.skipped for item in items if item.skipped}.items()
        ],
    }
    answers = list({key: answer for item in kept for key, answer in item.answers.items()}.values())
    if answers:
        entry["prompt_tokens"] = fmean(answer.prompt_tokens for answer in answers)
        entry["tokens_per_answer"] = fmean(answer.tokens for answer in answers)
        entry["cut_off"] = sum(answer.finish_reason == "length" for answer in answers)
    read = [answer.kv_bytes_per_token for answer in answers if answer.kv_bytes_per_token is not None]
    entry["kv_bytes_per_token"] = fmean(read) if read else None
    first = next(iter(metrics), "")
    values = {item.document: item.named()[first] for item in kept if first in item.named()}
    numeric = all(isinstance(value, Real) for value in values.values())
    return entry, {document: float(value) for document, value in values.items()} if numeric else {}
