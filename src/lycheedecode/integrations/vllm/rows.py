"""Which rows of a batch do what, counted at every step in Python's numbers: for few rows, tensors cost more."""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import NamedTuple

from .parts import CommonAttentionMetadata


class Rows(NamedTuple):
    """Counts of a step.

    Attributes:
        decoding: how many sequences decode, the first of the batch; padding of a CUDA graph counts.
        tokens: how many of these have a token: all but the padding.
        single: how many sequences get a single token, the first of the batch without padding; in a CUDA graph all of
            them are hybrid.
    """

    decoding: int
    tokens: int
    single: int

    @classmethod
    def of(cls, common: CommonAttentionMetadata) -> Rows:
        """Count them; none decodes where attention is not simply causal."""
        tokens = tokens_of(common)
        single = len(list(takewhile(lambda count: count == 1, tokens)))
        if not is_causal(common):
            return cls(0, 0, single)
        decoding = len(list(takewhile(lambda count: count < 2, tokens)))
        prefilling = [] if common.is_prefilling is None else common.is_prefilling.tolist()
        if True in prefilling:
            decoding = min(decoding, prefilling.index(True))
        return cls(decoding, sum(tokens[:decoding]), single)


def tokens_of(common: CommonAttentionMetadata) -> list[int]:
    """Tokens of each sequence; padding has none."""
    starts = common.query_start_loc_cpu.tolist()
    return [end - begin for begin, end in pairwise(starts[: common.num_reqs + 1])]


def is_causal(common: CommonAttentionMetadata) -> bool:
    """Whether attention is simply causal."""
    return common.causal is True and common.mm_req_doc_ranges is None
