"""Ten thousand generated inputs: each is taken, or refused with one sentence; none ends in a traceback or hangs.

Every input has a number, which is its seed: `make(kind, number)` shows the one that a failure names.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from lycheedecode import Engine, HeadPlan, HybridConfig, Sampling
from lycheedecode.cli import app
from lycheedecode.cli.options import parse_cell, parse_numbers
from lycheedecode.engine.prompt import check_token_ids, encode, stop_conditions, token_rows
from lycheedecode.errors import LycheeError
from lycheedecode.evaluate.tasks_data import texts
from lycheedecode.identify import IdentifySettings
from lycheedecode.plan import bundled_plans
from lycheedecode.prompts.records import read_records
from lycheedecode.results import Result

COUNTS = {
    "plan": 1500,
    "plan_text": 1000,
    "config": 1500,
    "sampling": 500,
    "settings": 500,
    "records": 1500,
    "result": 500,
    "prompt": 1500,
    "stop": 500,
    "generate": 200,
    "command": 300,
    "cell": 500,
}
assert sum(COUNTS.values()) == 10_000
SECONDS = 60
"""More than all inputs of a kind take together on a slow machine; what hangs shows where."""

# ---------------------------------------------------------------------- what is generated

_SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 32, 4096, 1 << 31, 1 << 63, 1 << 70, -(1 << 40), 0.0, 0.5, 1.0, -0.5,
    1e300, float("nan"), float("inf"), "", "a", "top_k", "ratio", "passkey", "auto", "\u2028", "\ud800", "é\n", "0",
    "1e9", b"x",
]  # fmt: skip


def anything(rng: random.Random, depth: int = 3) -> Any:
    """A value of some type."""
    kind = rng.randrange(10)
    if depth == 0 or kind < 5:
        return rng.choice(_SCALARS)
    if kind == 5:
        return rng.randint(-300, 300)
    if kind < 8:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = ["role", "content", "input_ids", "attention_mask", "data", "donors", "a", ""]
    return {rng.choice(keys): anything(rng, depth - 1) for _ in range(rng.randrange(4))}


def mutated(value: Any, rng: random.Random, share: float) -> Any:
    """The same with some of its parts replaced, dropped or doubled."""
    if rng.random() < share:
        return anything(rng, 2)
    if isinstance(value, dict):
        kept = {key: mutated(part, rng, share) for key, part in value.items() if rng.random() > share / 2}
        return kept if rng.random() > share else {**kept, "more": anything(rng, 1)}
    if isinstance(value, list):
        parts = [mutated(part, rng, share) for part in value if rng.random() > share / 2]
        return parts if not parts or rng.random() > share else [*parts, rng.choice(parts)]
    return value


def garbled(text: bytes, rng: random.Random) -> bytes:
    """A text with a few of its bytes changed, dropped or put in twice."""
    pieces = [b"[" * 5000, b'"', b"\\", b"{", b"}", b",", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\0",
              b"9" * 5000, b"NaN", b"\\ud800", "\u2028".encode(), b"null", b":", b"1e999"]  # fmt: skip
    for _ in range(rng.randrange(1, 5)):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        what = rng.randrange(4)
        if what == 0:
            text = text[:at] + rng.choice(pieces) + text[at:]
        elif what == 1:
            text = text[:at] + text[min(end, at + 20) :]
        elif what == 2:
            text = text[:at] + rng.choice(pieces) + text[at + 1 :]
        else:
            text = text[:end]
    return text


def a_plan(rng: random.Random) -> dict[str, Any]:
    return rng.choice([tiny.plan().to_json(), HeadPlan.load(bundled_plans()[0]).to_json()])


def a_prompt(rng: random.Random) -> Any:
    ids = [rng.choice([rng.randrange(4, 260), rng.randrange(-2, 400)]) for _ in range(rng.randrange(6))]
    forms: list[Callable[[], Any]] = [
        lambda: ids,
        lambda: torch.tensor(ids),
        lambda: np.array(ids, dtype=rng.choice(["int64", "int32", "float32", "O"])),
        lambda: torch.rand([rng.randrange(3) for _ in range(rng.randrange(4))]).to(
            rng.choice([torch.int64, torch.float, torch.bool])
        ),
        lambda: {"input_ids": [ids, ids], "attention_mask": [[rng.randrange(2) for _ in ids] for _ in range(2)]},
        lambda: [{"role": rng.choice(["user", "system", 3]), "content": anything(rng, 1)}],
        lambda: "".join(rng.choice(["a", " ", "é", "\n", "\ud83d", "<user>", "\0", "🙂"]) for _ in ids),
        lambda: anything(rng, 3),
    ]
    prompt = rng.choice(forms)()
    if rng.random() < 0.2:
        prompt = [prompt, rng.choice(forms)()]
    return mutated(prompt, rng, 0.15) if isinstance(prompt, (list, dict)) and rng.random() < 0.5 else prompt


def some(names: Any, rng: random.Random) -> dict[str, Any]:
    """Arguments of a settings class: a few of them, each with some value."""
    return {name: anything(rng, 1) for name in rng.sample(sorted(names), rng.randrange(1, 4))}


_RECORDS = [
    b'{"question": "Who?", "answers": ["She"]}\n{"question": "What?", "answers": "it"}\n',
    '[{"a": 1},\n {"a": "two\u2028lines"}]'.encode(),
    b'\xef\xbb\xbf{"data": [{"context": "x", "input": "y"}]}',
    b"question,answer\nWho,She\n\"a, b\",'c'\n",
    b"a\tb\n1\t2\n",
]
_RESULT = b'{"command": "bench ops", "settings": {"batch": 1}, "result": {"rows": [{"op": "scan", "ms": 0.5}]}}'


_WORDS = ["smollm2-135m", "plan.json", "missing.json", ".", "", "-", "--", "--json", "--jsn", "-h", "--gates", "--png",
          "--html", "out.json", "none/out.json", "1", "-1", "\u2028", "é", "--model", "-q", "x" * 300]  # fmt: skip


def make(kind: str, number: int) -> Any:
    """The input of a kind with a number."""
    rng = random.Random(f"{kind} {number}")
    if kind == "plan":
        return mutated(a_plan(rng), rng, rng.choice([0.001, 0.02, 0.3]))
    if kind == "plan_text":
        return garbled(json.dumps(a_plan(rng)).encode(), rng)
    if kind in ("records", "result"):
        return rng.choice([".jsonl", ".json", ".csv", ".tsv"]), garbled(
            _RESULT if kind == "result" else rng.choice(_RECORDS), rng
        )
    if kind == "prompt":
        return a_prompt(rng), rng.random() < 0.3
    if kind == "stop":
        return anything(rng, 2)
    if kind == "generate":
        return a_prompt(rng), {"max_new_tokens": rng.choice([1, 2, 3, anything(rng, 1)]), "stop": anything(rng, 1)}
    if kind == "command":
        return [rng.choice(_WORDS) for _ in range(rng.randrange(1, 5))]
    if kind == "cell":
        parts = [rng.choice(["prose", "", "a:b", "16", "²", "-1", "passkey", "continuation", "1e3", "9" * 5000, "٣"])
                 for _ in range(rng.randrange(1, 6))]  # fmt: skip
        return rng.choice([":", ":", ","]).join(parts)
    return some({"config": HybridConfig, "sampling": Sampling, "settings": IdentifySettings}[kind].__annotations__, rng)


# ---------------------------------------------------------------------- what takes it


def take(kind: str, given: Any, folder: Path, engine: Engine) -> None:
    """Hand an input to what reads its kind."""
    if kind == "plan":
        plan = HeadPlan.from_json(given)
        hash(plan)
        plan.save(folder / "plan.json")
        assert HeadPlan.load(folder / "plan.json").donors == plan.donors
    elif kind == "plan_text":
        (folder / "plan.json").write_bytes(given)
        HeadPlan.load(folder / "plan.json")
    elif kind == "records":
        suffix, content = given
        (folder / f"records{suffix}").write_bytes(content)
        for record in read_records(folder / f"records{suffix}"):
            assert isinstance(record, dict)
            for value in record.values():
                assert all(isinstance(text, str) for text in texts(value))
    elif kind == "result":
        (folder / "result.json").write_bytes(given[1])
        Result.load(folder / "result.json")
    elif kind == "prompt":
        prompt, chat = given
        for row in encode(prompt, engine.tokenizer, chat, 260):
            assert row
            assert all(type(token) is int and 0 <= token < 260 for token in row)
        if not isinstance(prompt, (str, dict)):
            check_token_ids(token_rows(prompt), 260)
    elif kind == "stop":
        stop_conditions(given, engine.tokenizer)
    elif kind == "generate":
        prompt, options = given
        for made in engine.generate(prompt, **options):
            assert 1 <= len(made.token_ids) <= options["max_new_tokens"]
    elif kind == "command":
        command(given, folder)
    elif kind == "cell":
        str(parse_cell(given) if ":" in given else parse_numbers("--sizes", given))
    else:
        made = {"config": HybridConfig, "sampling": Sampling, "settings": IdentifySettings}[kind](**given)
        if kind == "config":
            assert 1 <= made.capacity_blocks(1000) <= 1000
            HybridConfig(**made.to_dict())


def command(words: list[str], folder: Path) -> None:
    """`lycheedecode inspect` in a folder with a plan; its line is raised when it refuses."""
    tiny.plan().save(folder / "plan.json")
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit) as ended,
    ):
        app(["inspect", *words], prog_name="lycheedecode")
    assert ended.value.code in (0, 2), said.getvalue()
    assert "Traceback" not in said.getvalue()
    if ended.value.code == 2:
        raise LycheeError(said.getvalue().strip())


@pytest.mark.parametrize("kind", COUNTS)
def test_every_input_is_taken_or_refused_in_one_sentence(kind, tmp_path, byte_tokenizer, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = Engine(llama, byte_tokenizer)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    refused, faults = 0, []
    try:
        for number in range(COUNTS[kind]):
            try:
                take(kind, make(kind, number), tmp_path, engine)
            except LycheeError as error:
                refused += 1
                if "\n" in str(error).strip() or not str(error).endswith((".", ")", " --help")):
                    faults.append((number, "not one sentence", str(error)[:200]))
            except Exception as error:
                faults.append((number, type(error).__name__, str(error)[:200]))
    finally:
        faulthandler.cancel_dump_traceback_later()
    kinds: dict[str, tuple] = {}
    for number, what, said in faults:
        kinds.setdefault(f"{what}: {said[:60]}", (number, said))
    assert not faults, f"{len(faults)} of {COUNTS[kind]} {kind}: {json.dumps(kinds, indent=1, default=repr)}"
    assert 0 < refused < COUNTS[kind], "what is generated is neither all good nor all bad"
