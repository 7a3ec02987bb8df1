"""Chunks of tokens against one softmax over everything."""

import pytest
import torch

from lycheedecode.engine import prefill as dense
from lycheedecode.engine.prefill import ChunkAttention, attend_causal
from lycheedecode.models.routing import Window
from lycheedecode.models.shape import ModelShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
WINDOWS = [Window(), Window("sliding_attention", 7), Window("chunked_attention", 8)]


def tensors(tokens, slots, batch=2, dtype=torch.float32):
    sizes = (batch, 6, tokens, 16), (batch, 2, slots, 16), (batch, 2, slots + 3, 16)
    query, keys, values = (torch.randn(size, device=DEVICE).to(dtype) for size in sizes)
    return query, keys, values[:, :, :slots]


def expected(query, keys, values, window=WINDOWS[0], starts=None):
    slots = keys.shape[2]
    weights = query.double() @ keys.double().repeat_interleave(3, 1).mT * SCALE
    for b in range(len(query)):
        start = 0 if starts is None else starts[b]
        for t in range(query.shape[2]):
            slot = slots - query.shape[2] + t
            first = window.first_slot(slot + 1, start)
            weights[b, :, t, :first] = weights[b, :, t, slot + 1 :] = -torch.inf
    return weights.softmax(-1) @ values.double().repeat_interleave(3, 1)


@pytest.mark.parametrize(("tokens", "slots"), [(9, 9), (9, 30), (1, 30), (1, 1)])
def test_chunks_see_everything_before_them(tokens, slots):
    inputs = tensors(tokens, slots)
    torch.testing.assert_close(attend_causal(*inputs, SCALE), expected(*inputs).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="There is no GPU here.")
@pytest.mark.parametrize("slots", [200, 900])
def test_chunks_in_half_precision(slots):
    inputs = tensors(200, slots, dtype=torch.bfloat16)
    torch.testing.assert_close(attend_causal(*inputs, SCALE).double(), expected(*inputs), atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="There is no GPU here.")
@pytest.mark.parametrize("slots", [256, 900, 1111])
def test_cudnn_takes_large_chunks(slots, monkeypatch):
    monkeypatch.setattr(dense, "_MUCH", 1)
    query = torch.randn(2, 6, 256, 64, device=DEVICE, dtype=torch.bfloat16)
    keys, values = (torch.randn(2, 2, slots + 5, 64, device=DEVICE).bfloat16()[:, :, :slots] for _ in range(2))
    called = []
    cudnn = dense.torch_private.cudnn
    monkeypatch.setattr(dense.torch_private, "cudnn", lambda *args, **named: called.append(1) or cudnn(*args, **named))
    output = attend_causal(query, keys, values, SCALE)
    torch.testing.assert_close(output.double(), expected(query, keys, values), atol=2e-2, rtol=2e-2)
    assert called or torch.cuda.get_device_capability()[0] < 9


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.kind)
@pytest.mark.parametrize("padding", [None, [0, 11], [3, 27]])
@pytest.mark.parametrize("tile", [1024, 4])
def test_layers_see_what_is_in_their_window(window, padding, tile, monkeypatch):
    monkeypatch.setattr(dense, "_TILE", tile)
    query, keys, values = tensors(10, 30)
    output = ChunkAttention([window], padding).attend(0, query, keys, values, SCALE)
    right = expected(query, keys, values, window, padding)
    for b, start in enumerate(padding or [0, 0]):
        tokens = max(start - 20, 0)
        torch.testing.assert_close(output[b, :, tokens:], right[b, :, tokens:].float(), atol=1e-5, rtol=1e-4)
    assert output.isfinite().all()


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.kind)
def test_numbers_and_tensors_see_equally_far(window):
    for filled, start in ((5, 0), (20, 0), (20, 9), (24, 17)):
        first = window.first_slot(filled, start)
        assert start <= first < filled
        assert window.first_slot(torch.tensor([filled]), torch.tensor([start])).item() == first
        if window.is_all or window.kind == "sliding_attention":
            assert window.first_slot(filled, torch.tensor([start])).item() == first


def test_layers_of_unknown_kind_are_refused(llama):
    from copy import deepcopy

    from lycheedecode.models.shape import ModelError

    model = deepcopy(llama)
    model.config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(ModelError, match="layers of the kind linear_attention, which Engine cannot decode"):
        Window.of_layers(model, ModelShape.of(model))
