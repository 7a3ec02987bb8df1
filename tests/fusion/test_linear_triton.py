"""The linear kernel against its reference; on a CPU `ops/test_interpreter.py` runs it."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Runs with TRITON_INTERPRET=1, as test_interpreter.py does.", allow_module_level=True)
pytest.importorskip("triton", reason="The kernel needs Triton.")

from lycheedecode.fusion import reference  # noqa: E402
from lycheedecode.fusion.launches import LinearTuning, default_tuning  # noqa: E402
from lycheedecode.fusion.operator import quantize  # noqa: E402
from lycheedecode.fusion.triton import linear  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
# The interpreter reads the bits of a bfloat16 as an integer when it multiplies matrices.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PREFETCH = 64  # on a GPU that can


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def check(rows, sizes, columns, tuning=None, dtype=torch.float32, bias=False, residual=False, norm=False, gated=False):
    """Rows of `x` lie apart, with NaN between them."""
    padded = torch.full((rows, columns + 8), torch.nan, dtype=dtype, device=DEVICE)
    padded[:, :columns] = random(rows, columns, dtype=dtype)
    weights = [random(size, columns, dtype=dtype, scale=columns**-0.5) for size in sizes]
    arguments = {
        "biases": [random(size, dtype=dtype) for size in sizes] if bias else [],
        "residual": random(rows, sizes[0] if gated else sum(sizes), dtype=dtype) if residual else None,
        "norm": random(columns, dtype=dtype) if norm else None,
        "eps": 1e-5,
        "gated": gated,
    }
    x = padded[:, :columns]
    exact = {name: [t.double() for t in value] if isinstance(value, list) else value.double()
             if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}  # fmt: skip
    right = reference(x.double(), [weight.double() for weight in weights], **exact)
    for _ in range(2):  # the first launch left its counters at zero
        result = linear(x, weights, **arguments, tuning=tuning)
        error = (result.double() - right).norm() / right.norm()
        assert result.dtype == dtype
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
def test_rows_and_dtypes(rows, dtype):
    check(rows, (96,), 256, dtype=dtype)
    check(rows, (64, 32, 32), 128, dtype=dtype, bias=True)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("sizes", "columns"), [((1,), 16), ((63,), 60), ((70, 1, 17), 200), ((33, 40), 136)])
def test_odd_sizes(rows, sizes, columns):
    check(rows, sizes, columns, bias=True, residual=True)
    check(rows, sizes, columns, norm=True)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("columns", [128, 176])
def test_gated(rows, columns):
    check(rows, (50, 50), columns, bias=True, norm=True, gated=True)
    check(rows, (64, 64), columns, gated=True, residual=True)


@pytest.mark.parametrize("rows", [17, 36, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(rows, dtype):
    check(rows, (70, 1, 17), 200, dtype=dtype, bias=True, norm=True)
    check(rows, (63,), 332, dtype=dtype, bias=True, residual=True)
    check(rows, (50, 50), 176, dtype=dtype, bias=True, norm=True, gated=True)
    check(rows, (64, 64), 128, dtype=dtype, gated=True, residual=True)


@pytest.mark.parametrize("tuning", [
    LinearTuning(64, 64, 3, 4, 4, 16, PREFETCH), LinearTuning(128, 64, 4, 8, 4, 16, PREFETCH),
    LinearTuning(64, 128, 1, 4, 3, 16),
])  # fmt: skip
@pytest.mark.parametrize("rows", [17, 36])
def test_every_way_of_cutting_many_rows(rows, tuning):
    """Columns of partial results that pad the rows are neither written nor read."""
    dtype = torch.bfloat16 if GPU else torch.float32
    check(rows, (130, 32), 768, tuning, dtype, bias=True, norm=True)
    check(rows, (63,), 712, tuning, dtype, bias=True, residual=True, norm=True)


@pytest.mark.parametrize("tuning", [
    LinearTuning(16, 32, 1, 2, 1, 0), LinearTuning(32, 64, 3, 4, 2, 0, PREFETCH), LinearTuning(16, 128, 4, 4, 3, 8),
    LinearTuning(64, 32, 5, 4, 4, 16, PREFETCH), LinearTuning(128, 64, 2, 8, 2, 8, PREFETCH),
])  # fmt: skip
def test_every_way_of_cutting_the_work(tuning):
    dtype = torch.bfloat16 if GPU else torch.float32
    check(1, (96, 32), 640, tuning, dtype, bias=True, norm=True)
    if tuning.dot:
        check(7, (64, 48), 640, tuning, dtype, residual=True, norm=True)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("sizes", "columns"), [((63,), 80), ((64, 32, 17), 256), ((48, 48), 144)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_in_8_bits(rows, sizes, columns, dtype):
    """Every row of a weight has a scale of its own, and they lie far from each other."""
    gated = len(sizes) == 2
    wide = [random(size, columns, scale=columns**-0.5) * 10 ** random(size, 1, scale=0.5) for size in sizes]
    weights, scales = map(list, zip(*map(quantize, wide), strict=True))
    biases, norm = [random(size, dtype=dtype) for size in sizes], random(columns, dtype=dtype)
    residual = random(rows, sizes[0] if gated else sum(sizes), dtype=dtype)
    x = random(rows, columns, dtype=dtype)
    exact = [weight.double() * scale[:, None] for weight, scale in zip(weights, scales, strict=True)]
    for more in ({"norm": norm, "eps": 1e-5}, {"biases": biases, "residual": residual}):
        doubled = {
            name: [one.double() for one in value] if isinstance(value, list) else
            value.double() if isinstance(value, torch.Tensor) else value for name, value in more.items()
        }  # fmt: skip
        right = reference(x.double(), exact, gated=gated, **doubled)
        result = linear(x, weights, gated=gated, scales=scales, **more)
        assert result.dtype == dtype
        assert (result.double() - right).norm() / right.norm() < TOLERANCE[dtype]
        by_definition = reference(x, weights, gated=gated, scales=scales, **more)
        assert (by_definition.double() - right).norm() / right.norm() < 2 * TOLERANCE[dtype]


def test_splits_need_no_atomic_sums():
    """The same bits every time."""
    x, weight = random(4, 4096), random(64, 4096)
    results = [linear(x, [weight], tuning=LinearTuning(16, 64, 8, 4, 2)) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bad_input_is_named():
    x, weight = random(2, 32), random(8, 32)
    with pytest.raises(ValueError, match="rows"):
        linear(random(65, 32), [weight])
    with pytest.raises(ValueError, match="1 to 16 rows"):
        linear(random(17, 32), [weight.to(torch.float8_e4m3fn)], scales=[torch.ones(8, device=DEVICE)])
    with pytest.raises(ValueError, match="weights"):
        linear(x, [weight], gated=True)
    with pytest.raises(ValueError, match="contiguous"):
        linear(x, [random(32, 8).T])
    with pytest.raises(ValueError, match="float16"):
        linear(x, [weight.half()])
    with pytest.raises(ValueError, match="residual"):
        linear(x, [weight], residual=x)
    with pytest.raises(ValueError, match="norm"):
        linear(x, [weight], norm=weight)
    with pytest.raises(ValueError, match="scales"):
        linear(x, [weight.to(torch.float8_e4m3fn)], scales=[torch.ones(7, device=DEVICE)])
    with pytest.raises(ValueError, match="float32"):
        linear(x, [weight], scales=[torch.ones(8, device=DEVICE)])
    with pytest.raises(ValueError, match="biases"):
        linear(x, [weight], [x[0]])


def test_launches_fill_the_gpu_once():
    for rows in (1, 2, 8, 24, 36):
        for sizes, columns in (((4096, 1024, 1024), 4096), ((4096,), 4096), ((4096,), 14336)):
            tuning = default_tuning(rows, sizes, columns, torch.bfloat16, False)
            programs = sum(-(-size // tuning.rows) for size in sizes) * tuning.splits
            assert 200 <= programs <= 600


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 18, 36, 64])
def test_llama_shapes_in_a_cuda_graph(rows):
    """A chain of early starts: every launch reads what the one before it wrote."""
    qkv = [random(size, 1024, dtype=torch.bfloat16, scale=1 / 32) for size in (1024, 256, 256)]
    o, norm = random(1024, 1024, dtype=torch.bfloat16, scale=1 / 32), random(1024, dtype=torch.bfloat16)
    gate, up = (random(3584, 1024, dtype=torch.bfloat16, scale=1 / 32) for _ in range(2))
    down = random(1024, 3584, dtype=torch.bfloat16, scale=1 / 60)

    def layer(run, h):
        h = run(run(h, qkv, norm=norm, eps=1e-5)[..., :1024], [o], residual=h)
        return run(run(h, [gate, up], norm=norm, eps=1e-5, gated=True), [down], residual=h)

    def chain(run, h):
        for _ in range(4):
            h = layer(run, h)
        return h

    x = random(rows, 1, 1024, dtype=torch.bfloat16)
    chain(linear, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(linear, x)
    for _ in range(5):
        x.copy_(random(rows, 1, 1024, dtype=torch.bfloat16))
        graph.replay()
        right = chain(reference, x)
        assert (result.float() - right.float()).norm() / right.float().norm() < 3e-2
