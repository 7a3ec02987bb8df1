"""Which tasks there are, and how they are loaded: our own task files, LongBench, and whatever the harness ships."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from ...errors import LycheeError, first_line
from ...integrations.lm_eval_private import keep_samples, task_file
from ..ruler.questions import read_hotpotqa, read_squad
from ..tasks_data import DataError, Documents, all_at_once, find_records, texts
from .gsm8k import read_problems
from .metrics import FIRST_LINE, LONGBENCH, PLAIN, longbench
from .problems import aime24, olympiadbench

FILES = Path(__file__).parents[1] / "task_files"
RULER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
MATHEMATICS = ("aime24", "olympiadbench")
MANY_SHOT = "gsm8k_many_shot"
FAMILIES = {"ruler": RULER, "longbench": tuple(f"longbench_{subset}" for subset in LONGBENCH)}
GROUPS = {**FAMILIES, "ruler_synthetic": RULER[:-2]}
"""`ruler_synthetic` needs no data."""
OWN = (*RULER, *MATHEMATICS, MANY_SHOT, *GROUPS["longbench"])
"""Tasks whose data is made here, or may come from a folder."""


class TaskNameError(LycheeError):
    """A task that does not exist; the message names the near ones."""


def expand(names: Sequence[str]) -> list[str]:
    """Names of single tasks, each once; groups, and tags of the harness, are replaced by their members.

    Raises:
        TaskNameError: an unknown name.
    """
    found: dict[str, None] = {}
    for name in names:
        found.update(dict.fromkeys(GROUPS.get(name) or ([name] if name in OWN else _of_the_harness(name))))
    return list(found)


def _of_the_harness(name: str) -> list[str]:
    known = _harness_tasks()
    if name not in known.all_tasks:
        ours = [*GROUPS, *OWN]
        near = get_close_matches(name, [*ours, *known.all_tasks], n=4)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"ours are {', '.join([*GROUPS, *RULER, *MATHEMATICS, MANY_SHOT])}."
        )
        raise TaskNameError(f"There is no task {name!r}: {hint}")
    if name in known.all_subtasks:
        return [name]
    return list(_harness_task(name))


@lru_cache(maxsize=1)
def _harness_tasks() -> Any:
    """The harness's own index; reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@cache
def _harness_task(name: str) -> Mapping[str, Any]:
    """A task of the harness, or those of a group, by name; their data is read once."""
    return _loaded(_harness_tasks(), name, name)


def check_data(names: Sequence[str], data: Path | None) -> None:
    """Raise one `DataError` for all tasks whose data cannot be found or read; what is found is kept for later."""
    folder = None if data is None else str(data)
    own: dict[str, Callable[[], object]] = {
        "qa_1": partial(read_squad, data),
        "qa_2": partial(read_hotpotqa, data),
        "aime24": partial(aime24, folder),
        "olympiadbench": partial(olympiadbench, folder),
        MANY_SHOT: partial(read_problems, data),
        **{name: partial(_longbench_data, name.removeprefix("longbench_"), folder) for name in GROUPS["longbench"]},
    }
    wrong = []
    for name in names:
        check = own.get(name) or (None if name in OWN else partial(_harness_task, name))
        try:
            if check is not None:
                check()
        except DataError as error:
            wrong.append(error if name in str(error) else DataError(f"{name}: {error}"))
    if wrong:
        raise all_at_once(wrong)


def is_generated(name: str) -> bool:
    """Whether a task is made for a length."""
    return name in RULER or name == MANY_SHOT


def takes_samples(name: str) -> bool:
    """Whether a task asks for several samples of each item."""
    return name in MATHEMATICS


def may_chat(name: str) -> bool:
    """Whether a task's prompts go into a chat template by default: ours do, but for those that are made of examples."""
    return name in OWN and name.removeprefix("longbench_") not in (*PLAIN, MANY_SHOT)


def load(name: str, metadata: Mapping[str, Any], samples: int = 1) -> Any:
    """A task of the harness, ready to be evaluated.

    Args:
        name: of a single task.
        metadata: what our data sets are told: `length`, `items`, `count`, `seed`, `text`, `data`.
        samples: answers to each item, for tasks that take samples.

    Raises:
        DataError: data that cannot be found.
        TaskLengthError: a length without room for the question.
    """
    from lm_eval.tasks import TaskManager

    if name in GROUPS["longbench"]:
        manager = TaskManager(include_defaults=False, metadata=dict(metadata))
        [task] = _loaded(manager, _longbench(name), name).values()
    elif name in OWN:
        manager = TaskManager(include_path=FILES, include_defaults=False, metadata=dict(metadata))
        [task] = _loaded(manager, name, name).values()
    else:
        [task] = _harness_task(name).values()
    if takes_samples(name):
        keep_samples(task, samples)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    return task


def _loaded(manager: Any, spec: Any, name: str) -> dict[str, Any]:
    """Tasks by name; the harness reads their data at once."""
    try:
        return manager.load([spec])["tasks"]
    except LycheeError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError) as error:  # the last two: of the package datasets
        raise DataError(f"The task {name!r} of the harness cannot be loaded: {first_line(error)}.") from None


def _longbench(name: str) -> dict[str, Any]:
    """A set of LongBench: prompts and lengths of answers as the harness has them, data and scores as we do.

    The harness's own scores need three more packages, its data the hub.
    """
    subset = name.removeprefix("longbench_")
    theirs = _longbench_file(subset)
    generation = {**theirs["generation_kwargs"], "do_sample": False, "temperature": 0.0}
    if subset in FIRST_LINE:
        generation["until"] = ["\n"]
    return {
        "task": name,
        "custom_dataset": partial(_longbench_data, subset),
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": theirs["doc_to_text"],
        "doc_to_target": "answers",
        "process_results": longbench(subset),
        "generation_kwargs": generation,
        "metric_list": [{"metric": LONGBENCH[subset].__name__, "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": theirs["metadata"]["version"]},
    }


def _longbench_file(subset: str) -> dict[str, Any]:
    return task_file("longbench", f"{subset}.yaml")


def _longbench_records(subset: str, data: Path | None) -> list[dict[str, Any]]:
    folders = ("", "longbench/", "LongBench/", "data/")
    names = tuple(f"{folder}{subset}{suffix}" for folder in folders for suffix in (".jsonl", ".json"))
    hub = _longbench_file(subset)["dataset_path"]
    return find_records(f"longbench_{subset}", names, data, hub, subset, misfit=_not_longbench)


def _not_longbench(record: Mapping[str, Any]) -> str | None:
    if isinstance(record.get("context"), (list, Mapping)) and "answer" in record:
        return (
            "these are HotpotQA's own rows (question, answer, documents), which the task qa_2 reads; LongBench's have "
            "input, context (one text) and answers"
        )
    missing = [name for name in ("context", "answers") if not record.get(name)]
    return f"its first record has no {' and no '.join(missing)}" if missing else None


def _longbench_data(subset: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    records = _longbench_records(subset, None if data is None else Path(data))
    made = (_longbench_document(subset, number, record) for number, record in enumerate(records, start=1))
    return {"test": Documents(made)}


def _longbench_document(subset: str, number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    answers = texts(record.get("answers"))
    if not isinstance(record.get("context"), str) or not answers:
        raise DataError(f"longbench_{subset}: record {number} lacks a context (a text) or answers.")
    # Published as `input`, called `question` in the harness's prompts.
    question = str(record.get("question") or record.get("input") or "")
    classes = texts(record.get("all_classes"))
    return {
        "context": record["context"], "input": question, "question": question, "answers": answers,
        "all_classes": classes or None,
    }  # fmt: skip
