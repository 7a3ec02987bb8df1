"""Summaries of what a head leaves unread: bounds that hold for any model, and the study from prompts to a file."""

import json
import random
from dataclasses import replace

import pytest
import torch

from experiments import completion
from experiments.completion import Layer, Trial
from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.identify import Cell
from lycheedecode.identify.replay import Planned, Seen, full, prepare, replay
from lycheedecode.prompts.makers import makers_for

CONFIG = HybridConfig(budget_tokens=48, block_size=8, sink_tokens=8, recent_tokens=8, completion_chunk=16)


@pytest.fixture(scope="module")
def lesson(llama, byte_tokenizer):
    cell = Cell("code", 200, "continuation", 20)
    return prepare(llama, cell.make(makers_for(byte_tokenizer, [cell], "evaluate"), 2, random.Random(0)))


@pytest.fixture(scope="module")
def layers(llama, lesson):
    """What the four layers see."""
    study, found = completion.Trials(llama, None, CONFIG), []
    rotation = study._rotation(lesson)
    replay(llama, lesson, lambda layer, seen: found.append(Layer.of(seen, CONFIG, rotation)) or full(layer, seen))
    return found


def test_means_are_what_the_engine_has(llama, lesson):
    own, config = HeadPlan.all_retrieval(4, 2), HybridConfig(**{**CONFIG.to_dict(), "completion": "centroid"})
    expected = replay(llama, lesson, Planned(own, config))
    rotation = completion.Trials(llama, None, CONFIG)._rotation(lesson)
    found = replay(llama, lesson, lambda _, seen: completion.means(Layer.of(seen, CONFIG, rotation)).output(1.0))
    torch.testing.assert_close(found, expected)


def test_exact_mass_is_what_is_unread(layers):
    for layer in layers:
        exact = completion.exact_mass(layer)
        torch.testing.assert_close(exact.unread_mass, layer.exact.sum((-2, -1))[..., None])
        assert (exact.read_mass + exact.unread_mass < 1 + 1e-5).all()


def test_recent_weights_are_exact_for_the_query_that_they_are_of(layers):
    """Of one query head at one step."""
    whole = layers[1]
    query = whole.seen.query.unflatten(2, whole.seen.weights.shape[2:4])[:, :, 0, :1]
    seen = replace(
        whole.seen, query=query, weights=whole.seen.weights[:, :, :1, :1], log_sum=whole.seen.log_sum[:, :, :1, :1]
    )
    layer = Layer(seen, whole.read[:, :, :1], whole.unread[:, :, :1], whole.rotation)
    found, mean, true = completion.recent(layer), completion.means(layer), completion.true_value(layer)
    exact = completion.exact_mass(layer).unread_mass
    torch.testing.assert_close(found.unread_mass, exact)
    torch.testing.assert_close(found.unread / found.unread_mass, true.unread / true.unread_mass, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mean.unread_mass, exact, rtol=0.1)


def test_recent_weighs_nothing_where_nothing_is_unread():
    """Logits near -200, as some heads have: a key of zeros would weigh exp(200) times as much."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 76, 4, generator=generator)
    keys[..., 0] -= 200
    query = torch.eye(4)[0].expand(1, 1, 12, 4)
    logits = (query @ keys.mT).unflatten(2, (1, 12))
    weights, values = logits.softmax(-1), torch.randn(1, 1, 76, 4, generator=generator)
    seen = Seen(weights, values, keys, query, logits.logsumexp(-1, keepdim=True))
    read = torch.zeros(1, 1, 12, 76, dtype=torch.bool)
    read[..., 16:32] = read[..., 64:] = True  # all of the second chunk, and what belongs to none
    layer = Layer(seen, read, ~read[..., :64].unflatten(-1, (4, 16)), (torch.ones(76, 4), torch.zeros(76, 4)))
    found, true = completion.recent(layer), layer.exact.sum((-2, -1))[..., None]
    torch.testing.assert_close(found.unread_mass, true)  # all queries are alike: their weights are each other's
    assert found.output(1.0).isfinite().all()


def test_exact_mass_and_true_output_make_full_attention(layers):
    """But for the last tokens of the prompt, which belong to no full chunk, and are read."""
    layer = layers[2]
    true = completion.true_value(layer)
    exact = completion.exact_mass(layer).unread_mass
    output = (true.read + true.unread / true.unread_mass * exact) / (true.read_mass + exact)
    covered = (true.read_mass + exact)[..., 0] > 1 - 1e-5
    assert covered.any()
    torch.testing.assert_close(output[covered], full(2, layer.seen)[covered], atol=1e-4, rtol=1e-4)


def test_keys_that_are_not_rotated_are_means(layers):
    layer = layers[0]
    plain = Layer(layer.seen, layer.read, layer.unread, (torch.ones(219, 16), torch.zeros(219, 16)))
    torch.testing.assert_close(completion.rotated(plain).unread, completion.means(plain).unread)
    assert not torch.allclose(completion.rotated(layer).unread, completion.means(layer).unread, rtol=0.1)


def test_the_study_writes_what_it_finds(monkeypatch, tmp_path, llama, byte_tokenizer):
    monkeypatch.setattr(completion, "load_model", lambda name, dtype: (llama, byte_tokenizer))
    path, sizes = tmp_path / "found.json", ["--budget-tokens", "64", "--block-size", "8", "--prompts", "2"]
    monkeypatch.setattr("sys.argv", ["study", "--json", str(path), "--cells", "prose:300:continuation:12", *sizes])
    completion.main()
    rows = json.loads(path.read_text(encoding="utf-8"))["result"]["rows"]
    by_student = {row["student"]: row for row in rows if "student" in row}
    assert set(by_student) == set(map(str, completion.trials(4)))
    assert {row["prompts"] for row in by_student.values()} == {2}
    assert by_student["nothing"]["kl_mean"] > 0
    assert [row["layer"] for row in rows if "layer" in row] == [0, 1, 2, 3]
    assert str(Trial("means", 0.5, 3)) == "means, x 0.5, from layer 3"
