"""The kernels of `attend_tokens` against the reference."""

import pytest
import torch
from kernel_cases import DEVICE, GPU, SCALE, close, dtypes, kernels, layouts, make_cache, paged, tame

from lycheedecode.ops import reference
from lycheedecode.ops.attend.triton_rows import attend_tokens
from lycheedecode.ops.kernel_common import Tuning

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about log2(0) and -inf


def make_queries(kv, tokens, group):
    shape = (kv.batch, tokens, kv.keys.shape[1] * group, kv.keys.shape[3])
    return torch.randn(shape, device=DEVICE).to(kv.keys.dtype if kv.keys.dtype.itemsize > 1 else torch.float16)


@layouts
@dtypes
def test_tokens(layout, dtype):
    kv = make_cache(**layout, dtype=dtype)
    query = make_queries(kv, 5, 3)
    close(kernels.attend_tokens(query, kv, SCALE), reference.attend_tokens(query, kv, SCALE), dtype)


@pytest.mark.parametrize(("tokens", "group", "splits"), [(1, 7, 3), (2, 6, 1), (9, 4, 3), (32, 3, 1)])
def test_tokens_rows_and_splits(tokens, group, splits):
    kv = make_cache([100, 31, 3, 0])
    query = make_queries(kv, tokens, group)
    result = attend_tokens(query, kv, SCALE, tuning=Tuning(splits, 16, 4, 2))
    close(result, reference.attend_tokens(query, kv, SCALE), torch.float32)


@pytest.mark.parametrize("page", [16, 48, 256])
def test_tokens_pages(page):
    kv = paged(make_cache([100, 31, 0], starts=[3, 0, 60], slots=104, heads=3), page)
    query = make_queries(kv, 6, 2)
    close(kernels.attend_tokens(query, kv, SCALE), reference.attend_tokens(query, tame(kv), SCALE), torch.float32)


def test_tokens_begin_late():
    """Layers that look back a limited way."""
    kv = make_cache([100, 31, 5])
    query, end = make_queries(kv, 6, 2), kv.token_counts()[:, None] - torch.arange(5, -1, -1, device=DEVICE)
    for span in (1, 7, 40):
        begins = (end - span).clamp(min=0).int()
        for tuning in (None, Tuning(3, 16, 4, 2)):
            result = attend_tokens(query, kv, SCALE, begins, tuning=tuning)
            close(result, reference.attend_tokens(query, kv, SCALE, begins), torch.float32)


@pytest.mark.parametrize("page", [0, 16])
def test_tokens_of_a_cache_in_8_bits(page):
    kv = make_cache([100, 31], dtype=torch.float16)
    scales = torch.tensor([0.5, 2.0], device=DEVICE), torch.tensor([3.0, 0.25], device=DEVICE)
    kv = paged(kv, page) if page else kv
    kv = kv._replace(keys=kv.keys.to(torch.float8_e4m3fn), values=kv.values.to(torch.float8_e4m3fn))
    query = make_queries(kv, 6, 2)
    result = kernels.attend_tokens(query, kv, SCALE, None, scales)
    close(result, reference.attend_tokens(query, tame(kv), SCALE, None, scales), torch.float16)


def test_tokens_do_not_feel_their_place():
    """A query gives the same bits whether it is the last of several tokens or another; numpy's products do not."""
    kv = make_cache([100, 31], slots=110)
    query = make_queries(kv, 5, 3)
    tuning = Tuning(3, 16, 4, 2)
    together = attend_tokens(query, kv, SCALE, tuning=tuning)
    for t in range(5):
        ends = kv._replace(lengths=kv.lengths - (4 - t))
        alone = query.roll(4 - t, 1)
        result = attend_tokens(alone, ends, SCALE, tuning=tuning)[:, 4]
        assert torch.equal(result, together[:, t]) if GPU else torch.allclose(result, together[:, t], atol=1e-6)
