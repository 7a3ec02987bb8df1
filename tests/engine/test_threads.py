"""Engines in several threads do not meet: not those of one model, not those of two."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from lycheedecode import Engine, hybrid
from lycheedecode.engine import prefill
from lycheedecode.models import routing
from lycheedecode.models.routing import route_attention
from lycheedecode.models.shape import ModelError

CONFIG = tiny.config()
GENERATIONS, TOKENS = 25, 6
"""Of each of two engines, in each of four tests: 200 in all."""


def jobs(number):
    return [tiny.prompts(*lengths) for lengths in [(20 + i % 17, 9 + i % 5) for i in range(number)]]


def tokens_of(engine, rows):
    return [result.token_ids for result in engine.generate(rows, TOKENS)]


@pytest.mark.parametrize("models", [1, 2], ids=["one model", "two models"])
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_two_engines_in_two_threads(models, execution):
    first = tiny.model("llama")
    second = first if models == 1 else tiny.model("qwen3", head_dim=24)
    engines = [
        Engine(first, plan=tiny.plan(), config=CONFIG, prefill_chunk=8, execution=execution),
        Engine(second, execution=execution),
    ]
    work = [(engine, rows) for rows in jobs(GENERATIONS) for engine in engines]
    expected = [tokens_of(*job) for job in work]
    with ThreadPoolExecutor(2) as threads:
        # Each thread serves both engines, in an order of its own: an engine, too, is used by two threads at once.
        one = threads.submit(lambda: [tokens_of(*job) for job in work[: len(work) // 2]])
        two = threads.submit(lambda: [tokens_of(*job) for job in work[: len(work) // 2 - 1 : -1]][::-1])
        actual = one.result() + two.result()
    assert actual == expected


def test_hybrid_generates_in_two_threads(llama):
    rows = [{"input_ids": torch.tensor([row])} for row in tiny.prompts(40, 31)]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    with hybrid(llama, tiny.plan(), CONFIG):
        expected = [llama.generate(**row, **options).tolist() for row in rows]
        with ThreadPoolExecutor(2) as threads:
            actual = list(threads.map(lambda row: llama.generate(**row, **options).tolist(), rows))
    assert actual == expected


def test_nobody_waits_for_a_lasting_route(llama):
    engine, refusals = Engine(llama), []

    def elsewhere():
        with pytest.raises(ModelError, match="already routed") as caught:
            engine.generate(tiny.prompts(9), 2)
        refusals.append(str(caught.value))

    with hybrid(llama, tiny.plan(), CONFIG):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(timeout=60)
    assert len(refusals) == 1
    assert len(engine.generate(tiny.prompts(9), 2)[0].token_ids) == 2


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_model_that_an_engine_is_using_refuses_other_calls(llama, phase):
    engine, ids, inside, done = Engine(llama), tiny.prompts(9), threading.Event(), threading.Event()
    context = engine.prefill(ids)

    def pause(*_):
        inside.set()
        assert done.wait(60)

    def run():
        if phase == "prefill":
            engine.prefill(ids)
        else:
            engine.decode_one_token(context, torch.tensor([5]))

    hook = llama.model.layers[0].register_forward_hook(pause)
    thread = threading.Thread(target=run)
    try:
        thread.start()
        assert inside.wait(60)
        with pytest.raises(ModelError, match="Another thread"):
            llama(torch.tensor(ids))
    finally:
        done.set()
        thread.join(timeout=60)
        hook.remove()
    assert llama(torch.tensor(ids)).logits.isfinite().all()


def test_brief_routes_take_turns_in_the_order_in_which_they_came(llama):
    order, threads = [], []

    def pass_through(number):
        with prefill.route(llama):
            order.append(number)

    with prefill.route(llama):
        for number in range(5):
            threads.append(threading.Thread(target=pass_through, args=(number,)))
            threads[-1].start()
            while len(waiting()) < number + 2:
                pass
        assert not order
        with pytest.raises(ModelError, match="already routed"), route_attention(llama, print):
            pass
    for thread in threads:
        thread.join(timeout=60)
    assert order == list(range(5))
    assert not waiting()


def waiting():
    return routing._openings


def test_what_is_compiled_stays_valid_while_engines_read_prompts_with_other_models(llama):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    others = tiny.model("qwen3"), tiny.model("qwen2")  # made before: transformers keeps a table of classes, guarded too
    engine = Engine(llama, execution="compiled", backend=backend)
    rows = tiny.prompts(20)
    expected = engine.generate(rows, TOKENS)[0].token_ids
    with prefill.route(others[0]), prefill.route(others[1]):
        assert engine.generate(rows, TOKENS)[0].token_ids == expected
    assert backend.frame_count == 1
