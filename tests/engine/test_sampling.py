"""Sampling: a token is a function of logits, seed, sequence and position."""

import math

import pytest
import torch

from lycheedecode.engine.sampling import Sampler, Sampling
from lycheedecode.ops import add_noise, seed_words


def gumbel(seed, sequences, positions, vocabulary):
    """The noise itself, `[..., V]`."""
    sequences, positions = torch.broadcast_tensors(sequences.int(), torch.as_tensor(positions).int())
    zeros = torch.zeros(sequences.numel(), vocabulary)
    return add_noise(zeros, seed, sequences.flatten(), positions.flatten()).unflatten(0, sequences.shape)


def test_noise_is_gumbels():
    noise = gumbel(seed_words(3), torch.arange(20), 5, 50_000).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert noise.exp().reciprocal().mean().item() == pytest.approx(1, abs=0.01)  # exponential in disguise
    assert not noise.isinf().any()


@pytest.mark.parametrize("other", [(4, 0, 5), (3, 1, 5), (3, 0, 6), (3 + (1 << 40), 0, 5)], ids=str)
def test_places_have_noise_of_their_own(other):
    noise = [
        gumbel(seed_words(seed), torch.tensor([b]), position, 20_000)[0] for seed, b, position in ((3, 0, 5), other)
    ]
    assert not torch.equal(*noise)
    assert torch.corrcoef(torch.stack(noise))[0, 1].abs() < 0.03
    assert noise[0].sort().values.diff().count_nonzero() > 19_900


def test_noise_stays_what_it_is():
    """Texts of a seed are reproducible from release to release."""
    noise = gumbel(seed_words(1234567890123), torch.tensor([0, 7]), torch.tensor([2, 300]), 3)
    expected = [[0.7459255, 0.2064556, 0.3154223], [-0.0532776, -0.4982056, -1.3065879]]
    assert noise.tolist() == [pytest.approx(row, rel=1e-6) for row in expected]


def test_noise_does_not_depend_on_the_shape_it_is_asked_in():
    positions = torch.arange(4)[None] + torch.tensor([[10], [20]])
    together = gumbel(seed_words(1), torch.tensor([[0], [3]]), positions, 50)
    for b, sequence in enumerate((0, 3)):
        for t in range(4):
            assert torch.equal(
                gumbel(seed_words(1), torch.tensor([sequence]), int(positions[b, t]), 50)[0], together[b, t]
            )


def test_draws_follow_the_softmax():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().expand(40_000, 4)
    drawn = Sampler(Sampling(temperature=1.0, seed=0), "cpu")(logits, positions=3)
    assert (drawn.bincount(minlength=4) / 40_000 - probabilities).abs().max() < 0.01
    cold = Sampler(Sampling(temperature=0.5, seed=0), "cpu")(logits)
    assert (cold.bincount(minlength=4) / 40_000 - (2 * logits[0]).softmax(0)).abs().max() < 0.01


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.9}, {0, 1, 2}), ({"min_p": 0.25}, {0, 1, 2}), ({"min_p": 0.5}, {0, 1})],
    ids=str,
)
def test_settings_leave_likely_tokens(settings, kept):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(500, 1)
    assert set(Sampler(Sampling(temperature=1.0, seed=0, **settings), "cpu")(logits).tolist()) == kept


def test_rows_of_several_positions():
    logits, sampler = torch.randn(2, 3, 90), Sampler(Sampling(temperature=0.8, top_p=0.9, seed=5), "cpu")
    together = sampler(logits, torch.tensor([[4], [1]]), torch.tensor([[7], [9]]) + torch.arange(3))
    for b, (sequence, first) in enumerate(((4, 7), (1, 9))):
        for t in range(3):
            assert sampler(logits[b, t][None], torch.tensor([sequence]), first + t) == together[b, t]


def test_without_a_seed_every_sampler_draws_anew():
    logits, sampling = torch.zeros(8, 1000), Sampling(temperature=1.0)
    assert not torch.equal(Sampler(sampling, "cpu")(logits), Sampler(sampling, "cpu")(logits))
    assert torch.equal(Sampler(Sampling(), "cpu")(logits), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("temperature", [1e-20, 1e20])
def test_the_coldest_draw_is_greedy_and_the_hottest_keeps_what_filters_keep(temperature):
    logits = torch.randn(8, 1000) * 100 - 400
    sampler = Sampler(Sampling(temperature=temperature, top_k=4 if temperature > 1 else 0, seed=1), "cpu")
    drawn = torch.stack([sampler(logits, positions=position) for position in range(20)], -1)
    best = logits.topk(4 if temperature > 1 else 1).indices
    assert (drawn[..., None] == best[:, None]).any(-1).all()
    assert drawn[0].unique().numel() == best.shape[1]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e-38}, "from 1e-20 to 1e20"),
        ({"temperature": 1e38}, "from 1e-20 to 1e20"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"min_p": 1.5}, "min_p"),
    ],
    ids=str,
)
def test_bad_settings(settings, what):
    with pytest.raises(ValueError, match=what):
        Sampling(**settings)
