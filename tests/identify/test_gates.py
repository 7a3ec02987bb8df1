import pytest
import torch

from lycheedecode.identify.gates import GATES, Direct, HardKuma


@pytest.mark.parametrize("kind", ["hardkuma", "hardconcrete"])
def test_closed_forms_match_samples(kind):
    torch.manual_seed(0)
    gates = GATES[kind](3, 4)
    for parameter in gates.parameters():
        parameter.data = torch.rand_like(parameter) * 2 + 0.2
    generator = torch.Generator().manual_seed(1)
    samples = torch.stack([gates.sample(generator) for _ in range(10_000)])
    assert samples.min() >= 0
    assert samples.max() <= 1
    torch.testing.assert_close(samples.mean(0), gates.mean(), atol=0.015, rtol=0)
    torch.testing.assert_close((samples > 0).float().mean(0), gates.open_probability(), atol=0.015, rtol=0)


@pytest.mark.parametrize("kind", ["hardkuma", "hardconcrete"])
def test_mass_at_both_ends_and_gradient_between(kind):
    gates = GATES[kind](1, 1)
    generator = torch.Generator().manual_seed(0)
    samples = torch.cat([gates.sample(generator).flatten() for _ in range(500)])
    assert (samples == 0).any()
    assert (samples == 1).any()
    assert ((samples > 0) & (samples < 1)).any()
    samples.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in gates.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in gates.parameters())


def test_hardkuma_starts_as_the_paper_sets_it():
    # a = b = 1 is the uniform distribution: P(z = 0) = P(s < 0.1 / 1.2), and the mean is 1/2 by symmetry.
    gates = HardKuma(2, 2)
    torch.testing.assert_close(gates.open_probability(), torch.full((2, 2), 1 - 0.1 / 1.2))
    torch.testing.assert_close(gates.mean(), torch.full((2, 2), 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", sorted(GATES))
def test_constrain_keeps_the_domain(kind):
    gates = GATES[kind](2, 2)
    for parameter in gates.parameters():
        parameter.data.fill_(-1e9)
    gates.constrain()
    assert torch.isfinite(gates.sample(torch.Generator().manual_seed(0))).all()
    assert torch.isfinite(gates.mean()).all()


def test_direct_gates_are_their_weights():
    gates = Direct(1, 3)
    gates.weight.data = torch.tensor([[-1.0, 0.25, 2.0]])
    gates.constrain()
    assert gates.sample().tolist() == [[0.0, 0.25, 1.0]]
