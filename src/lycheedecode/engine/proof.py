"""The engine proves itself on a model: with full attention it gives the plain model's logits, or it refuses the model.

Otherwise an unusual model would be wrong without a sign: two attentions in a layer, layers that share keys or run in
cycles, masks or positions of its own. So a few random tokens pass through the model as it is, and through the engine's
prefill (a padded batch, in two chunks) and decode steps, which have to agree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..attention import FullAttention
from ..errors import LycheeError, first_line
from ..models.routing import AttentionRoute, Window
from ..models.shape import ModelError, ModelShape, inner_model, text_config
from . import prefill
from .cache import KVCache
from .context import Context
from .decoder import Decoder

_FIRST, _SECOND, _STEPS = 6, 4, 2
"""Tokens of two chunks of a prompt, and decode steps after it."""
_SHORTER = 2
"""Tokens by which the second sequence is shorter, and padded."""
_MARGIN = 1.7
"""Tolerance in square roots of the rounding error, for differences as a share of the logits' spread: sums in another
order stay within it. Models that are wrong differ by 10 to 100 times as much in float32."""

_proved: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""Models that passed, and their state then. It only saves time: the verdict depends on the model alone."""


def prove(model: nn.Module, shape: ModelShape, windows: Sequence[Window]) -> None:
    """Raise `ModelError`, in one sentence, unless the engine reproduces the model's logits.

    Args:
        model: in eval mode; it is left as it was, and so are all random number generators.
        shape, windows: of the model.
    """
    if inner_model(model).training:
        raise ModelError(f"{shape.architecture} is in training mode, where dropout is random; call model.eval() first.")
    parameter = next(model.parameters())
    state = parameter.dtype, parameter.device, sum(1 for _ in model.modules())
    if state in _proved.get(model, ()):
        return
    tokens = _random_tokens(model)
    with torch.inference_mode():
        expected = _as_it_is(model, shape, tokens)
        if not expected.isfinite().any():
            return  # a broken model, which says so when it generates
        try:
            found = _by_engine(model, shape, windows, tokens)
        except (LycheeError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model that is not like others may stumble over
            raise ModelError(
                f"Engine cannot run {shape.architecture} ({type(error).__name__}: {first_line(error)})."
            ) from error
    limit = _MARGIN * _rounding(model) ** 0.5
    for phase, (begin, end) in _PHASES.items():
        distance = _error(found, expected, begin, end)
        if not distance <= limit:  # NaN is no agreement either
            raise ModelError(
                f"Engine does not reproduce {shape.architecture}: the logits of {phase} differ by {distance:.2g} of "
                f"their spread, where rounding explains {limit:.1g}; check=False runs it anyway."
            )
    _proved.setdefault(model, set()).add(state)


_PHASES = {
    "a prompt": (0, _FIRST),
    "a prompt's second chunk": (_FIRST, _FIRST + _SECOND),
    "decode steps": (_FIRST + _SECOND, _FIRST + _SECOND + _STEPS),
}


def _random_tokens(model: nn.Module) -> Tensor:
    """int64 `[2, S]`, none of them special to the model (placeholders of images, say)."""
    inner = inner_model(model)
    table, config = inner.get_input_embeddings().weight, text_config(inner)
    size = min(table.shape[0], int(getattr(config, "vocab_size", None) or table.shape[0]))
    special = torch.tensor(sorted(_special_ids(inner.config.to_dict())), dtype=torch.int64)
    ordinary = torch.arange(size)[~torch.isin(torch.arange(size), special)]
    generator = torch.Generator().manual_seed(0)
    total = _FIRST + _SECOND + _STEPS
    return ordinary[torch.randint(len(ordinary), (2, total), generator=generator)].to(table.device)


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids({key: inner for key, inner in value.items() if isinstance(key, str)})
        elif name.endswith(("token_id", "token_index")):
            found |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return found


def _as_it_is(model: nn.Module, shape: ModelShape, tokens: Tensor) -> Tensor:
    """Logits float32 `[2, S, V]` after every token, by one pass through the model as it is."""
    try:
        with AttentionRoute(model, None, brief=True):
            return model(input_ids=tokens, use_cache=False).logits.float()
    except (LycheeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{shape.architecture} cannot read plain tokens ({type(error).__name__}: {first_line(error)})."
        ) from error


def _by_engine(model: nn.Module, shape: ModelShape, windows: Sequence[Window], tokens: Tensor) -> Tensor:
    """The same by the engine, where the second sequence begins `_SHORTER` slots later, after padding."""
    prompt, padding = _FIRST + _SECOND, [0, _SHORTER]
    slots = torch.stack([tokens[0], tokens[1].roll(_SHORTER)])
    cache = KVCache(shape.num_layers, torch.tensor(padding, dtype=torch.int32, device=tokens.device))
    chunk, route = prefill.ChunkAttention(windows, padding), prefill.route(model)
    logits = [
        prefill.read_chunk(model, route, chunk, cache, part, keep=part.shape[1])
        for part in slots[:, :prompt].split([_FIRST, _SECOND], 1)
    ]
    for layer in shape.global_layers:
        shape.check_heads(layer, cache.layers[layer].store[0].shape[1])
    full = FullAttention(len(shape.global_layers), shape.num_kv_heads)
    decoder = Decoder(model, full, windows, "eager")
    counted = torch.zeros(2, dtype=torch.float64, device=tokens.device)
    context = Context(cache, logits[-1][:, -1], [prompt, prompt - _SHORTER], 0.0, counted)
    logits += [decoder.logits(context, token_ids)[:, None] for token_ids in slots[:, prompt:].unbind(1)]
    return torch.cat(logits, 1)


def _error(found: Tensor, expected: Tensor, begin: int, end: int) -> float:
    """How far logits in slots from `begin` to `end` are apart, as a share of their spread.

    The median over the tokens of a sequence, as rounding may send single tokens to another expert; the larger of two.
    """
    first = found[0, begin:end], expected[0, begin:end]
    skipped = max(begin, _SHORTER)
    second = found[1, skipped:end], expected[1, skipped - _SHORTER : end - _SHORTER]
    return max(
        float(((one - other).square().mean(-1) / other.var(-1)).sqrt().median()) for one, other in (first, second)
    )


def _rounding(model: nn.Module) -> float:
    """Relative error of the numbers that the model computes with."""
    table = inner_model(model).get_input_embeddings().weight
    device = table.device.type
    dtypes = {torch.float32, table.dtype}
    if torch.is_autocast_enabled(device):  # in the model's own pass; there is none inside the engine's
        dtypes.add(torch.get_autocast_dtype(device))
    errors = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
    precision = torch.get_float32_matmul_precision()
    if precision != "highest" or (device == "cuda" and torch.backends.cuda.matmul.allow_tf32):
        errors.append(2**-8 if precision == "medium" else 2**-10)
    return max(errors)
