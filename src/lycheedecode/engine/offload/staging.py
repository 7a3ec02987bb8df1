"""How a prompt passes when its cache lies in host memory: two buffers on the device, which layers take in turn.

    layer i        attends over buffer 0        | its new tokens: buffer 0 -> host memory
    layer i + 1    its earlier tokens: host memory -> buffer 1

The copies run in the background. A layer waits only for its own earlier tokens, which were copied while the layer
before it ran.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.fetch import Tokens
from .lane import Lane, Mark

BUFFERS = 2


class Staging:
    """Buffers for the layers of one cache, `[2, B, Hkv, capacity, D]` each.

    Args:
        source: keys and values of all layers, `[L, B, Hkv, capacity, D]`.
        device: of the buffers.
    """

    def __init__(self, source: Tokens, device: torch.device) -> None:
        self._source, self._lane = source, Lane(device)
        shape = (2, *source.keys.shape[1:])
        with torch.inference_mode(False):
            self._buffers = [torch.empty(shape, dtype=source.keys.dtype, device=device) for _ in range(BUFFERS)]
        self._turn = 0
        self._ahead: tuple[int, int, Mark] | None = None

    def append(self, layer: int, begin: int, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, T, D]` of a layer from slot `begin` on; returns all of its tokens so far.

        They stay valid until the layer after next appends.
        """
        buffer, end = self._buffers[self._turn], begin + states[0].shape[2]
        if self._ahead is None or self._ahead[:2] != (layer, begin):
            self._ahead = layer, begin, self._lane.run(lambda: self._copy(layer, buffer, 0, begin, out=False))
        self._lane.wait(self._ahead[2])
        for part, new in zip(buffer, states, strict=True):
            part[:, :, begin:end] = new
        self._turn = (self._turn + 1) % BUFFERS
        other = self._buffers[self._turn]  # what it held before was attended over by now
        following = (layer + 1) % len(self._source.keys)
        earlier = begin if following else end

        def copies() -> None:
            self._copy(layer, buffer, begin, end, out=True)
            self._copy(following, other, 0, earlier, out=False)

        self._ahead = following, earlier, self._lane.run(copies)
        keys, values = buffer[:, :, :, :end]
        return keys, values

    def finish(self) -> None:
        """Let the current stream wait for all copies."""
        if self._ahead is not None:
            self._lane.wait(self._ahead[2])
            self._ahead = None

    def _copy(self, layer: int, buffer: Tensor, begin: int, end: int, out: bool) -> None:
        """Copy slots `begin` to `end - 1` of a layer, out to host memory or in from there.

        It copies a head of a sequence at a time, because contiguous pieces do not make the host wait.
        """
        if begin == end:
            return
        for near, whole in zip(buffer, self._source, strict=True):
            for b in range(near.shape[0]):
                for head in range(near.shape[1]):
                    pair = whole[layer, b, head, begin:end], near[b, head, begin:end]
                    target, given = pair if out else pair[::-1]
                    target.copy_(given, non_blocking=True)
