"""Rotations move into the attention layers of a compiled step, where a graph has exactly these."""

import pytest
import tiny
import torch

from lycheedecode.bench.models import random_context
from lycheedecode.engine.engine import Engine
from lycheedecode.engine.passes import DensePass
from lycheedecode.fusion import backend
from lycheedecode.fusion.rotated import use_rotation
from lycheedecode.ops.append.rope import Rotation


class Graphs:
    """Runs graphs as they are after the pass, and counts the layers that took their rotation."""

    def __init__(self):
        self.taken, self.left = 0, []

    def __call__(self, gm, example_inputs):
        self.taken += use_rotation(gm)
        gm.graph.lint()
        gm.recompile()
        self.left = [getattr(node.target, "__name__", node.target) for node in gm.graph.nodes]
        return gm.forward


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_families(family):
    model, graphs, token_ids = tiny.model(family), Graphs(), torch.tensor([1, 2])
    torch._dynamo.reset()
    context = random_context(model, 2, 50, 10)
    results = []
    for engine in (Engine(model), Engine(model, execution="compiled", backend=graphs)):
        results.append([engine.decode_one_token(context, token_ids).clone() for _ in range(2)])
        keys = context.cache.layers[1].keys.clone()
        results[-1].append(keys)
        context.rewind()
    for right, found in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert graphs.taken == tiny.LAYERS
    assert "neg" not in graphs.left
    assert graphs.left.count("rsqrt") == 2 * tiny.LAYERS + 1  # those of queries and keys went along


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_passes_of_several_tokens(family):
    """Sequences end in different slots, as in a round."""
    model, graphs = tiny.model(family), Graphs()
    torch._dynamo.reset()
    context, token_ids = random_context(model, 2, 50, 10), torch.randint(4, 200, (2, 4))
    results = []
    for engine in (Engine(model), Engine(model, execution="compiled", backend=graphs)):
        one = DensePass(context.cache, 4, engine._full, engine._windows, context.kv_bytes)
        one.token_ids.copy_(token_ids)
        one.filled.copy_(torch.tensor([54, 49]))
        run = engine._decoder.capture(one.run, [context.kv_bytes])
        with torch.inference_mode(), engine._decoder.route:
            logits = run()
        results.append((logits.clone(), *(store[:, :, :54].clone() for store in one.stores[2])))
    for right, found in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert graphs.taken == tiny.LAYERS
    assert "neg" not in graphs.left


def test_inductor_finishes_the_graph():
    model, token_ids = tiny.model("qwen3", num_hidden_layers=1), torch.tensor([1, 2])
    context, results = random_context(model, 2, 50, 10), []
    for engine in (Engine(model), Engine(model, execution="compiled", backend=backend)):
        results.append(engine.decode_one_token(context, token_ids).clone())
        context.rewind()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def step(x, cos, sin, rotate):
    """A layer whose rotation is written as models write it, or not quite."""
    rotated = [rotate(head, cos.unsqueeze(1), sin.unsqueeze(1)) for head in x]
    if x.shape[3] > 1:
        query, key = (head.transpose(1, 2) for head in rotated)
        return torch.ops.lycheedecode.pass_layer.default(query, key, key, 0, 1.0)
    query, key = (head[:, :, 0] for head in rotated)
    return torch.ops.lycheedecode.decode_layer.default(query, key, key, 0, 1.0)


def halves(x):
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


ROTATIONS = {
    "as it is": (lambda x, cos, sin: (x * cos) + (torch.cat((-halves(x)[1], halves(x)[0]), dim=-1) * sin), True),
    "other halves": (lambda x, cos, sin: (x * cos) + (torch.cat((-halves(x)[0], halves(x)[1]), dim=-1) * sin), False),
    "other way": (lambda x, cos, sin: (x * cos) + (torch.cat((halves(x)[1], -halves(x)[0]), dim=-1) * sin), False),
    "none": (lambda x, cos, sin: x * cos, False),
}


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("rotate", "taken"), ROTATIONS.values(), ids=ROTATIONS)
def test_only_this_rotation(rotate, taken, tokens):
    import lycheedecode.engine.step as steps

    class Attention:
        def attend(self, layer, query, key, value, scale, rotation=None):
            if rotation is not None:
                query, key = rotation.of_query(query), rotation.of_key(key)
            return query + key.sum(1, keepdim=True)

        def attend_tokens(self, layer, query, key, value, scale, rotation=None):
            rows = [x.flatten(0, 1) for x in (query, key, value)]
            return self.attend(layer, *rows, scale, rotation).unflatten(0, query.shape[:2])

    torch._dynamo.reset()
    x, (cos, sin), graphs = torch.randn(2, 3, 4, tokens, 8), torch.randn(2, 3, tokens, 8), Graphs()
    with steps.running(Attention()):
        right = step(x, cos, sin, rotate)
        found = torch.compile(step, backend=graphs, fullgraph=True)(x, cos, sin, rotate)
    torch.testing.assert_close(found, right)
    assert graphs.taken == taken


def test_the_definition_is_that_of_the_models():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    query, key, (cos, sin) = torch.randn(2, 4, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    norms = [Qwen3RMSNorm(16, eps=1e-5) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    rotation = Rotation(cos, sin, norms[0].weight, norms[1].weight, 1e-5)
    right = apply_rotary_pos_emb(norms[0](query)[:, :, None], norms[1](key)[:, :, None], cos[:, None], sin[:, None])
    torch.testing.assert_close(rotation.of_query(query), right[0][:, :, 0])
    torch.testing.assert_close(rotation.of_key(key), right[1][:, :, 0])
