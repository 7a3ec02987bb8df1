"""Block scores -> selections, written straight into the persistent buffers; one program a row and sequence.

    keys       the bits of a score that is not negative, read as an integer, rank like the score;
               blocks that are always selected get the largest key, absent ones the least
    wanted     how many blocks: from the strategy and the capacity of the buffers
    search     cut an interval of keys, at first that from the worst lane's best one to the best of all, in four until
               exactly `wanted` keys reach a cut, or it is one key: then the earlier ones of the blocks with it win
    write      the selected blocks, in an order that means nothing, then -1; and how many there are of each chunk

    row        | lanes | lanes | .. | lanes | lan     `EACH` vectors of keys, a power of two, and one more: contexts
                                                      are often a power of two, and a few tokens longer

Every step of the search counts over the whole row; a row too long for the registers is read again each time. A step
takes as long as the threads take to meet, not as they take to count: hence three cuts at a time, and one sum. Nothing
depends on the order in which threads run, and nothing travels to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import PARTS
from .. import kernel_common as common
from ..kernel_common import Tuning
from ..types import KV, Selections, Shares, constant
from .rule import Rule

IN_REGISTERS = 64
"""Most keys of a row that a thread holds, and one more."""

_READ_AGAIN = 16  # keys of a longer row that it reads at once
_REGISTERS = 96  # of a thread: what starts early beside it needs its share of a processor

_FORCED = tl.constexpr(0x7FFFFFFF)
_PARTS = tl.constexpr(PARTS)
_LARGEST = tl.constexpr(0x7F800000)  # of a score
_ABSENT = tl.constexpr(-1)
_LANE_BITS = tl.constexpr(10)  # of each of a lane's three counts in a chunk: it has at most `IN_REGISTERS + 1` keys
_LOW_LANE_BITS = tl.constexpr((1 << 10) - 1)
_TWO_CUTS = tl.constexpr(1 | 1 << 10)  # what a key adds to them
_THREE_CUTS = tl.constexpr(1 | 1 << 10 | 1 << 20)


@triton.jit
def _vector(rest, EACH: tl.constexpr):
    """Vectors of a chunk: `[EACH, 1]`, or the `[1, 1]` after them."""
    v = tl.arange(EACH, EACH + 1) if rest else tl.arange(0, EACH)
    return v[:, None]


@triton.jit
def _before(end, c, rest, LANES: tl.constexpr, EACH: tl.constexpr):
    """Which blocks of chunk `c` come before block `end`: `[EACH, LANES]`, or `[1, LANES]`.

    What is compared is a vector's number, a constant in a compiled kernel; an index would take a register a block.
    """
    vectors = (end + LANES - 1 - tl.arange(0, LANES)) // LANES
    return _vector(rest, EACH) < (vectors - c * (EACH + 1))[None, :]


@triton.jit
def _chunks(row, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr):
    """Into how many chunks a row falls."""
    return 1 if HELD else tl.cdiv(row[4], LANES * (EACH + 1))


@triton.jit
def _scores(scores, c, rest, mask, LANES: tl.constexpr, EACH: tl.constexpr):
    """Scores of chunk `c`, 0 for those that are not positive or outside `mask`."""
    at = (scores + c * (EACH + 1) * LANES + tl.arange(0, LANES))[None, :] + _vector(rest, EACH) * LANES
    return tl.maximum(tl.load(at, mask=mask, other=0.0), 0.0)


@triton.jit
def _rank(row, c, rest, LANES: tl.constexpr, EACH: tl.constexpr):
    """Keys of chunk `c`: integers that rank blocks as the contract does."""
    scores, N, sinks, recent, exist = row
    score = _scores(scores, c, rest, _before(N, c, rest, LANES, EACH), LANES, EACH)
    key = tl.where(_before(recent, c, rest, LANES, EACH), score.to(tl.int32, bitcast=True), _FORCED)
    key = tl.where(_before(sinks, c, rest, LANES, EACH), _FORCED, key)
    return tl.where(_before(exist, c, rest, LANES, EACH), key, _ABSENT)


@triton.jit
def _read(row, c, LANES: tl.constexpr, EACH: tl.constexpr):
    """Keys of a chunk of the row, in two parts."""
    return _rank(row, c, False, LANES, EACH), _rank(row, c, True, LANES, EACH)


@triton.jit
def _add(many, rest):
    """Of each lane: the sum of what it has in both parts."""
    return tl.sum(many.to(tl.int32), 0) + tl.sum(rest.to(tl.int32), 0)


@triton.jit
def _reach(keys, one, two, three):
    """Of each lane: how many keys are at least `one`, at least `two`, at least `three`; packed."""
    cuts = tl.where(keys >= two, _TWO_CUTS, tl.where(keys >= one, 1, 0))
    return tl.sum(tl.where(keys >= three, _THREE_CUTS, cuts), 0)


@triton.jit
def _count(one, two, three, keys, row, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr):
    """How many keys are at least `one`, at least `two`, at least `three`, which ascend."""
    counts = tl.zeros([LANES, 2, 2], tl.int32)
    for c in range(_chunks(row, LANES, EACH, HELD)):
        many, rest = keys if HELD else _read(row, c, LANES, EACH)
        lane = _reach(many, one, two, three) + _reach(rest, one, two, three)
        of_two = (lane >> _LANE_BITS) & _LOW_LANE_BITS
        of_one_and_two = tl.join(lane & _LOW_LANE_BITS, of_two)
        counts += tl.join(of_one_and_two, tl.join(lane >> 2 * _LANE_BITS, of_two))
    of_one_and_two, of_three_and_two = tl.split(tl.sum(counts, 0))
    of_one, of_two = tl.split(of_one_and_two)
    of_three, _ = tl.split(of_three_and_two)
    return of_one, of_two, of_three


@triton.jit
def _count_equal(key, end, keys, row, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr):
    """How many blocks before `end` have this key."""
    found = tl.zeros([LANES], tl.int32)
    for c in range(_chunks(row, LANES, EACH, HELD)):
        many, rest = keys if HELD else _read(row, c, LANES, EACH)
        early, early_rest = _before(end, c, False, LANES, EACH), _before(end, c, True, LANES, EACH)
        found += _add((many == key) & early, (rest == key) & early_rest)
    return tl.sum(found, 0)


@triton.jit
def _score(key, least):
    """Scores of the keys that are at least `least`; 0 of the others, and of blocks that are always selected."""
    return tl.where((key >= least) & (key < _FORCED), key, 0).to(tl.float32, bitcast=True)


@triton.jit
def _mass(least, keys, row, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr):
    """Scores of the blocks whose keys are at least `least`, but for those always selected, added up."""
    found = tl.zeros([LANES], tl.float32)
    for c in range(_chunks(row, LANES, EACH, HELD)):
        many, rest = keys if HELD else _read(row, c, LANES, EACH)
        found += tl.sum(_score(many, least), 0) + tl.sum(_score(rest, least), 0)
    return tl.sum(found, 0)


@triton.jit
def _forced_mass(row, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr):
    """Scores of the blocks that are always selected, added up."""
    scores, N, sinks, recent, exist = row
    found = tl.zeros([LANES], tl.float32)
    for c in range(_chunks(row, LANES, EACH, HELD)):
        for rest in tl.static_range(2):
            after = _before(recent, c, rest == 1, LANES, EACH) == 0
            forced = (_before(sinks, c, rest == 1, LANES, EACH) | after) & _before(exist, c, rest == 1, LANES, EACH)
            mask = forced & _before(N, c, rest == 1, LANES, EACH)
            found += tl.sum(_scores(scores, c, rest == 1, mask, LANES, EACH), 0)
    return tl.sum(found, 0)


@triton.jit
def _blocks_of_mass(amount, forced, keys, row, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr):
    """Fewest blocks, best first after the forced ones, that hold the mass `amount`."""
    amount -= _forced_mass(row, LANES, EACH, HELD)
    wanted = row[4]
    if amount <= 0:
        wanted = forced
    elif _mass(0, keys, row, LANES, EACH, HELD) >= amount:
        low, high = 0, _LARGEST
        while low < high:  # the largest key such that the keys from it on hold enough
            middle = low + (high - low + 1) // 2
            enough = _mass(middle, keys, row, LANES, EACH, HELD) >= amount
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        reach, above, _ = _count(low, low + 1, _FORCED, keys, row, LANES, EACH, HELD)
        missing = amount - _mass(low + 1, keys, row, LANES, EACH, HELD)
        as_float = low.to(tl.float32, bitcast=True)  # type: ignore[attr-defined]  # in a kernel, numbers are tensors
        ties = tl.ceil(missing / tl.maximum(as_float, 1e-38))
        wanted = above + tl.minimum(tl.maximum(ties, 1.0), (reach - above).to(tl.float32)).to(tl.int32)
    return wanted


@triton.jit
def _interval(more, keys, LANES: tl.constexpr):
    """Keys between which the `more`-th best score lies: each lane has a key that is not below the worst lane's best."""
    many, rest = keys
    many, rest = tl.where(many == _FORCED, _ABSENT, many), tl.where(rest == _FORCED, _ABSENT, rest)
    best = tl.maximum(tl.max(many, 0), tl.max(rest, 0))
    high, low = tl.split(tl.max(tl.join(best, -best), 0))
    return tl.where(more <= LANES, tl.maximum(-low, 0), 0), high


@triton.jit
def _search(wanted, forced, keys, row, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr):
    """Where the selection ends: larger keys are selected, and blocks before `end` that have the key `low`."""
    exist = row[4]
    low, high, above, reach = 0, _LARGEST, forced, exist
    if wanted <= forced:
        low, high, above, reach = _FORCED, _FORCED, 0, forced
    elif wanted == exist:
        high = low
    elif HELD:
        low, high = _interval(wanted - forced, keys, LANES)
    while low < high:  # `above` keys are larger than `high`; at most `reach` are at least `low`, no fewer than wanted
        quarter = (high - low) // 4 + 1
        one, two, three = low + quarter, tl.minimum(low + 2 * quarter, high), tl.minimum(low + 3 * quarter, high)
        of_one, of_two, of_three = _count(one, two, three, keys, row, LANES, EACH, HELD)
        if of_three >= wanted:
            low, reach = three, of_three
        elif of_two >= wanted:
            low, high, reach, above = two, three - 1, of_two, of_three
        elif of_one >= wanted:
            low, high, reach, above = one, two - 1, of_one, of_two
        else:
            high, above = one - 1, of_one
        high = tl.where(reach == wanted, low, high)
    end = exist
    if reach > wanted:  # the earliest ones of those that are equal
        first = 0
        while first < end:
            middle = (first + end) // 2
            enough = _count_equal(low, middle, keys, row, LANES, EACH, HELD) >= wanted - above
            end = tl.where(enough, middle, end)
            first = tl.where(enough, first, middle + 1)
    return low, end


@triton.jit
def _count_taken(taken, C, least, blocks, chosen, PER: tl.constexpr, LANES: tl.constexpr):
    """Store how many of the `chosen` blocks, which this program has just written, lie in each of `C` chunks,
    and `least` more."""
    lane = tl.arange(0, LANES)
    for c in range(0, C, LANES):
        tl.store(taken + c + lane, lane * 0 + least, mask=c + lane < C)
    tl.debug_barrier()
    for k in range(0, chosen, LANES):
        here = k + lane < chosen
        chunk = tl.load(blocks + k + lane, mask=here, other=0) // PER
        tl.atomic_add(taken + chunk, lane * 0 + 1, mask=here & (chunk < C), sem="relaxed")


@triton.jit
def _write(blocks, low, end, keys, row, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr):
    """Store the selected blocks of a row; each lane those it has, one after another."""
    before = 0
    for c in range(_chunks(row, LANES, EACH, HELD)):
        many, rest = keys if HELD else _read(row, c, LANES, EACH)
        chosen = (many > low) | ((many == low) & _before(end, c, False, LANES, EACH))
        chosen_rest = (rest > low) | ((rest == low) & _before(end, c, True, LANES, EACH))
        mine = _add(chosen, chosen_rest)
        at = before + tl.cumsum(mine, 0) - mine
        at_each = at[None, :] + tl.cumsum(chosen.to(tl.int32), 0) - 1
        lane = (c * (EACH + 1) * LANES + tl.arange(0, LANES))[None, :]
        n, n_rest = _vector(False, EACH) * LANES + lane, _vector(True, EACH) * LANES + lane
        # Flat: there is but one order then for threads to store in; in two dimensions Triton may turn the keys round.
        flat: tl.constexpr = LANES * EACH
        tl.store(blocks + at_each.reshape(flat), n.reshape(flat), mask=chosen.reshape(flat))
        tl.store(blocks + (at + tl.sum(chosen.to(tl.int32), 0))[None, :], n_rest, mask=chosen_rest)
        if not HELD:
            before += tl.sum(mine, 0)


@triton.jit
def _choose(
    blocks, row, forced, wanted, amount,
    STRATEGY: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Write the best blocks of a row, at most `wanted`, and return how many."""
    keys = _read(row, 0, LANES, EACH)
    if STRATEGY == "threshold":
        least = tl.full((), amount, tl.float32).to(tl.int32, bitcast=True)
        wanted = tl.minimum(wanted, _count(least, least, least, keys, row, LANES, EACH, HELD)[0])
    elif STRATEGY == "top_p":
        wanted = tl.minimum(wanted, _blocks_of_mass(amount, forced, keys, row, LANES, EACH, HELD))
    low, end = _search(wanted, forced, keys, row, LANES, EACH, HELD)
    _write(blocks, low, end, keys, row, LANES, EACH, HELD)
    return wanted


@triton.jit
def _share(exist, r, b, shares, limits):
    """Most blocks of a row that has a share of the budget, and whether its sequence gets everything."""
    R = tl.num_programs(0)
    budget = tl.load(shares + 2 * R) if limits is None else tl.load(limits + b)
    everything = budget < 0
    share = tl.cdiv(tl.load(shares + R + r).to(tl.int64) * budget, _PARTS)
    share = tl.maximum(tl.minimum(share, exist).to(tl.int32), tl.load(shares + 2 * R + 1))
    share = tl.where(exist <= budget, exist, share)
    return tl.where(everything, 0, share), everything


@triton.jit(do_not_specialize=["slots", "N", "num_blocks", "K", "C"])
def _select_kernel(
    blocks, counts, stride_blocks_r, stride_blocks_b, stride_counts_r, stride_counts_b,
    taken, stride_taken_r, stride_taken_b, C, scores, lengths, starts, slots, N, num_blocks, K, limits, shares, amount,
    STRATEGY: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, LOOKAHEAD: tl.constexpr, BLOCK: tl.constexpr,
    PER: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(0), tl.program_id(1)
    common.wait_for_inputs(PDL)
    _first, count = common.extent(b, lengths, starts, slots)
    exist = tl.where(count > 0, tl.minimum(tl.cdiv(count + LOOKAHEAD, BLOCK), num_blocks), 0)
    sinks = tl.minimum((SINK + BLOCK - 1) // BLOCK, exist)  # the blocks before it are always selected ..
    recent = tl.maximum(tl.minimum(tl.maximum(count - RECENT, 0) // BLOCK, exist), sinks)  # .. and those from it on
    blocks += r.to(tl.int64) * stride_blocks_r + b.to(tl.int64) * stride_blocks_b
    head = r
    if shares is not None:
        head = tl.load(shares + r)
    scores += (head * tl.num_programs(1) + b).to(tl.int64) * N
    forced = sinks + exist - recent
    wanted = tl.minimum(exist, K)
    everything = wanted < 0  # never
    if shares is not None:
        share, everything = _share(exist, r, b, shares, limits)
        wanted = tl.minimum(wanted, share)
    elif limits is not None:
        limit = tl.load(limits + b)
        everything = limit < 0
        wanted = tl.minimum(wanted, tl.maximum(limit, 0))
    if STRATEGY == "ratio":
        share = tl.ceil(amount * exist.to(tl.float32)).to(tl.int32)
        wanted = tl.minimum(wanted, tl.maximum(share, forced))
    k = tl.arange(0, WIDTH)
    if ((STRATEGY == "top_k") & (wanted == exist)) | everything:  # whatever the scores are
        tl.store(blocks + k, k, mask=k < wanted)
    else:
        row = (scores, N, sinks, recent, exist)
        wanted = _choose(blocks, row, forced, wanted, amount, STRATEGY, LANES, EACH, HELD)
    tl.store(counts + r * stride_counts_r + b * stride_counts_b, tl.where(everything, -1, wanted))
    tl.store(blocks + k, k * 0 - 1, mask=(k >= wanted) & (k < K))
    if taken is not None:
        taken += r.to(tl.int64) * stride_taken_r + b.to(tl.int64) * stride_taken_b
        _count_taken(taken, C, tl.where(everything, PER, 0), blocks, wanted, PER, LANES)


def select_blocks(
    scores: Tensor,
    kv: KV,
    rule: Rule,
    out: Selections,
    tuning: Tuning | None = None,
    limits: Tensor | None = None,
    shares: Shares | None = None,
) -> None:
    """See `ops.select_blocks`."""
    check_selections(out, (num_rows(len(scores), shares), scores.shape[1]))
    if scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32, not {scores.dtype}.")
    scores = scores.contiguous()
    num_blocks = max(scores.shape[2], rule.num_blocks(kv.slots))
    tuning = tuning or default_tuning(num_blocks, scores.device)
    each = common.power_of_two(triton.cdiv(num_blocks, tuning.tile) - 1)
    blocks, counts, taken = out
    with common.on_device(scores):
        _select_kernel[blocks.shape[:2]](
            *(blocks, counts, *blocks.stride()[:2], *counts.stride()),
            *((None, 0, 0, 0) if taken is None else (taken, *taken.stride()[:2], taken.shape[2])),
            scores,
            *(kv.lengths, kv.starts, kv.slots, scores.shape[2], num_blocks, blocks.shape[2], limits),
            *(None if shares is None else constant(shares.numbers, torch.int32, scores.device), rule.amount),
            **rule.constants,
            PER=rule.chunk_tokens // rule.block_size,
            LANES=tuning.tile,
            EACH=each if each <= IN_REGISTERS else _READ_AGAIN,
            HELD=each <= IN_REGISTERS,
            WIDTH=common.power_of_two(max(blocks.shape[2], 1)),
            maxnreg=_REGISTERS if rule.strategy in ("top_k", "ratio") else None,  # others would spill
            **tuning.launch(kv),
        )


def num_rows(heads: int, shares: Shares | None) -> int:
    """Rows of the selections of so many heads."""
    return heads if shares is None else len(shares.heads)


def check_selections(out: Selections, shape: tuple[int, ...]) -> None:
    """Refuse buffers that do not fit `shape`, `[R, B]`."""
    blocks, counts, taken = out
    if blocks.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"out must be int32, not {blocks.dtype} and {counts.dtype}.")
    if tuple(blocks.shape[:2]) != tuple(shape) or counts.shape != blocks.shape[:2]:
        raise ValueError(f"out is {tuple(blocks.shape)} with counts {tuple(counts.shape)} for rows {tuple(shape)}.")
    if taken is not None and (taken.dtype != torch.int32 or taken.shape[:2] != counts.shape or taken.stride(2) != 1):
        raise ValueError(f"out.taken must be int32 {tuple(shape)} by chunks, not {taken.dtype} {tuple(taken.shape)}.")
    if blocks.stride(2) != 1:
        raise ValueError(f"out.blocks must have a contiguous last dimension, not strides {blocks.stride()}.")


def default_tuning(num_blocks: int, device: torch.device) -> Tuning:
    """What was fastest on an H100: few threads meet sooner than many. A tile is one key of each thread."""
    warps = min(max(common.power_of_two(triton.cdiv(num_blocks, 32 * (IN_REGISTERS + 1))), 4), 16)
    return Tuning(1, 32 * warps, warps, 1, common.has_pdl(device))
