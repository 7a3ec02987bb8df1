"""`bench memory` on a tiny model: it compares tokens and logits, counts misses, refuses; times mean nothing here."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lycheedecode.bench import memory_steps, memory_texts
from lycheedecode.bench.reuse import replay, reuse_of
from lycheedecode.cli import app
from lycheedecode.errors import InputError
from lycheedecode.results import Result

pytestmark = [
    pytest.mark.filterwarnings("ignore:Without a GPU"),
    pytest.mark.usefixtures("benchmarks_collect_little"),
]
MISSES = {100: 0.25, 150: 0.13, 200: 0.06, 300: 0.02}


def run(*arguments, status=0):
    done = CliRunner().invoke(app, ["bench", "memory", *arguments])
    assert done.exit_code == status, done.output
    return done


def rows_of(path, *arguments):
    run("--smoke", *arguments, "--json", str(path))
    return json.loads(path.read_text())["result"]["rows"]


def test_texts(tmp_path):
    rows = rows_of(tmp_path / "texts.json", "--store-percents", "100,300")
    assert [(row["batch"], row["cache"], row["store_percent"]) for row in rows] == [
        (batch, *kind) for batch in (1, 2) for kind in (("resident", None), ("host", 100), ("host", 300))
    ]
    for resident, small, large in (rows[:3], rows[3:6]):
        assert resident["miss_rate"] == resident["bytes_on_host"] == 0
        assert small["bytes_on_host"] == large["bytes_on_host"] == resident["bytes_on_gpu"]
        assert small["bytes_on_gpu"] <= large["bytes_on_gpu"]
        assert 0 < large["miss_rate"] <= small["miss_rate"] < 1
        assert 0 < large["later_miss_rate"] <= large["miss_rate"]  # the store was filled by then
        assert ("ms" in small) == torch.cuda.is_available()


def test_steps_and_prefill(tmp_path):
    path = tmp_path / "steps.json"
    rows = rows_of(path, "--parts", "steps,prefill", "--store-percents", "100,300", "--at-once", "--readings", "share")
    steps, prefill = ([row for row in rows if row["part"] == part] for part in ("steps", "prefill"))
    assert [(row["batch"], row["cache"], row.get("ahead")) for row in steps] == [
        (batch, *kind) for batch in (1, 2) for kind in
        (("resident", None), *[("host", True), ("host", False)] * 2, ("full", None))
    ]  # fmt: skip
    for resident, small, at_once, large, _, full in (steps[:6], steps[6:]):
        assert at_once["miss_rate"] == small["miss_rate"]
        assert small["error"] < 1e-5  # the same blocks in the same order, in 16 bits too
        assert large["error"] < 1e-5
        assert 0 < large["miss_rate"] < small["miss_rate"] < 0.5
        assert small["bytes_on_host"] == full["bytes_on_gpu"]
        assert resident["bytes_read"] < full["bytes_read"]
        assert small["fetched_bytes"] > large["fetched_bytes"] > 0
    assert [row["cache"] for row in prefill] == ["resident", "host"] * 2
    assert all(row["error"] < (1e-2 if torch.cuda.is_available() else 1e-5) for row in prefill)  # in the same chunks
    assert all(row["seconds"] >= row["prefill_seconds"] for row in prefill)  # the cache is made first
    for one, two in (prefill[:2], prefill[2:]):
        assert one["slower"] == 0
        assert two["slower"] == pytest.approx(two["seconds"] / one["seconds"] - 1)


STEPS = "--parts", "steps", "--store-percents", "200"


def test_forms_of_steps(tmp_path):
    """Each beside a resident cache of its own; what is fetched less often is fetched less."""
    forms = ["hybrid", "hybrid+float8", "hybrid+refresh2", "hybrid+refresh4"]
    rows = rows_of(tmp_path / "forms.json", *STEPS, "--readings", "share", "--forms", ",".join(forms))
    rows = [row for row in rows if row["batch"] == 2 and row["cache"] != "full"]
    assert [(row["form"], row["cache"]) for row in rows] == [
        (form, cache) for form in forms for cache in ("resident", "host")
    ]
    host = {row["form"]: row for row in rows if row["cache"] == "host"}
    assert all(row["error"] < 1e-5 for row in host.values())
    assert host["hybrid+float8"]["part_of_full_cache"] < host["hybrid"]["part_of_full_cache"] < 1
    # The keys of retrieval heads need not cross the link, unless the scan has them in 8 bits only.
    assert host["hybrid"]["fetched_bytes"] < host["hybrid+float8"]["fetched_bytes"]
    assert host["hybrid"]["miss_rate"] == host["hybrid+float8"]["miss_rate"] < host["hybrid+refresh2"]["miss_rate"]
    assert host["hybrid+refresh4"]["fetched_bytes"] < host["hybrid"]["fetched_bytes"]


def test_readings_of_steps(tmp_path):
    """Selections that stay are not fetched."""
    rows = rows_of(tmp_path / "readings.json", *STEPS, "--readings", "budget,none")
    rows = [row for row in rows if row["batch"] == 2 and row["cache"] == "host"]
    assert [(row["reading"], row["fetched_bytes"] > 0) for row in rows] == [("budget", True), ("none", False)]


def test_what_is_written_as_it_goes_can_be_read(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no more")

    monkeypatch.setattr(memory_texts, "_from_host", broken)
    path = tmp_path / "texts.json"
    run("--smoke", "--json", str(path), status=70)
    assert [row["cache"] for row in Result.load(path).rows] == ["resident"]


def test_other_tokens_are_no_measurement(monkeypatch):
    made = iter([({"bytes_on_gpu": 1}, [(1, 2)]), ({}, [(1, 3)])])
    monkeypatch.setattr(memory_texts, "_generated", lambda *_: next(made))
    monkeypatch.setattr("lycheedecode.bench.memory.format_row", str)
    words = "With a store of 100% of a selection of 80 tokens, tokens of 1 of 1 sequences differ"
    assert words in run("--smoke", status=1).stderr


def test_other_logits_and_blocks_are_no_measurement(monkeypatch):
    monkeypatch.setattr(memory_steps, "relative_error", lambda *_: 0.5)
    assert "from host memory differ by 5.0e-01" in run("--smoke", "--parts", "steps", status=1).stderr
    monkeypatch.setattr(memory_steps.BlockStore, "wait_for", lambda store, layer: store.pool.keys.add_(1))
    assert "is not the cache's" in run("--smoke", "--parts", "steps", status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--store-percents", "50"], "store_percents must be at least 100"),
        (["--cases", "4096"], "'4096' is not a batch and a context"),
        (["--parts", "speed"], "parts must be of steps, prefill, texts"),
        (["--readings", "mine"], "readings must be of share, budget, none"),
        (["--forms", "paper"], "forms must be of hybrid, hybrid+float8"),
        (["--model", "smollm2-135m", "--layers", "3"], "--layers cuts random models only"),
    ],
)
def test_bad_input(arguments, words):
    assert words in run(*arguments, status=2).stderr


# ---------------------------------------------------------------------- selections that change as real ones do


def misses_in_a_store(made, slots, newest):
    """Share of selected blocks, after the first quarter, that a store of the `slots` last selected ones lacks."""
    asked = missed = 0
    for row in made.flatten(1, 2).unbind(1):
        held: dict[int, int] = {}
        for step, blocks in enumerate(row.tolist()):
            stored = [block for block in blocks if block < newest]
            lacking = [block for block in stored if block not in held]
            held |= dict.fromkeys(stored, step)
            while len(held) > slots:
                del held[min(held, key=held.get)]
            if step >= len(row) // 4:
                asked, missed = asked + len(blocks), missed + len(lacking)
    return missed / asked


def test_replayed_selections_miss_as_often(tmp_path):
    made = replay(MISSES, 120, 2, 2, 64, 32768, 16, seed=1)
    assert made.shape == (120, 2, 2, 64)
    assert made.dtype == torch.int32
    assert all(len(set(blocks)) == 64 for blocks in made.flatten(0, 2).tolist())
    newest = 32768 // 16 - 1
    assert (made < newest + 1 + (32768 + 120) % 16 + 8).all()
    for percent, share in MISSES.items():
        assert misses_in_a_store(made, 64 * percent // 100, newest) == pytest.approx(share, abs=0.015)


def test_misses_come_from_the_rows_most_like_this_case(tmp_path):
    path = tmp_path / "texts.json"
    cells = [(budget, context, percent) for budget in (512, 4096) for context in (4096, 32768) for percent in MISSES]
    rows = [{"part": "texts", "budget_tokens": budget, "context": context, "store_percent": percent,
             "miss_rate": MISSES[percent] * budget / context} for budget, context, percent in cells]  # fmt: skip
    Result("bench memory", rows=[*rows, {"part": "texts", "store_percent": None}]).save(path)
    for case, reading, cell in [
        ((4096, 131072), "share", (512, 32768)),
        ((4096, 131072), "budget", (4096, 32768)),
        ((4096, 32768), "share", (4096, 32768)),
        ((512, 4096), "budget", (512, 4096)),
    ]:
        found = reuse_of(path, *case, reading)
        assert (found.budget_tokens, found.context) == cell
        assert found.misses == pytest.approx({p: m * cell[0] / cell[1] for p, m in MISSES.items()})
    Result("bench memory", rows=[row | {"later_miss_rate": row["miss_rate"] / 2} for row in rows]).save(path)
    later = reuse_of(path, 4096, 32768, "share").misses
    assert later == pytest.approx({p: m / 16 for p, m in MISSES.items()})
    Result("bench ops", rows=[{"ms": 1}]).save(path)
    with pytest.raises(InputError, match="has no misses by the size of the store"):
        reuse_of(path, 4096, 131072, "share")


def test_too_short_a_context():
    with pytest.raises(InputError, match="100 tokens are too few for selections of 64 blocks that change"):
        replay(MISSES, 10, 1, 1, 64, 100, 4, seed=0)
