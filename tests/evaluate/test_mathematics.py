"""The table of answers with a mathematician's verdicts, and answers that are none."""

import json
import random
import threading

import pytest
from mathematics_pairs import MISSED, PAIRS, RECORDED, by_math_verify

from lycheedecode.evaluate.tasks import mathematics
from lycheedecode.evaluate.tasks.problems import aime24
from lycheedecode.evaluate.tasks_data import DataError


def test_the_table_is_the_mathematicians():
    wrong = [pair for pair in PAIRS if mathematics.is_right(pair[0], {"answer": pair[1]}) != pair[2]]
    assert not wrong, "\n".join(f"{answer!r} and {reference!r}: same? {same}" for answer, reference, same in wrong)
    assert len(set(PAIRS)) == len(PAIRS) >= 150


def test_what_is_known_to_be_missed_is_missed_by_both():
    for answer, reference in MISSED:
        assert not mathematics.is_right(answer, {"answer": reference})
        assert not by_math_verify(answer, reference)


def test_what_math_verify_says_is_recorded():
    """The record is of this table; it is made anew where another version differs."""
    lines = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").split("\n") if line]
    assert [(line["answer"], line["reference"], line["same"]) for line in lines] == PAIRS
    sample = random.Random(0).sample([line for line in lines if "9^{9" not in line["answer"]], 12)
    for line in sample:
        assert by_math_verify(line["answer"], line["reference"]) == line["math_verify"], line
    assert sum(line["math_verify"] == line["same"] for line in lines) < len(lines)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"First \boxed{3}, at last \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7.}", "7."),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"so \boxed 7.", "7"),
        (r"\fbox{9}", "9"),
        (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("**Final Answer:** \\(x^2\\)", "x^2"),
        ("The answer is 1,234 dollars, out of 5000.", "1,234"),
        ("The answer is $18 a day.", "18"),
        ("She has 3 * 6 = 18 left.\n#### 18\nQuestion: 5", "18"),
        ("from 2 to -7", "-7"),
        ("from 2 to \N{MINUS SIGN}7", "-7"),
        ("It is 1,2,3", "3"),
        ("nothing", None),
        ("", None),
        (r"\boxed{1", "1"),
    ],
)
def test_where_an_answer_stands(solution, answer):
    assert mathematics.final_answer(solution) == answer


def test_parts_have_their_tolerances():
    doc = {"answer": "1.5, 20", "tolerance": [0.1, 2.0]}
    assert mathematics.is_right("21, 1.55", doc)
    assert not mathematics.is_right("20, 2.0", doc)
    assert not mathematics.is_right("23, 1.5", doc)
    assert mathematics.is_right("(1.1, 2.1)", {"answer": "(1, 2)", "tolerance": 0.1})
    assert mathematics.is_right(r"1.1\text{ m}, 2.1\text{ m}", {"answer": r"1\text{ m}, 2 \text{m}", "tolerance": 0.1})
    # The first that is near 1.0 must not take the partner of the other.
    assert mathematics.is_right("1.05, 0.95", {"answer": "0.9, 1.0", "tolerance": [0.2, 0.06]})


def test_nothing_hangs_or_breaks():
    """Pieces of LaTeX in any order: a verdict, soon, the same when both sides are exchanged text by text."""
    pieces = [
        "x", "2", "10", "^", "_", "{", "}", "(", ")", "[", "]", ",", ";", "=", "<", r"\le", r"\frac", r"\sqrt", r"\{",
        r"\}", r"\pm", r"\cup", r"\text{cm}", r"\text{and}", r"\boxed{", "!", "%", ":", "-", "+", "/", r"\infty", r"\\",
        r"\begin{pmatrix}", r"\end{pmatrix}", "&", "$", " ", ".", r"\overline{3}", "9^9", r"\binom", r"\log_", "|", "√",
        "٣", "\0", r"\in", r"\left(", r"\pi", "e",
    ]  # fmt: skip
    rng = random.Random(0)
    for _ in range(1500):
        one = "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        assert mathematics.is_same(one, one) in (True, False)
        assert mathematics.is_same(one, "7") in (True, False)
        mathematics.final_answer(one)
    for deep in ("(" * 5000, "{" * 900 + "1" + "}" * 900, "-" * 1500 + "1", r"\sqrt{" * 300, "1," * 900, "9!" * 60):
        assert not mathematics.is_same(deep, "12")


def test_other_threads_compare_too():
    said = []
    pair = (r"\frac{p(p+1)}{2}", r"\frac{p^2+p}{2}")  # nobody has asked for it yet
    thread = threading.Thread(target=lambda: said.append(mathematics.is_same(*pair)))
    thread.start()
    thread.join(60)
    assert said == [True]


# ---------------------------------------------------------------------- problems in files


def documents(tmp_path, *records):
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    aime24.__globals__["find_records"].cache_clear()
    return list(aime24(str(tmp_path))["test"])


def test_problems_with_a_solution_alone(tmp_path):
    made = documents(
        tmp_path,
        {"problem": "p", "solution": r"As $2 = \boxed{2}$, it is \boxed{\frac{3}{4}}."},
        {"question": "q", "solution": "Half of 10 is 10/2 = <<10/2=5>>5.\n#### 5"},
        {"question": "q", "answer": "It is 2 + 2 = 4.\n#### 4"},
        {"problem": "p", "answer": 0, "solution": "long"},
        {"question": "q", "final_answer": ["$1$", "2"], "error": "0.1,0.2"},
        {"question": "q", "final_answer": ["3"], "error": "1e-1"},
    )
    assert [document["answer"] for document in made] == [r"\frac{3}{4}", "5", "4", "0", "$1$, 2", "3"]
    assert [document["tolerance"] for document in made] == [[], [], [], [], [0.1, 0.2], [0.1]]
    assert mathematics.process_results(made[4], [[r"\boxed{1.05, 2.1}"]])["accuracy"] == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"problem": "p", "solution": "Therefore it is five."},
            r"Problem 1 has only a solution, which has neither a \\boxed",
        ),
        ({"problem": "p"}, "Problem 1 has none of answer"),
        ({"answer": "5"}, "Problem 1 has none of problem"),
        ({"problem": "p", "answer": {"a": 1}}, "Problem 1: its answer is a dict"),
    ],
)
def test_problems_that_cannot_be_scored(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        documents(tmp_path, record)
