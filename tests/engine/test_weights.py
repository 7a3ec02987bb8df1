"""Decode steps with weights in 8-bit floats: close to the model's own, which everything else keeps."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from lycheedecode import Engine, HybridConfig, Sampling, hybrid
from lycheedecode.engine import weights
from lycheedecode.errors import ConfigError, InputError
from lycheedecode.fusion.graph import use_linear

EIGHT = tiny.config(32, step_weights="float8")


def steps(model, tokens=6, **options):
    engine = Engine(model, **options)
    context = engine.prefill(tiny.prompts(60, 37))
    return context.logits, torch.stack([engine.decode_one_token(context, torch.tensor([7, 9])) for _ in range(tokens)])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_steps_are_close_and_the_prefill_is_the_models(family):
    model = tiny.model(family)
    prefilled, right = steps(model)
    same, found = steps(model, config={"step_weights": "float8"})
    assert torch.equal(prefilled, same)
    error = (found - right).norm() / right.norm()
    assert 1e-3 < error < 0.2  # three bits of mantissa, four layers


def test_parameters_are_shared_and_left_alone():
    model = tiny.model("qwen2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, plan=tiny.plan(), config=EIGHT)
    made = engine._decoder.steps_of
    assert {id(p) for p in made.parameters()} == {id(p) for p in model.parameters()}
    assert sum(isinstance(one, weights.EightBitLinear) for one in made.modules()) == 7 * tiny.LAYERS + 1
    assert not any(isinstance(one, weights.EightBitLinear) for one in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert Engine(model, config={"step_weights": "float8"})._decoder.steps_of is made
    known = weakref.ref(made)
    del engine, made
    gc.collect()
    assert known() is None


def test_a_copy_is_as_good_as_8_bits_allow():
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 64) * torch.tensor([[1e-6], [0.0], [1e5]]))
    eight, scale = weights.quantize(layer.weight, rows=2)
    error = (eight.float() * scale[:, None] - layer.weight).abs()
    assert (error <= layer.weight.abs() / 16 + layer.weight.abs().amax(1, keepdim=True) * 2e-6).all()
    copied, x = weights.EightBitLinear(layer), torch.randn(2, 5, 64)
    right = torch.nn.functional.linear(x, eight.float() * scale[:, None], layer.bias)
    torch.testing.assert_close(copied(x), right, rtol=1e-3, atol=1e-5)
    many = torch.randn(100, 64)
    assert torch.equal(copied(many), layer(many))


@pytest.mark.parametrize(("execution", "every"), [("eager", 5), ("graph", "auto"), ("compiled", 3)])
def test_lossless_text_is_full_attentions(execution, every):
    model, rows, sampling = tiny.model(), tiny.prompts(60, 37), Sampling(temperature=0.7, seed=3)
    engine = Engine(model, plan=tiny.plan(), config=replace(EIGHT, verify_every=every), execution=execution)
    if execution == "compiled":
        engine._decoder._backend = "aot_eager"
    results = engine.generate(rows, 30, sampling=sampling)
    expected = Engine(model).generate(rows, 30, sampling=sampling)
    assert [one.token_ids for one in results] == [one.token_ids for one in expected]
    if every != "auto":
        assert all(0 < one.accepted < one.drafted for one in results)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_compiled_step_merges_its_layers(family):
    calls = []

    def backend(gm, example_inputs):
        calls.append(use_linear(gm, everywhere=True))
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    model = tiny.model(family)
    _, right = steps(model, 2, config={"step_weights": "float8"})
    _, found = steps(model, 2, config={"step_weights": "float8"}, execution="compiled", backend=backend)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert calls == [4 * tiny.LAYERS + 1]


def test_correction_passes_through_the_models_own_weights():
    """The step that corrects has the logits of a pass."""
    model = tiny.model()
    _, right = steps(model, 4, config={"correction_every": 4})
    _, found = steps(model, 4, config={"correction_every": 4, "step_weights": "float8"})
    assert not torch.allclose(found[:3], right[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[3], right[3], rtol=1e-4, atol=1e-4)


def test_without_memory_steps_use_the_models_own(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(weights, "quantize", fail)
    model = tiny.model()
    with pytest.warns(UserWarning, match="Memory does not suffice for weights in 8 bits") as warned:
        engine = Engine(model, config={"step_weights": "float8"})
    assert len(warned) == 1
    assert engine._decoder.steps_of is model


def test_what_cannot_be_copied_is_refused():
    model = tiny.model()
    model.config.quantization_config = {"quant_method": "made up"}
    with pytest.raises(ConfigError, match="quantised already: leave out step_weights"):
        Engine(model, config=EIGHT, check=False)
    with pytest.raises(ConfigError, match="step_weights must be one of 'model', 'float8', not 'int8'"):
        HybridConfig(step_weights="int8")
    with (
        pytest.raises(ConfigError, match="a copy of the weights, which only Engine does"),
        hybrid(model, tiny.plan(), EIGHT),
    ):
        pass


def write_data(model):
    """As adapters are merged: PyTorch does not count it."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data += 0.3 * torch.randn_like(layer.self_attn.q_proj.weight)


def write_one_number(model):
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 100.0


class Adapted(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.is_on = base_layer, True
        self.delta = nn.Parameter(torch.randn_like(base_layer.weight) * 0.3)

    def forward(self, x):
        return self.base_layer(x) + self.is_on * nn.functional.linear(x, self.delta)


def adapt(model):
    model.model.layers[1].self_attn.v_proj = Adapted(model.model.layers[1].self_attn.v_proj)


def turn_off(model):
    model.model.layers[1].self_attn.v_proj.is_on = False


CHANGES = {
    "data": write_data,
    "one number": write_one_number,
    "load": lambda model: model.load_state_dict({name: 1.1 * one for name, one in model.state_dict().items()}),
    "assign": lambda model: model.load_state_dict(tiny.model(initializer_range=0.2).state_dict(), assign=True),
    "dtype": lambda model: model.to(torch.bfloat16),
    "adapter": adapt,
    "adapter off": turn_off,
    "hook": lambda model: model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: 2 * output),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_followed(change):
    """By an engine that was there before and by one made beside it; no Context is taken for one of the model."""
    model, rows = tiny.model(), tiny.prompts(60, 37)
    if change is turn_off:
        adapt(model)
    engine = Engine(model, plan=tiny.plan(), config=EIGHT)
    context = engine.prefill(rows)
    before = engine.generate(context, 8, ignore_eos=True)
    change(model)
    right = Engine(copy.deepcopy(model), plan=tiny.plan(), config=EIGHT).generate(rows, 8, ignore_eos=True)
    assert [one.token_ids for one in right] != [one.token_ids for one in before]
    for one in (engine, Engine(model, plan=tiny.plan(), config=EIGHT)):
        found = one.generate(rows, 8, ignore_eos=True)
        assert [it.token_ids for it in found] == [it.token_ids for it in right]
    for use in (
        lambda: engine.generate(context, 8),
        lambda: engine.generate(rows, 8, context=context),
        lambda: engine.score(context, [[5], [6]]),
    ):
        with pytest.raises(InputError, match="The model was changed after it had read this Context"):
            use()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_on_a_gpu(family, rows):
    """Steps in 16 bits lie about as far from those in float32 when they are compiled, with our kernel, as when not."""
    model = tiny.model(family, torch.bfloat16, hidden_size=384, intermediate_size=512).cuda()
    tokens = torch.arange(rows, device="cuda") + 7

    def steps(model, execution):
        engine = Engine(model, config={"step_weights": "float8"}, execution=execution)
        context = engine.prefill(tiny.prompts(*range(30, 30 + rows)))
        return torch.stack([engine.decode_one_token(context, tokens).float() for _ in range(3)])

    eager, compiled = steps(model, "eager"), steps(model, "compiled")
    right = steps(model.float(), "eager")
    assert (compiled - right).norm() < 2 * (eager - right).norm()
