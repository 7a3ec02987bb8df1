"""What answers are worth, how sure that is, and the record that keeps them."""

import json
import random

import numpy
import pytest

from lycheedecode.evaluate.tasks import intervals, mathematics, metrics
from lycheedecode.evaluate.tasks.answer_log import Record, RecordError, record_path
from lycheedecode.integrations.lm_eval import Answer

# ---------------------------------------------------------------------- RULER and LongBench


def test_ruler_counts_what_an_answer_contains():
    doc = {"answers": ["123", "ABC"], "match": "all"}
    assert metrics.ruler(doc, ["abc and 12"]) == {"recall": 0.5}
    assert metrics.ruler({**doc, "match": "any"}, ["abc and 12"]) == {"recall": 1.0}
    assert metrics.ruler({**doc, "match": "any"}, ["nothing"]) == {"recall": 0.0}


def test_longbench_scores():
    assert metrics.f1("The Queen, a river", "queen river") == 1.0
    assert metrics.f1("queen of rivers", "queen river") == pytest.approx(2 / 5)
    assert metrics.rouge_l("a b c d", "a x c") == pytest.approx(4 / 7)
    assert metrics.rouge_l("", "a") == metrics.rouge_l("...", "a") == 0.0
    assert metrics.rouge_l("the " * 3000, "a word") == 0.0
    assert metrics.edit_similarity("\n# note\nreturn x\nmore", "return x") == 1.0
    assert metrics.edit_similarity("// first\n    return x\nmore", "    return x") == 1.0
    assert metrics.edit_similarity("", "return x") == 0.0
    classes = ["a river", "a castle", "a castle wall"]
    assert metrics.classified("a river", "a river", classes) == 1.0
    assert metrics.classified("a river or a castle", "a river", classes) == 0.5
    assert metrics.classified("a castle wall", "a castle wall", classes) == 1.0
    assert metrics.retrieved("Paragraph 3, perhaps 4", "Paragraph 3") == 0.5
    assert metrics.counted("none", "3") == 0.0
    assert set(metrics.LONGBENCH) >= metrics.PLAIN
    doc = {"answers": ["x", "a river"], "all_classes": classes}
    assert metrics.longbench("trec")(doc, ["a river\na castle"]) == {"classified": 1.0}
    assert metrics.longbench("hotpotqa")(doc, ["river"]) == {"f1": 1.0}
    code = {"answers": ["        return self.x"], "all_classes": None}
    assert metrics.longbench("lcc")(code, ["\n        return self.x\n"]) == {"edit_similarity": 1.0}
    assert metrics.longbench("lcc")(code, ["return self.x"]) == {"edit_similarity": 0.76}


@pytest.fixture(scope="module")
def harness():
    """The harness's own functions for LongBench; two packages that they import stand in for themselves."""
    import sys
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path
    from types import ModuleType

    import lm_eval.tasks
    from rapidfuzz import fuzz

    stand_ins = {"jieba": ModuleType("jieba"), "fuzzywuzzy": ModuleType("fuzzywuzzy")}  # Chinese; edit distances
    stand_ins["fuzzywuzzy"].fuzz = ModuleType("fuzz")
    stand_ins["fuzzywuzzy"].fuzz.ratio = lambda one, two: round(fuzz.ratio(one, two))  # as with python-Levenshtein
    spec = spec_from_file_location("metrics", Path(lm_eval.tasks.__file__).parent / "longbench" / "metrics.py")
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setitem(sys.modules, name, stand_in)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("subset", "theirs"),
    [
        ("hotpotqa", "qa_f1_score"), ("gov_report", "rouge_score"), ("trec", "classification_score"),
        ("passage_count", "count_score"), ("passage_retrieval_en", "retrieval_score"), ("lcc", "code_sim_score"),
    ],
)  # fmt: skip
def test_longbench_scores_are_the_harness_own(subset, theirs, harness):
    rng = random.Random(subset)
    classes = ["river", "river bank", "bank", "an", "a river bank", "city", "other city", "the"]
    pieces = [
        *classes,
        "The",
        "(x)",
        ".",
        ",",
        "Paragraph 3",
        "3",
        "12",
        "7",
        "return x",
        "    if y:",
        "# note",
        "//",
        "`",
    ]
    line_ends = ["\n"] if subset == "lcc" else [" ", " ", ". "]
    scored = 0
    for _ in range(400):
        answer = "".join(rng.choice(pieces) + rng.choice([*line_ends, " "]) for _ in range(rng.randrange(9)))
        answers = [f"Paragraph {rng.choice([3, 7, 12])}"] if subset == "passage_retrieval_en" else None
        answers = answers or ([str(rng.choice([3, 7, 12]))] if subset == "passage_count" else None)
        answers = answers or ([rng.choice(classes)] if subset == "trec" else None)
        answers = answers or [" ".join(rng.choices(pieces, k=rng.randrange(1, 7))) for _ in range(rng.randrange(1, 4))]
        doc = {"answers": answers, "all_classes": classes}
        given = answer.strip().split("\n")[0] if subset == "trec" else answer
        [expected] = [value for name, value in getattr(harness, f"get_{theirs}")(doc, [given]).items()]
        [found] = metrics.longbench(subset)(doc, [answer]).values()
        assert found == pytest.approx(expected, abs=1e-12), (answer, answers)
        scored += found > 0
    assert scored > 40


# ---------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"First \boxed{3}, at last \boxed{\frac{1}{2}}.", "0.5"),
        (r"\boxed{025}", "25"),
        ("The result is 1,234.", "1234"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
        (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\dfrac{\pi}{4}}", r"\frac{\pi}{4}"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{3 \text{ and } -2}", "-2, 3"),
        (r"\boxed{\text{Yes}}", "yes"),
        (r"\boxed{\left(1, 2\right)}", "(1,2)"),
        (r"\boxed{2^{10}}", "1024"),
        (r"\boxed{45^\circ}", "45"),
        (r"\boxed{10\text{ cm}}", "10"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{n + 1}", "n+1"),
    ],
)
def test_answers_that_are_the_same(solution, answer):
    assert mathematics.is_right(mathematics.final_answer(solution), {"answer": answer})


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("0.333", r"\frac13"),
        (r"\frac{n}{2}", r"\frac{n}{3}"),
        ("1,2", "1,2,3"),
        ("1, 1", "1, 2"),
        ("9^{9^{9}}", "1"),
        ("", ""),
        ("((", "1"),
        ("1/0", "0"),
        (r"\sqrt{-1}", "1"),
        ("__import__('os')", "1"),
    ],
)
def test_answers_that_differ(given, answer):
    assert not mathematics.is_right(given, {"answer": answer})


def test_a_tolerance_holds_for_numbers():
    assert mathematics.is_right("3.1", {"answer": "3.14", "tolerance": 0.1})
    assert not mathematics.is_right("3.0", {"answer": "3.14", "tolerance": 0.1})


def test_several_solutions_of_a_problem():
    doc = {"answer": "7"}
    solutions = [r"\boxed{7}", r"\boxed{8}", "no answer", r"\boxed{7.0}"]
    assert mathematics.process_results(doc, [solutions]) == {"accuracy": 0.5, "majority": 1.0}
    assert mathematics.process_results(doc, [["nothing"]]) == {"accuracy": 0.0, "majority": 0.0}
    assert mathematics.final_answer(r"\boxed{1") == "1"


# ---------------------------------------------------------------------- intervals


def test_intervals():
    low, high = intervals.wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # as in textbooks
    assert intervals.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert intervals.score([1, 0, 1, 1]) == (0.75, *intervals.wilson(0.75, 4))
    value, low, high = intervals.score([0.2, 0.4, 0.9, 0.5] * 20)
    assert low < value < high
    assert (low, high) == pytest.approx((0.45, 0.55), abs=0.02)  # standard error 0.029
    assert intervals.score([0.2, 0.4, 0.9]) == intervals.score([0.2, 0.4, 0.9])
    skewed = intervals.score([0.0] * 30 + [0.9, 0.5])  # a mean near its limit: the interval leans to the other side
    assert skewed.high - skewed.value > 1.3 * (skewed.value - skewed.low) > 0
    assert intervals.score([0.3] * 5) == (pytest.approx(0.3), 0.3, 0.3)
    assert intervals.bootstrap(["a", "b", "b"], lambda drawn: drawn.count("b") / len(drawn), 0)[1] == 1.0
    assert intervals.score([1.0]) == (1.0, None, None)
    assert intervals.difference([1, 0, 1], [1, 0, 1]) == (0.0, 0.0, 0.0)


# ---------------------------------------------------------------------- the record


def test_a_record_survives(tmp_path):
    path, key = tmp_path / "folder" / "items.jsonl", ("full", "abc")
    with Record(path, {"model": "m", "policy": {"full": 1}}) as record:
        record[key] = Answer(12, text="yes", tokens=3)
        record.note(key, task="vt", score=0.5)
        record.note(key, task="vt", score=0.5)  # nothing new
        assert len(path.read_text().splitlines()) == 3
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text() + '{"policy": "full", "requ')  # interrupted while writing
    with Record(path, {"model": "m", "policy": {"hybrid": 2}}, resume=True) as record:
        assert record[key] == Answer(12, text="yes", tokens=3)
        assert list(record) == [key]
        record["hybrid", "abc"] = Answer(12, skipped="too long")
        record.note(("hybrid", "abc"), metric=numpy.int64(1))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"settings": {"model": "m", "policy": {"full": 1, "hybrid": 2}}}
    assert lines[1]["score"] == 0.5
    assert lines[2]["skipped"] == "too long"
    assert lines[2]["metric"] == 1
    with Record(path, {}) as record:
        assert not record


@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_a_record_with_other_line_ends(tmp_path, end):
    path, key = tmp_path / "items.jsonl", ("full", "abc")
    with Record(path, {"model": "m"}) as record:
        record[key] = Answer(12, text="one\u2028line\nand another", tokens=3)
    path.write_bytes(path.read_text(encoding="utf-8").replace("\n", end).encode("utf-8-sig"))
    with Record(path, {"model": "m"}, resume=True) as record:
        assert record[key].text == "one\u2028line\nand another"


def test_what_cannot_be_resumed_is_said(tmp_path):
    path = tmp_path / "items.jsonl"
    with pytest.raises(RecordError, match="needs the --json file"):
        Record(path, {}, resume=True)
    with pytest.raises(RecordError, match="needs the --json file"):
        Record(None, {}, resume=True)
    Record(path, {"model": "m", "policy": {"full": 1}}).close()
    with pytest.raises(RecordError, match="made with another model"):
        Record(path, {"model": "n"}, resume=True)
    with pytest.raises(RecordError, match="made with another policy"):
        Record(path, {"model": "m", "policy": {"full": 2}}, resume=True)
    no_answer = '{"settings": {}}\n{"policy": "full", "request": "a"}\n'
    for text in ("{}\n", '{"settings": []}\n', no_answer):
        path.write_text(text)
        with pytest.raises(RecordError, match="not a record"):
            Record(path, {"model": "m"}, resume=True)
    assert record_path(path.with_name("a.b.json")).name == "a.b.items.jsonl"
