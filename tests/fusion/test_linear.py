"""The linear operator, and the backend that finds linear layers in graphs."""

from copy import deepcopy
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from lycheedecode.fusion import backend, linear, reference
from lycheedecode.fusion.graph import use_linear
from lycheedecode.fusion.operator import quantize


class Graphs:
    """A backend that runs graphs as they are, after the pass; remembers calls of `linear` and of what it replaces."""

    def __init__(self, **options):
        self.options, self.calls, self.left = options, 0, []

    def __call__(self, gm, example_inputs):
        self.calls += use_linear(gm, everywhere=True, **self.options)
        gm.graph.lint()
        gm.recompile()
        names = [getattr(node.target, "__name__", node.target) for node in gm.graph.nodes]
        self.left += [name for name in names if name in ("linear", "silu", "rsqrt")]
        return gm.forward


def logits(model, step, length=1, batch=2):
    ids = torch.arange(batch * length).view(batch, length) + 7
    with torch.inference_mode():
        return step(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_families(family):
    """A layer is four calls; the norm before the logits and those of queries and keys stay."""
    model = tiny.model(family)
    graphs = Graphs()
    torch._dynamo.reset()
    result = logits(model, torch.compile(model, backend=graphs, fullgraph=True), length=3)
    torch.testing.assert_close(result, logits(model, model, length=3), rtol=1e-4, atol=1e-4)
    assert graphs.calls == 4 * tiny.LAYERS + 1
    assert graphs.left == ["rsqrt"] * (1 + (2 * tiny.LAYERS if family == "qwen3" else 0))


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", {"tie_word_embeddings": True}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("gemma3", {}),
])  # fmt: skip
def test_unusual_models(family, changes):
    """Tied weights, biases everywhere, norms and activations that it does not know."""
    model = tiny.model(family, **changes)
    graphs = Graphs()
    torch._dynamo.reset()
    result = logits(model, torch.compile(model, backend=graphs, fullgraph=True))
    torch.testing.assert_close(result, logits(model, model), rtol=1e-4, atol=1e-4)
    assert graphs.calls == 4 * tiny.LAYERS + 1
    assert "linear" not in graphs.left


def test_inductor_finishes_the_graph():
    model = tiny.model("qwen2", num_hidden_layers=1, dtype=torch.bfloat16)
    torch._dynamo.reset()
    step = torch.compile(model, backend=partial(backend, everywhere=True), fullgraph=True)
    torch.testing.assert_close(logits(model, step), logits(model, model), rtol=5e-2, atol=5e-2)


def test_norms_can_stay():
    model, graphs = tiny.model("llama"), Graphs(norms=False)
    torch._dynamo.reset()
    result = logits(model, torch.compile(model, backend=graphs, fullgraph=True))
    torch.testing.assert_close(result, logits(model, model), rtol=1e-4, atol=1e-4)
    assert graphs.left == ["rsqrt"] * (2 * tiny.LAYERS + 1)


def test_many_rows_and_training_stay_as_they_are():
    model, graphs = tiny.model("llama"), Graphs()
    torch._dynamo.reset()
    step = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    logits(model, step, length=33)
    assert graphs.calls == 0
    layer = nn.Linear(8, 8)
    torch.compile(layer, backend=graphs)(torch.randn(2, 8)).sum().backward()
    assert graphs.calls == 0
    assert layer.weight.grad is not None


@pytest.mark.parametrize(("norms", "left"), [(True, 1), (False, 2 * tiny.LAYERS + 1)])
def test_rows_of_a_pass_over_drafts(norms, left):
    model, graphs = tiny.model("llama"), Graphs(norms=norms)
    torch._dynamo.reset()
    result = logits(model, torch.compile(model, backend=graphs, fullgraph=True, dynamic=False), length=32)
    torch.testing.assert_close(result, logits(model, model, length=32), rtol=1e-4, atol=1e-4)
    assert graphs.left == ["rsqrt"] * left


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_compiled_step_in_a_cuda_graph(family):
    model = tiny.model(family, dtype=torch.bfloat16, hidden_size=384, intermediate_size=512).cuda()
    exact = deepcopy(model).float()
    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, fullgraph=True)
    ids = torch.tensor([[7], [8], [9]], device="cuda")
    with torch.inference_mode():
        for _ in range(3):
            step(input_ids=ids, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step(input_ids=ids, use_cache=False).logits
        for shift in (0, 20):
            ids += shift
            graph.replay()
            right = exact(input_ids=ids, use_cache=False).logits
            assert (result - right).norm() / right.norm() < 5e-2


class Shared(nn.Module):
    """Everything that must not be taken for something else."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16, bias=i % 2 == 0) for i in range(4))
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x):
        wide = x.to(torch.float32)
        h = self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        gate = F.silu(self.b(h))
        y = gate * self.d(h) + gate  # the activation is needed twice
        y = y + self.a(h) + h  # and so is the norm
        z = self.c(y)
        y = z + z
        y = self.c(y)[:, :1] + y  # a weight used twice, a sum that broadcasts
        five = [layer(y) for layer in (self.a, self.b, self.c, self.d, self.a)]
        y = y + self.b(y.T.contiguous() if y.shape[0] == y.shape[1] else y)
        return torch.cat([*five, y * self.a(y), F.linear(y, self.scale * self.d.weight)], -1)


def test_what_only_looks_like_it():
    module, graphs = Shared().requires_grad_(False), Graphs()
    x = torch.randn(5, 16)
    torch._dynamo.reset()
    result = torch.compile(module, backend=graphs, fullgraph=True)(x)
    torch.testing.assert_close(result, module(x), rtol=1e-4, atol=1e-5)
    assert graphs.left.count("linear") == 1  # whose weight is computed
    assert graphs.left.count("silu") == 1


def test_operator():
    x, weights, norm = torch.randn(2, 1, 16), [torch.randn(8, 16) for _ in range(2)], torch.randn(16)
    arguments = ([torch.randn(8), torch.randn(8)], torch.randn(2, 1, 8), norm, 1e-5, True)
    torch.testing.assert_close(linear(x, weights, *arguments), reference(x, weights, *arguments))
    torch.library.opcheck(torch.ops.lycheedecode.linear.default, (x, weights, *arguments, []))
    eight, scales = map(list, zip(*map(quantize, weights), strict=True))
    # Its check of the schema multiplies what it is given, and torch cannot multiply 8-bit floats.
    eight_bits = (x, eight, *arguments, scales)
    torch.library.opcheck(torch.ops.lycheedecode.linear.default, eight_bits, test_utils=("test_faketensor",))
    assert linear(x, weights).shape == (2, 1, 16)
