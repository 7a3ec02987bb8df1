"""The search for launches that make a step fast, on a step that is made up."""

from typing import NamedTuple

from lycheedecode.bench import step
from lycheedecode.bench.step_tuning import tune_step


class Launch(NamedTuple):
    rows: int = 16
    prefetch: int = 512
    overlap: int = 16


class Kind(NamedTuple):
    name: str


def test_the_fastest_launch_of_every_kind_stays():
    launches, compiled = {Kind("a"): Launch(), Kind("b"): Launch()}, []

    def step_ms():
        a, b = launches[Kind("a")], launches[Kind("b")]
        if 256 in (a.rows, b.rows):
            raise RuntimeError("out of shared memory")
        return 1 + abs(a.rows - 64) / 64 + abs(b.rows - 8) / 8 + (a.prefetch != 128) + abs(b.overlap - 4)

    rows = tune_step(
        launches, lambda kind: [Launch(rows) for rows in (8, 16, 32, 64, 128, 256)], compiled.extend, step_ms, most=6
    )
    assert launches == {Kind("a"): Launch(64, prefetch=128), Kind("b"): Launch(8, overlap=4)}
    assert len(compiled) == 12
    assert rows[0]["step_ms"] == step_ms() == 1
    assert len(rows) > 12
    assert all("256" not in row["launch"] for row in rows)  # that cannot run


def test_some_candidates_of_many():
    launches, tried = {Kind("a"): Launch()}, []
    tune_step(launches, lambda kind: [Launch(i) for i in range(100)], tried.extend, lambda: 1.0, most=12)
    assert 10 <= len(tried) <= 12
    assert launches == {Kind("a"): Launch()}


def test_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert step.main(["--smoke", "--tune"]) == 2
    assert "--tune needs a CUDA GPU" in capsys.readouterr().err
