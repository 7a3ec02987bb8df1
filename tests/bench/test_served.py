"""Times of vLLM's tokens: an engine that answers by a script, and a clock that it moves."""

from types import SimpleNamespace

import pytest

from lycheedecode.bench import served, serving
from lycheedecode.bench.settings import ServingSettings


class Engine:
    """Each step lasts a number of seconds, and gives each sequence so many tokens; the last ones end them."""

    def __init__(self, clock, *steps):
        self.clock, self.steps, self.given = clock, list(steps), {}
        self.asked = []

    def add_request(self, name, prompt, sampling):
        self.asked.append((name, prompt["prompt_token_ids"], sampling))
        self.given[name] = 0

    def has_unfinished_requests(self):
        return bool(self.steps)

    def step(self):
        seconds, *counts = self.steps.pop(0)
        self.clock.now += seconds
        left = [sum(step[1 + row] for step in self.steps) for row in range(len(counts))]
        return [self._output(str(row), count, left[row]) for row, count in enumerate(counts) if count]

    def _output(self, name, count, left):
        self.given[name] += count
        tokens = list(range(self.given[name]))
        return SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tokens)], finished=not left)


@pytest.fixture
def decode(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(served.time, "perf_counter", lambda: clock.now)

    def run(*steps):
        engine, rows = Engine(clock, *steps), len(steps[0]) - 1
        return served.decode(SimpleNamespace(llm_engine=engine), [[7, 8]] * rows, ["greedy"] * rows)

    return run


def test_time_counts_while_all_sequences_decode(decode):
    """Not that in which one has not begun, and not that in which one has ended; drafts come several at once."""
    both = [(0.5, 9, 7), (0.25, 8, 8), (0.5, 1, 9), (0.25, 4, 4)]
    found = decode((60.0, 1, 0), (30.0, 1, 1), *both, (70.0, 2, 2), (80.0, 0, 5))
    assert (found.steps, found.step_tokens, found.step_seconds, found.seconds) == (4, 50, 1.5, 241.5)
    assert found.tokens_per_second == 50 / 1.5
    assert [len(tokens) for tokens in found.token_ids] == [26, 36]


@pytest.mark.parametrize(
    "steps",
    [
        [
            (9.0, 1, 0),
            (0.5, 20, 0),
            (9.0, 0, 1),
            (9.0, 0, 20),
        ],  # never together: a long answer took less than a short one
        [(9.0, 1, 1), (0.5, 9, 9), (0.5, 9, 9), (0.5, 9, 9), (0.5, 1, 1)],
        [(9.0, 1, 1), (0.5, 1, 1)],
    ],
    ids=["never together", "three rounds", "one"],
)
def test_too_few_steps_say_nothing(decode, steps):
    assert decode(*steps).tokens_per_second is None


def test_what_is_too_short_is_a_row_without_times(monkeypatch):
    short = served.Decoded([[1] * 12], 1.0, 3, 3, 0.1)
    monkeypatch.setattr(serving, "_generate", lambda *_: short)
    settings = ServingSettings(fill=True, repeats=2)
    [row] = serving._time_cases(None, "hybrid", [(1, 3)], [[4, 5, 6]], settings)
    row = serving._compared(row, {**row, "ms": 5.0})
    assert (row["ms"], row["fast_ms"], row["speedup"], row["same_tokens"]) == (None, None, None, 12)
    assert "too short to measure" in serving.format_row(row)
