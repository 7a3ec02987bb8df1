"""What transformers writes into a model while it runs is no change of the model."""

import pytest
import tiny
import torch

from experiments.models_sweep import tiny as any_class
from lycheedecode import Engine
from lycheedecode.errors import InputError

TURN = 64


def dynamic():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return tiny.model("llama", rope_parameters=rope, max_position_embeddings=TURN)


def generate(model, length, **options):
    ids = torch.tensor([[5 + i % 7 for i in range(length)]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, **options)


MODELS = {
    "longrope": lambda: tiny.longrope(TURN),
    "dynamic": dynamic,
    "a model of images": lambda: any_class.make("Qwen3VLForConditionalGeneration"),
}
RUNS = {
    "short": lambda model: generate(model, 20),
    "past the turn": lambda model: generate(model, TURN + 9),
    "static cache": lambda model: generate(model, 20, cache_implementation="static"),
    "compiled": lambda model: model.get_compiled_call(None),
    "compiled in place": lambda model: model.compile(backend="eager"),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_context_outlives_what_runs_write(make):
    """Also as first runs do, which come after the engine was made; and none of it hides a change."""
    model, rows = make(), [[5, 9, 30, 7] * 9, [8, 3] * 11]
    engine = Engine(model, check=False)
    context = engine.prefill(rows)
    right = engine.generate(context, 5, ignore_eos=True)
    for run in RUNS.values():
        run(model)
        found = engine.generate(context, 5, ignore_eos=True)
        assert [one.token_ids for one in found] == [one.token_ids for one in right]
        assert engine.generate(rows, 5, context=context, ignore_eos=True)[0].cached_tokens == len(rows[0])
    model.get_output_embeddings().weight.data *= -1
    with pytest.raises(InputError, match="The model was changed"):
        engine.generate(context, 5)


def test_a_buffer_that_passes_do_not_write_is_part_of_the_model():
    model = tiny.model("gemma3")
    engine = Engine(model)
    context = engine.prefill([[5, 9, 30, 7]])
    model.get_input_embeddings().embed_scale *= 2
    with pytest.raises(InputError, match="The model was changed"):
        engine.generate(context, 5)
