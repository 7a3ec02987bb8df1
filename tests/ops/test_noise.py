"""Noise is the same on every device; on a CPU `test_interpreter.py` runs the kernels."""

import os

import pytest
import torch

from lycheedecode import ops
from lycheedecode.ops import seed_words
from lycheedecode.ops.noise import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not RUNS_KERNELS, reason="Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")
@pytest.mark.parametrize("seed", [0, 3, -1, 1 << 45, 0xFFFFFFFFFFFFFFFF])
def test_the_kernel_adds_what_the_definition_does(seed):
    from lycheedecode.ops.noise.triton import add_noise

    logits = torch.randn(3, 5005)[:, :5001]
    logits[1, 7] = -torch.inf
    places = torch.tensor([0, 7, 2], dtype=torch.int32), torch.tensor([3, 100000, 0], dtype=torch.int32)
    expected = reference.add_noise(logits, seed_words(seed), *places)
    result = add_noise(*(x.to(DEVICE) for x in (logits, seed_words(seed), *places))).cpu()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert (result == expected).float().mean() > 0.999  # to the bit, but for roundings of logarithms
    assert result[1, 7] == -torch.inf


def test_what_does_not_fit_is_refused():
    logits, place = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="logits must be float32"):
        ops.add_noise(logits.double(), seed_words(0), place, place)
    with pytest.raises(ValueError, match="positions must be int32"):
        ops.add_noise(logits, seed_words(0), place, place[:2])
