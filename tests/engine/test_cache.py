"""The cache against transformers' own, and what grows, shrinks and moves in it."""

import resource
from pathlib import Path

import pytest
import tiny
import torch
from transformers import DynamicCache

from lycheedecode import Engine
from lycheedecode.engine import memory
from lycheedecode.engine.cache import ROOM, KVCache
from lycheedecode.engine.memory import CacheMemoryError
from lycheedecode.models.versions import cache_argument


def tokens(count, batch=2):
    return torch.randn(batch, 3, count, 8), torch.randn(batch, 3, count, 8)


def filled(count=10, layers=2, starts=None):
    cache = KVCache(layers, starts)
    pieces = [tokens(count) for _ in range(layers)]
    for layer, piece in enumerate(pieces):
        cache.update(*piece, layer)
    return cache, pieces


def test_update_returns_views_of_what_is_filled():
    cache, ((keys, values), _) = filled()
    more = tokens(1)
    seen = cache.update(*more, 0)
    torch.testing.assert_close(seen[0], torch.cat([keys, more[0]], 2))
    torch.testing.assert_close(seen[1], torch.cat([values, more[1]], 2))
    assert seen[0].data_ptr() == cache.layers[0].keys.data_ptr()
    assert cache.get_seq_length() == cache.length == 11


def test_cache_grows_in_place_until_it_is_full_and_by_half_then():
    cache, _ = filled(1)
    where = cache.layers[0].keys.data_ptr()
    for _ in range(ROOM - 1):
        cache.update(*tokens(1), 0)
    assert cache.layers[0].keys.data_ptr() == where
    before = cache.layers[0].keys.clone()
    cache.update(*tokens(1), 0)
    assert cache.layers[0].capacity == 2 * ROOM
    torch.testing.assert_close(cache.layers[0].keys[:, :, :-1], before)


def test_reserved_room_is_there_at_once():
    cache = KVCache(1)
    cache.reserve(3 * ROOM + 1)
    cache.update(*tokens(1), 0)
    assert cache.capacity == 4 * ROOM
    cache.reserve(10)
    assert cache.capacity == 4 * ROOM


MOST = 2**31 - 1
SAID = r"needs 4096\.0 GiB for 2 x 2147483\d\d\d (more )?tokens, but \d+\.\d GiB are free: up to \d+ tokens a sequence"


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 8}, {"plan": tiny.plan(), "config": tiny.config()}], ids=len)
def test_room_that_does_not_fit_is_one_sentence(llama, options):
    engine = Engine(llama, **options)
    with pytest.raises(CacheMemoryError, match=SAID):
        engine.prefill(tiny.prompts(20, 30), room=MOST)
    context = engine.prefill(tiny.prompts(20, 30))
    with pytest.raises(CacheMemoryError, match=SAID):
        engine.prefill(tiny.prompts(20, 30), room=MOST, context=context)
    with pytest.raises(CacheMemoryError, match=SAID):
        context.cache.reserve(MOST)
    assert context.cache.capacity == ROOM
    made = engine.generate(context, 8)
    assert [one.token_ids for one in made] == [one.token_ids for one in engine.generate(tiny.prompts(20, 30), 8)]


def test_what_is_said_to_fit_does(llama, monkeypatch):
    each = memory.slot_bytes(Engine(llama).shape, 2, torch.float32)
    monkeypatch.setattr(memory, "_free_host_bytes", lambda: 700 * each)
    with pytest.raises(CacheMemoryError, match=r"2 x 768 tokens, .* up to 512 tokens a sequence would fit"):
        Engine(llama).prefill(tiny.prompts(20, 30), room=512 - 30 + 1)
    context = Engine(llama).prefill(tiny.prompts(20, 30), room=512 - 30)
    assert context.cache.capacity == 512
    with pytest.raises(CacheMemoryError, match=r"2 x 768 more tokens, .* up to 512 tokens a sequence would fit"):
        context.cache.reserve(1280)
    context.cache.reserve(1024)
    assert context.cache.capacity == 1024


def test_an_allocator_that_refuses_is_one_sentence(llama, monkeypatch):
    """Under `ulimit -v`, and where the system does not say what is free."""
    monkeypatch.setattr(memory, "_free_host_bytes", lambda: 2**62)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**37, before[1]))  # else some systems give whatever is asked for
    try:
        with pytest.raises(CacheMemoryError, match=r"does not give 512\.0 GiB for the keys of 2 x 2147483904 tokens"):
            Engine(llama).prefill(tiny.prompts(20, 30), room=MOST)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_containers_limit_counts(monkeypatch):
    free = memory.free_bytes(torch.device("cpu"))
    assert 0 < free < 2**62
    monkeypatch.setattr(memory, "_container_left", lambda: 1000)
    assert memory.free_bytes(torch.device("cpu")) == 1000


def test_truncate_and_update_rewrite_a_range():
    cache, ((keys, _), _) = filled()
    cache.truncate(6)
    cache.update(*tokens(0), 1)
    again = tokens(4)
    seen, _ = cache.update(*again, 0)
    torch.testing.assert_close(seen, torch.cat([keys[:, :, :6], again[0]], 2))
    with pytest.raises(ValueError, match="cannot be cut to 11"):
        cache.truncate(11)


@pytest.mark.parametrize(("argument", "left"), [(-3, 7), (0, 10), (4, 4), (40, 10), (-40, 0)])
def test_crop_understands_both_of_its_meanings(argument, left):
    cache, _ = filled()
    cache.crop(argument)
    assert cache.length == left


def test_batch_changes_match_dynamic_cache():
    cache, pieces = filled(starts=torch.tensor([0, 3], dtype=torch.int32))
    other = DynamicCache()
    for layer, piece in enumerate(pieces):
        other.update(*piece, layer)
    for change in (
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.reorder_cache(torch.tensor([3, 0, 0, 1])),
        lambda c: c.batch_select_indices(torch.tensor([0, 2])),
    ):
        change(cache)
        change(other)
        for layer in range(2):
            torch.testing.assert_close(cache.layers[layer].keys, other.layers[layer].keys)
            torch.testing.assert_close(cache.layers[layer].values, other.layers[layer].values)
    assert cache.starts.tolist() == [3, 0]


def test_reset_empties_and_keeps_the_room():
    cache, _ = filled()
    cache.reset()
    assert (cache.length, cache.capacity) == (0, ROOM)


def test_generate_can_use_it():
    model = tiny.model("llama")
    batch = tiny.padded(tiny.prompts(20, 33))
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False)
    cache = KVCache(tiny.LAYERS)
    actual = model.generate(**batch, max_new_tokens=8, do_sample=False, **cache_argument(cache))
    torch.testing.assert_close(actual, expected)
    beams = model.generate(**batch, max_new_tokens=8, num_beams=3)
    own = model.generate(**batch, max_new_tokens=8, num_beams=3, **cache_argument(KVCache(tiny.LAYERS)))
    torch.testing.assert_close(own, beams)
