"""vLLM's server with the plugin, and the client of OpenAI: many at once, streaming, some hanging up."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
import tiny
import torch

from lycheedecode import Engine, HybridConfig

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
if torch.cuda.is_available():
    pytest.skip("These tests are for vLLM's CPU backend.", allow_module_level=True)

CONFIG = {"budget_tokens": 16, "block_size": 4, "sink_tokens": 4, "recent_tokens": 4}
LENGTHS = [5, 90, 23, 60, 37, 120, 14, 70] * 2
COUNT = 24
CLASSES = {"hybrid": {}, "off": {"budget_tokens": 512}, "budget_tokens=12": {"budget_tokens": 12}}
"""What requests ask for, and how Engine does the same."""


@contextmanager
def server(folder, own, tmp_path):
    """A server; its process, its address, and the file that it prints to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_LOG_STATS_INTERVAL": "1",
    }
    # `vllm serve` wants a distribution named vllm, which the one for CPUs is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "6"]
    command += ["--max-num-batched-tokens", "64", "--attention-backend", "CUSTOM"]
    command += ["--additional-config", json.dumps(own)]
    log = tmp_path / "log.txt"
    with log.open("w") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
    try:
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        process.terminate()
        process.wait(60)


def wait_until_healthy(process, address, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.model("llama", head_dim=32).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    tiny.plan().save(folder / "plan.json")
    return folder


async def complete(client, model, prompt, hang_up_after=None, **asked):
    """Token ids as they stream in; hangs up after so many."""
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=COUNT,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True, **asked},
    )
    tokens = []
    async for chunk in stream:
        tokens += chunk.choices[0].token_ids or []
        if hang_up_after is not None and len(tokens) >= hang_up_after:
            await stream.close()
            break
    return tokens


def test_sixteen_at_once_some_of_which_hang_up(folder, tmp_path):
    """Whoever stays gets the tokens that Engine chooses for the prompt alone, with the attention that it asked for."""
    from openai import AsyncOpenAI, BadRequestError

    prompts = tiny.prompts(*LENGTHS)
    hang_up = [i for i in range(len(prompts)) if i % 4 == 1]
    kinds = [list(CLASSES)[i % 3] for i in range(len(prompts))]

    async def load(address):
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            tasks = [
                complete(client, str(folder), p, 3 if i in hang_up else None, vllm_xargs={"lycheedecode": kinds[i]})
                for i, p in enumerate(prompts)
            ]
            results = await asyncio.gather(*tasks)
            await asyncio.sleep(1.1)
            asked = {
                "model": str(folder),
                "prompt": prompts[0],
                "extra_body": {"vllm_xargs": {"lycheedecode": "budget_tokens=9999"}},
            }
            with pytest.raises(BadRequestError) as refused:
                await client.completions.create(**asked)
            off = await complete(client, str(folder), prompts[1], vllm_xargs={"lycheedecode": "off"})
            await asyncio.sleep(1.1)
            return results, await complete(client, str(folder), prompts[0]), off, refused.value

    with server(folder, {"lycheedecode": {"plan": str(folder / "plan.json"), **CONFIG}}, tmp_path) as (*running, log):
        wait_until_healthy(*running, log)
        results, alone, off, refused = asyncio.run(load(running[1]))
        with urllib.request.urlopen(f"{running[1]}/metrics") as page:
            metrics = page.read().decode()
    engines = {
        kind: Engine(tiny.model("llama", head_dim=32), plan=tiny.plan(), config=HybridConfig(**{**CONFIG, **budget}))
        for kind, budget in CLASSES.items()
    }
    for i, (prompt, tokens) in enumerate(zip(prompts, results, strict=True)):
        expected = list(engines[kinds[i]].generate([prompt], COUNT, ignore_eos=True)[0].token_ids)
        assert tokens == (expected[: len(tokens)] if i in hang_up else expected)
        assert len(tokens) >= 3
    assert alone == results[0]
    assert off == list(engines["off"].generate([prompts[1]], COUNT, ignore_eos=True)[0].token_ids)
    assert refused.status_code == 400
    assert "budget_tokens must be between 12 and 16, not be 9999." in refused.message
    lines = [line for line in log.read_text().splitlines() if "LycheeDecode: " in line]
    assert "LycheeDecode: 4 of 8 KV heads retrieve, budget 16 of up to 256 tokens." in lines[0]
    assert any("of what full attention reads" in line for line in lines[1:])
    for name in ("hybrid", "off"):
        [counted] = [line for line in metrics.splitlines() if line.startswith(f"lycheedecode_{name}_tokens_total")]
        assert float(counted.split()[-1]) >= COUNT - 1


def test_a_lossless_server(folder, tmp_path):
    """Everybody gets full attention's tokens; the server's own counters say how many were drafted."""
    from openai import AsyncOpenAI

    prompts, kinds = tiny.prompts(*LENGTHS[:8]), [*CLASSES, "lossless"] * 2

    async def load(address):
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            tasks = [
                complete(client, str(folder), prompt, 3 if i == 1 else None, vllm_xargs={"lycheedecode": kinds[i]})
                for i, prompt in enumerate(prompts)
            ]
            return await asyncio.gather(*tasks)

    own = {"plan": str(folder / "plan.json"), **CONFIG, "lossless": 4}
    with server(folder, {"lycheedecode": own}, tmp_path) as (*running, log):
        wait_until_healthy(*running, log)
        results = asyncio.run(load(running[1]))
        with urllib.request.urlopen(f"{running[1]}/metrics") as page:
            metrics = page.read().decode()
    engine = Engine(tiny.model("llama", head_dim=32))
    for prompt, tokens in zip(prompts, results, strict=True):
        expected = list(engine.generate([prompt], COUNT, ignore_eos=True)[0].token_ids)
        assert tokens == expected[: len(tokens)]
        assert len(tokens) == COUNT or prompt is prompts[1]
    for name in ("draft", "accepted"):
        [counted] = [
            line for line in metrics.splitlines() if line.startswith(f"vllm:spec_decode_num_{name}_tokens_tot")
        ]
        assert float(counted.split()[-1]) > 0
    assert "the model's own drafts are verified at once in 4 layers." in log.read_text()


def test_the_server_does_not_start_without_a_plan(folder, tmp_path):
    with server(folder, {}, tmp_path) as (process, _, log):
        assert process.wait(120) != 0
        assert "The attention backend CUSTOM needs a head plan: --additional-config" in log.read_text().splitlines()[-1]
