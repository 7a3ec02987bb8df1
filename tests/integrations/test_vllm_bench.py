"""`bench serving` and studies of vLLM on a CPU: a tiny shape both ways, on two ranks, and losslessly."""

import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch

from experiments import ranks, serving_lossless, serving_probe
from experiments.__main__ import app as experiments
from lycheedecode.bench import models, serving
from lycheedecode.bench.served import Decoded
from lycheedecode.bench.settings import SERVERS, ServingSettings
from lycheedecode.cli import app
from lycheedecode.errors import MismatchError


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["llama-3-8b", "llama-3-70b"])
def test_the_plan_divides_over_ranks(model, world):
    config = models.random_config(model)
    plan = serving.plan_of(config, world)
    assert len(plan.retrieval) == config.num_hidden_layers
    for rank in range(world):
        plan.shard(rank, world)


def run(program, *arguments):
    """Exit status; whatever is printed can be captured."""
    with pytest.raises(SystemExit) as stop:
        program(arguments, prog_name="x")
    return stop.value.code


def test_what_cannot_be_timed_is_refused(capsys):
    assert run(app, "bench", "serving", "--smoke", "--tensor-parallel-size", "3") == 2
    assert run(app, "bench", "serving", "--cases", "4*1000") == 2
    printed = capsys.readouterr().err
    assert "over 3 ranks" in printed or "needs vLLM" in printed
    assert "not a batch and a context, like 4x131072" in printed


def test_a_plugin_that_vllm_cannot_find_is_said_before_an_engine_starts(monkeypatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: True)
    monkeypatch.setattr(serving, "entry_points", lambda **which: ())
    assert run(app, "bench", "serving", "--smoke") == 2
    assert "vLLM does not find the plugin" in capsys.readouterr().err


def test_both_ways_get_the_same_prompts_and_generations(monkeypatch):
    """Also where the engine, which sets the seed, is in a process of its own."""
    sent = {way: [] for way in SERVERS}

    def generate(way, prompts, count, asked=()):
        sent[way].append((prompts, count, asked))
        return Decoded([list(range(count))], 1.0, count, count, 1.0)

    monkeypatch.setattr(serving, "find_spec", lambda name: True)
    monkeypatch.setattr(serving, "entry_points", lambda **which: (which,))
    monkeypatch.setattr(serving, "_engine", lambda folder, way, *_: way)
    monkeypatch.setattr(serving, "closing", nullcontext)
    monkeypatch.setattr(serving, "_generate", generate)
    assert run(app, "bench", "serving", "--smoke", "--fill", "--mixed", "--ways", ",".join(SERVERS)) == 0
    alike = [(batch, count, ()) for batch in (1, 2) for count in (1, 12, 12)]
    mixed = [(2, 12, (None, "off", "budget_tokens=32"))]
    for way, calls in sent.items():
        assert [(len(prompts), *rest) for prompts, *rest in calls] == alike + (mixed if way != "stock" else [])
        assert calls[: len(alike)] == sent["stock"]


@pytest.mark.parametrize("fill", [[], ["--fill"]], ids=["prefilled", "filled"])
def test_a_tiny_shape_is_timed_both_ways(tmp_path, monkeypatch, capfd, fill):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    asked = [*fill, "--kv-layout", "HND", "--page-tokens", "64"]
    monkeypatch.setitem(os.environ, "VLLM_KV_CACHE_LAYOUT", "NHD")  # which is undone at the end
    assert run(app, "bench", "serving", "--smoke", *asked, "--json", str(tmp_path / "result.json")) == 0
    assert os.environ["VLLM_KV_CACHE_LAYOUT"] == "HND"
    report = json.loads((tmp_path / "result.json").read_text())
    rows = report["result"]["rows"]
    ways = ServingSettings().ways
    assert [(row["way"], row["batch"]) for row in rows] == [(way, batch) for way in ways for batch in (1, 2)]
    assert all(bool(row["prefill_ms"]) != bool(fill) for row in rows)
    assert all(row["prefill_seconds"] > 0 and row["fast_ms"] > 0 and row["slow_ms"] > 0 for row in rows)
    assert [row["same_tokens"] for row in rows[:2]] == [12, 12]
    assert "vs stock" in capfd.readouterr().out


def test_caches_in_8_bits_are_filled_with_numbers():
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    from lycheedecode.integrations.vllm.fill import fill_blocks

    for cache in (torch.zeros(9, 2, 16, 64, dtype=torch.uint8), torch.zeros(9, 2, 16, 64)):
        fill_blocks(SimpleNamespace(fill_mean=0.0, fill_std=1.0), cache, [3, 5, 99])
        numbers = cache.view(torch.float8_e4m3fn).float() if cache.itemsize == 1 else cache
        assert not numbers[[0, 4, 8]].any()
        assert abs(numbers[[3, 5]].std() - 1) < 0.05


def answer(*tokens, **changed):
    """Token ids, every one of them chosen with a log-probability of -1, before the next with -1.5."""
    return ranks.RankAnswer(list(tokens), [{token: -1.0, token + 1: -1.5, **changed} for token in tokens])


def test_answers_are_compared_up_to_a_near_tie():
    same = ranks.compare(answer(1, 2, 3), answer(1, 2, 3), 0.1)
    assert same == {"tokens": 3, "same_tokens": 3, "logprob_difference": 0.0, "gap_of_the_tie": 0.0}
    parted = ranks.compare(answer(1, 2, 3), answer(1, 3, 9), 0.6)
    assert (parted["same_tokens"], parted["gap_of_the_tie"]) == (1, 0.5)
    for other in (answer(1, 3, 9), answer(1, 7, 9), ranks.RankAnswer([1, 2, 3], [{1: -1.0}, {2: -1.4}, {3: -1.0}])):
        with pytest.raises(MismatchError, match=r"token \d of a sequence is another one, or its log-probability"):
            ranks.compare(answer(1, 2, 3), other, 0.3)


def test_two_ranks_decode_what_one_does_and_refuse_what_they_cannot(tmp_path, monkeypatch, capfd):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    cores = "0|1" if (os.cpu_count() or 1) > 1 else "0|0"
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_CI_ENV": "1"}
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **settings}.items():
        monkeypatch.setitem(os.environ, name, value)
    options = ["--budget-tokens", "64", "--block-size", "16", "--tokens", "12", "--json", str(tmp_path / "result.json")]
    assert run(experiments, "ranks", *options) == 0
    result = json.loads((tmp_path / "result.json").read_text())["result"]
    assert [row["same_tokens"] for row in result["rows"]] == [12] * 4
    assert "is on tensor-parallel rank 0, not 1" in result["refused"]["a plan whose donors cross ranks"]
    assert "cannot be divided evenly over 2 ranks" in result["refused"]["more ranks than KV heads"]
    assert "12 of 12 tokens are the same" in capfd.readouterr().out


@pytest.mark.parametrize(
    "options", [[], ["--kv-cache-dtype", "fp8"], ["--way", "hybrid+float8"], ["--way", "hybrid+int4"]], ids=str
)
def test_the_probe_finds_nothing_on_a_cpu_and_finds_what_is_there(tmp_path, monkeypatch, capfd, options):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    size = ["--model", "tiny", "--budget-tokens", "128", "--block-size", "16", "--tokens", "12"]
    assert run(experiments, "serving-probe", *size, *options, "--json", str(tmp_path / "result.json")) == 0
    result = json.loads((tmp_path / "result.json").read_text())["result"]
    assert result["steps"]["steps"] > 100
    assert result["steps"]["copies" if "--way" in options else "means"] > 100
    assert [row["compared"] for row in result["rows"]] == ["off with stock", "off beside others"]
    assert all(row["same_tokens"] == row["tokens"] for row in result["rows"])
    if not options:
        monkeypatch.setattr(serving_probe, "_ROUNDING", dict.fromkeys((1, 2, 4), -1.0))
        assert run(experiments, "serving-probe", *size, "--json", str(tmp_path / "again.json")) == 1
        assert "off their definition" in capfd.readouterr().err


@pytest.mark.parametrize("options", [[], ["--drafts", "3"]], ids=["hybrid", "lossless"])
def test_clients_of_all_kinds_get_their_tokens(tmp_path, monkeypatch, options):
    """A short form of `python -m experiments serving-soak`."""
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    assert run(experiments, "serving-soak", "--minutes", "0.3", *options, "--json", str(tmp_path / "result.json")) == 0
    result = json.loads((tmp_path / "result.json").read_text())["result"]
    [row] = result["rows"]
    assert min(row[f"finished, {kind}"] for kind in ("off", "hybrid", "budget_tokens=48")) > 0
    assert row["aborted"] > 0
    assert row["preempted"] > 0
    assert "rejected" not in row or 0 < row["rejected"] < row["drafts"]
    assert min(result["steps"].values()) >= 0


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Arguments of `serving-lossless` on a tiny model."""
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    model = tiny.model(head_dim=32, initializer_range=0.1)
    monkeypatch.setattr(serving_lossless, "load_model", lambda *_, **__: (model, tiny.byte_tokenizer()))
    tiny.plan().save(tmp_path / "plan.json")
    size = ["--cases", "2x90", "--tokens", "40", "--drafts", "3", "--budget-tokens", "64", "--block-size", "16"]
    return ["--plan", str(tmp_path / "plan.json"), *size, "--repeats", "1", "--json", str(tmp_path / "result.json")]


def rows_of(folder):
    return json.loads((folder / "result.json").read_text())["result"]["rows"]


def test_lossless_texts_are_timed_and_are_stocks(texts, tmp_path, capfd):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    assert run(experiments, "serving-lossless", *texts) == 0
    stock, hybrid, lossless = rows_of(tmp_path)
    assert stock["same_tokens"] == lossless["same_tokens"] == [40, 40]
    assert lossless["gaps"] == lossless["wrong"] == []
    assert max(stock["moved_most"], lossless["moved_most"]) < 1e-4 < hybrid["moved"]
    assert stock["tokens_per_second"] > 0
    assert lossless["speedup"] == lossless["tokens_per_second"] / stock["tokens_per_second"]
    assert "the first 40 to 40 of 40 tokens are stock's" in capfd.readouterr().out


def test_texts_that_are_not_stocks_are_found(texts, tmp_path, monkeypatch, capfd):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
    from lycheedecode.integrations.vllm import verify

    right = verify.attend
    monkeypatch.setattr(verify, "attend", lambda *given: right(*given) * 1.2)
    assert run(experiments, "serving-lossless", *texts, "--ways", "stock,lossless") == 1
    assert rows_of(tmp_path)[1]["wrong"]
    assert "lossless texts are not full attention's: " in capfd.readouterr().err
