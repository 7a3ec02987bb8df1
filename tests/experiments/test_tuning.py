"""The search for launches that make a step fast, on a step that is made up; candidates and profiles."""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

from experiments import profile_step, tune_memory
from experiments.__main__ import app
from experiments.profile_memory import waits
from experiments.profile_step import Kernel, add_up, format_kernels
from experiments.tune_ops import KERNELS, candidates
from experiments.tune_step import tune_step
from lycheedecode.bench.settings import LosslessSettings, MemorySettings
from lycheedecode.engine.offload import store
from lycheedecode.ops.fetch import triton as fetch_kernels
from lycheedecode.results import Result

pytestmark = pytest.mark.usefixtures("benchmarks_collect_little")


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


@pytest.mark.parametrize(
    "tool",
    [
        "tune-step",
        "tune-ops",
        "tune-linear",
        "tune-memory",
        "profile",
        "profile-round",
        "profile-memory",
        "linear",
        "linear-rows",
    ],
)
def test_they_need_a_gpu(tool, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(app, [tool])
    assert done.exit_code == 2
    assert "There is no CUDA GPU" in done.stderr
    assert "--smoke" not in done.stderr  # they have no such option


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 8])
def test_every_kernel_has_candidates(kernel, batch):
    grid = list(candidates(kernel, batch, 32, 8))
    assert len(grid) == len(set(grid)) > 4
    assert len({str(candidate) for candidate in grid if candidate.heads == 8}) > 4


def test_profiles_add_up():
    def event(name, us, device=DeviceType.CUDA):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: us))

    events = [event("a", 2.0), event("b", 9.0), event("a", 4.0), event("host", 50.0, DeviceType.CPU)]
    kernels = add_up(events, 2)
    assert kernels == [Kernel("b", 0.5, 4.5), Kernel("a", 1.0, 3.0)]
    assert [line.split()[-1] for line in format_kernels(kernels).splitlines()] == ["b", "a"]
    many = format_kernels([Kernel(str(i), 1.0, 1.0) for i in range(20)])
    assert "6.0 others" in many.splitlines()[-1]


@pytest.mark.gpu
def test_a_profile_is_reported(tmp_path):
    path = tmp_path / "profile.json"
    small = ["--model", "tiny", "--contexts", "300", "--budget-tokens", "64", "--block-size", "16", "--forms", "hybrid"]
    assert CliRunner().invoke(app, ["profile", *small, "--json", str(path)]).exit_code == 0
    (profile,) = Result.load(path).summary["profiles"]
    assert any("attend_blocks" in kernel["name"] for kernel in profile["kernels"])


def test_every_part_of_a_round_is_traced(monkeypatch):
    """There is nothing to trace on a CPU, but the parts run, in any order."""
    monkeypatch.setattr(profile_step, "record", lambda run, steps, before=None: [before and before(), run()][:0])
    sizes = {"contexts": (300,), "budget_tokens": 128, "block_size": 16, "drafts": (3,), "refresh": (8,)}
    found = profile_step.run_rounds(LosslessSettings(model="tiny", **sizes, execution="graph"), "cpu")
    assert [profile["part"] for profile in found["profiles"]] == ["full step", "select", "keep", "verify"]


@pytest.mark.gpu
def test_parts_of_a_round_are_profiled(tmp_path):
    path = tmp_path / "round.json"
    small = ["--model", "tiny", "--contexts", "300", "--budget-tokens", "128", "--block-size", "16", "--drafts", "3"]
    assert CliRunner().invoke(app, ["profile-round", *small, "--refresh", "8", "--json", str(path)]).exit_code == 0
    profiles = Result.load(path).summary["profiles"]
    assert [profile["part"] for profile in profiles] == ["full step", "select", "keep", "verify"]
    assert any("attend_rows" in kernel["name"] for kernel in profiles[-1]["kernels"])


def test_a_layer_waits_until_its_fetch_is_done():
    """Two steps of two layers: the second layer's attention begins 7 us after the kernel before it has ended."""
    step = [
        ("_append_kernel", 0.0, 1.0), ("_fetch_kernel", 1.0, 14.0), ("_attend_blocks_kernel", 1.5, 4.0),
        ("linear", 4.0, 8.0), ("_attend_blocks_kernel", 15.0, 17.0), ("_fetch_kernel", 13.0, 16.0),
        ("linear", 17.0, 20.0),
    ]  # fmt: skip
    later = [(name, begin + 20, end + 20) for name, begin, end in step]
    found = waits([*step, *later], 2)
    assert found["waited_us_by_layer"] == [0.5, 7.0]
    assert (found["step_us"], found["waited_us"], found["link_busy_us"], found["fetches"]) == (20.0, 7.5, 15.0, 2.0)


def test_what_makes_steps_faster_stays(monkeypatch):
    """On a CPU launches change nothing, so their times are made up; the steps are real."""
    seen = []

    def made_up(engine, context, steps):
        engine.decode_one_token(context, torch.tensor([7] * len(context.prompt_lengths)))
        launch = fetch_kernels.LAUNCH
        seen.append((launch.programs, launch.warps, launch.plan_warps, store._WINDOW))
        return [10.0 - (launch.programs == 64) - (launch.plan_warps == 8) / 2 + store._WINDOW / 1000]

    monkeypatch.setattr(tune_memory, "_step_ms", made_up)
    before = fetch_kernels.LAUNCH, store._WINDOW
    small = MemorySettings(cases=("1x400",), readings=("none",), store_percents=(200,)).shrunk()
    rows = tune_memory.tune(replace(small, cases=("1x400",), smoke=True), "cpu")["rows"]
    assert len(rows) == len(seen) == 2 + sum(map(len, tune_memory.GROUPS))
    assert rows[-1]["changes"] == {"programs": 64, "warps": 4, "piece": 1024, "plan_warps": 8}
    assert seen[-1] == (64, 4, 8, before[1])
    assert before == (fetch_kernels.LAUNCH, store._WINDOW)
