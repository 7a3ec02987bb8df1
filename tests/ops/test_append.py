"""The newest token lands in its slot and nowhere else; on a CPU `test_interpreter.py` runs the kernels."""

import os

import pytest
import torch

from lycheedecode import ops
from lycheedecode.ops.append.rope import Rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(not RUNS_KERNELS, reason="Runs with TRITON_INTERPRET=1, as test_interpreter.py does.")


@runs_kernels
@pytest.mark.parametrize("dim", [16, 60])
def test_the_kernel_writes_where_the_definition_does(dim):
    from lycheedecode.ops.append.triton import append

    keys, values = torch.randn(2, 3, 2, 20, dim, device=DEVICE)
    key, value = torch.randn(3, 2, 2, dim, device=DEVICE).unbind(1)  # views with gaps between the sequences
    filled = torch.tensor([20, 1, 7], dtype=torch.int32, device=DEVICE)
    expected = keys.cpu().clone(), values.cpu().clone()
    ops.append(*expected, key.cpu(), value.cpu(), filled.cpu())
    append(keys, values, key, value, filled)
    assert torch.equal(keys.cpu(), expected[0])
    assert torch.equal(values.cpu(), expected[1])


@runs_kernels
@pytest.mark.parametrize("dim", [16, 60])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_rotate_on_the_way(dim, normed):
    from lycheedecode.ops.append.triton import append

    keys, values = torch.randn(2, 3, 2, 20, dim, device=DEVICE)
    key, value = torch.randn(3, 2, 2, dim, device=DEVICE).unbind(1)
    query = torch.randn(3, 5, 2, dim, device=DEVICE)[:, :, 1]
    filled = torch.tensor([20, 1, 7], dtype=torch.int32, device=DEVICE)
    rotation = Rotation(*torch.randn(2, 3, dim, device=DEVICE))
    if normed:
        rotation = rotation._replace(
            **dict(zip(("query_norm", "key_norm"), torch.randn(2, dim), strict=True)), eps=1e-5
        )
    rotation = Rotation(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in rotation))
    on_cpu = Rotation(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in rotation))
    expected = keys.cpu().clone(), values.cpu().clone()
    right = ops.append(*expected, key.cpu(), value.cpu(), filled.cpu(), query.cpu(), on_cpu)
    found = append(keys, values, key, value, filled, query, rotation)
    torch.testing.assert_close(found.cpu(), right)
    torch.testing.assert_close(keys.cpu(), expected[0])
    assert torch.equal(values.cpu(), expected[1])


@runs_kernels
def test_a_channel_dimension_with_gaps_is_refused():
    from lycheedecode.ops.append.triton import append

    cache, token = torch.zeros(1, 1, 4, 8, device=DEVICE), torch.zeros(1, 1, 16, device=DEVICE)[..., ::2]
    with pytest.raises(ValueError, match="key must have a contiguous last dimension"):
        append(cache, cache, token, token, torch.ones(1, dtype=torch.int32, device=DEVICE))


def test_the_definition():
    keys, values = torch.zeros(2, 2, 1, 4, 3)
    ops.append(keys, values, torch.ones(2, 1, 3), torch.ones(2, 1, 3) * 2, torch.tensor([2, 4], dtype=torch.int32))
    assert keys.sum((1, 3)).tolist() == [[0, 3, 0, 0], [0, 0, 0, 3]]
    assert torch.equal(values, keys * 2)


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=runs_kernels)])
def test_several_tokens_a_sequence(kernel):
    """Rows of one sequence follow each other, and each has its slot."""
    if kernel:
        from lycheedecode.ops.append.triton import append
    else:
        from lycheedecode.ops import append
    keys, values = torch.zeros(2, 2, 2, 20, 16, device=DEVICE)
    key, value = torch.randn(2, 6, 2, 16, device=DEVICE)
    filled = torch.tensor([3, 4, 5, 18, 19, 20], dtype=torch.int32, device=DEVICE)
    append(keys, values, key, value, filled)
    for cache, new in ((keys, key), (values, value)):
        assert torch.equal(cache[0, :, 2:5].transpose(0, 1), new[:3])
        assert torch.equal(cache[1, :, 17:20].transpose(0, 1), new[3:])
        assert cache.count_nonzero() == new.numel()
