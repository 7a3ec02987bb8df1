"""Texts may leave stock's where rounding exchanges two tokens, and nowhere else."""

import re

import pytest

from experiments import near_ties
from experiments.near_ties import StockTexts
from experiments.ranks import RankAnswer

ROUNDING = 0.125


def step(best, gap, others=(90, 91)):
    """The best token, and the next one so many nats below."""
    return {best: -0.5, best + 1: -0.5 - gap, **dict.fromkeys(others, -9.0)}


def answer(gaps, tokens=None):
    return RankAnswer(tokens or [1] * len(gaps), [step(1, gap) for gap in gaps])


GAPS = [2.0, 0.0625, 1.0, 0.25, 3.0]


@pytest.fixture
def truth(monkeypatch):
    """Of a vLLM whose gaps are wider by `ROUNDING` in a prompt, and the same in a batch and alone."""
    monkeypatch.setattr(near_ties, "_PLACES", 3)
    monkeypatch.setattr(near_ties, "_ENOUGH", 5)

    def generate(llm, prompts, tokens):
        if tokens == 1:
            assert all(prompt[1:] == [1] * (len(prompt) - 1) for prompt in prompts)
            return [answer([GAPS[len(prompt) - 1] + ROUNDING]) for prompt in prompts]
        return [answer(GAPS)] * len(prompts)

    monkeypatch.setattr(near_ties, "generate", generate)
    return StockTexts.of(None, [[7], [8]], len(GAPS))


def test_rounding_is_measured_where_tokens_are_closest(truth):
    assert truth.places == [[1, 2, 3]] * 2
    assert truth.moves == ([ROUNDING] * 6, [0.0] * 6)
    row = truth.row()
    assert (row["same_tokens"], row["gaps"], row["moved_most"], row["moved"]) == ([5, 5], [], 0.125, 0.125)


def test_a_tie_is_no_other_text(truth):
    other = RankAnswer([1, 2, 5, 5, 5], [step(1, 2.0), step(1, -0.03125), *[step(5, 9.0)] * 3])
    row = truth.compare([answer(GAPS), other], lossless=True)
    assert (row["same_tokens"], row["left"], row["gaps"], row["own_gaps"]) == ([5, 1], [1], [0.0625], [0.03125])
    assert (row["moved_most"], row["rounding"], row["wrong"]) == (0.09375, ROUNDING, [])
    said = "; ".join(near_ties.said({**row, "way": "lossless", "tokens": 5}))
    assert "the first 1 to 5 of 5 tokens are stock's; 1 texts leave it where tokens are up to 0.062 nats apart" in said


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (answer(GAPS, [1, 1, 1, 2, 1]), r"text 1 leaves .* at token 3, which is 0.25 nats"),
        (answer(GAPS, [1, 1, 5, 1, 1]), r"text 1 leaves .* at token 2, which is far above"),
        (answer([gap + 1.0 for gap in GAPS]), r"gaps move by 0.5 nats on average, stock's own by 0.125"),
    ],
    ids=["too wide", "not probable", "the same tokens by luck"],
)
def test_what_is_not_rounding_is_wrong(truth, other, wrong):
    row = truth.compare([answer(GAPS), other], lossless=True)
    assert len(row["wrong"]) == 1
    assert re.search(wrong, row["wrong"][0])
    assert not truth.compare([answer(GAPS), other], lossless=False)["wrong"]  # hybrid texts are their own
