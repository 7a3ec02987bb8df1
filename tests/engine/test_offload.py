"""A cache in host memory: the tokens of a resident one, and what the store holds after anything may happen to it."""

import mmap
from functools import partial
from itertools import product
from math import nan

import pytest
import tiny
import torch
from covering import covering

from lycheedecode import Engine
from lycheedecode.engine.memory import CacheMemoryError
from lycheedecode.engine.offload import HostCache, HostMemoryError, pinned, staging
from lycheedecode.engine.offload import cache as host
from lycheedecode.engine.offload import store as module
from lycheedecode.engine.offload.choice import check_place, check_room
from lycheedecode.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:Without a GPU")
CASES = {
    "plain": {},
    "every third token selects": {"refresh_every": 3, "budget_tokens": 32},
    "every seventh": {"refresh_every": 7, "budget_tokens": 40},
    "completed": {"completion": "centroid", "completion_chunk": 8},
    "top-p": {"selection": "top_p", "top_p": 0.8},
    "a ratio": {"budget_tokens": None, "budget_ratio": 0.4},
    "8-bit keys": {"scan_keys": "float8"},
    "4-bit keys": {"scan_keys": "int4"},
    "blocks of one token": {"block_size": 1, "budget_tokens": 16},
}
batches = pytest.mark.parametrize("lengths", [(60,), (60, 37, 9)], ids=["one", "ragged batch"])


def engine_of(model, changes=None, family="llama", **options):
    return Engine(model, plan=tiny.plan_for(family), config=tiny.config(**(changes or {})), **options)


def decode(engine, context, answers):
    return torch.stack([engine.decode_one_token(context, ids) for ids in torch.tensor(answers).unbind(1)], 1)


def spoil(engine, context):
    """NaN wherever nothing may be read: host memory behind the last token, the whole store before its first fetch."""
    cache = context.cache
    for part in cache.tokens:
        part[:, :, :, cache.length :] = nan
    store = cache.state_for(engine.attention)[0].store
    for part in store.pool:
        part[:, :, :, : store.slots * store.block_size] = nan
    return context


def compare(one, two, answers, resident, offloaded):
    expected, found = decode(resident, one, answers), decode(offloaded, two, answers)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(two.kv_bytes, one.kv_bytes)


def check_store(context):
    """Blocks of the store and of the tail are those of the cache, which the pools bring up to date first."""
    cache = context.cache
    cache.state.write_back(cache.length)
    pinned.wait_for(cache.state.store.pool.keys.device)
    store, size = cache.state.store, cache.state.store.block_size
    starts = [0] * cache.batch if cache.starts is None else cache.starts.tolist()
    assert store.readers
    for row, readers in enumerate(store.readers):
        for (layer, head), (b, start) in product(readers, enumerate(starts)):
            for slot, block in enumerate(store.known.block_of[row, b].tolist()):
                if block < 0:
                    continue
                assert store.known.slot_of[row, b, block] == slot
                begin = start + block * size
                for mine, whole in zip(store.pool, store.source, strict=True):
                    here = mine[layer, b, head, slot * size : (slot + 1) * size].to(whole.device)
                    assert torch.equal(here, whole[layer, b, head, begin : begin + size])


@pytest.mark.parametrize(
    ("case", "lengths", "execution"), covering(CASES, [(60,), (60, 37, 9)], ["eager", "graph"]), ids=str
)
def test_logits_are_those_of_a_resident_cache(llama, case, lengths, execution):
    rows, answers = tiny.prompts(*lengths), tiny.prompts(*[24] * len(lengths))
    resident, offloaded = (
        engine_of(llama, CASES[case], cache=place, execution=execution) for place in ("resident", "host")
    )
    one, two = resident.prefill(rows), offloaded.prefill(rows)
    assert isinstance(two.cache, HostCache)
    torch.testing.assert_close(two.logits, one.logits, rtol=0, atol=0)
    compare(one, spoil(offloaded, two), answers, resident, offloaded)
    check_store(two)
    asked, missed = two.cache.fetches(0)
    assert 0 < missed < asked


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family):
    """Layers with a sliding window keep their tokens on the device."""
    model, rows, answers = tiny.model(family), tiny.prompts(60, 37), tiny.prompts(30, 30)
    engines = [engine_of(model, family=family, cache=place) for place in ("resident", "host")]
    one, two = (engine.prefill(rows) for engine in engines)
    compare(one, spoil(engines[1], two), answers, *engines)


@pytest.mark.parametrize("ratio", [1, 1.5, 4, 100])
@pytest.mark.parametrize("changes", [{}, {"refresh_every": 5, "budget_tokens": 32}], ids=["", "refresh"])
def test_the_size_of_the_store_changes_no_token(llama, ratio, changes):
    rows, answers = tiny.prompts(60, 37, 80), tiny.prompts(30, 30, 30)
    engines = [engine_of(llama, changes, cache=place, store_ratio=ratio) for place in ("resident", "host")]
    one, two = (engine.prefill(rows) for engine in engines)
    compare(one, spoil(engines[1], two), answers, *engines)
    if ratio == 100:  # a store of everything misses what it forgot, blocks of the answer
        first = two.cache.fetches(2)[1]
        two.rewind()
        decode(engines[1], two, answers)
        assert two.cache.fetches(2)[1] < first


@batches
@pytest.mark.parametrize("changes", [{}, {"completion": "centroid", "completion_chunk": 8}, {"scan_keys": "int4"}],
                         ids=["plain", "completed", "4 bits"])  # fmt: skip
def test_rewinding_and_truncating(llama, lengths, changes):
    """At any length, again and again, with other tokens each time."""
    rows = tiny.prompts(*lengths)
    engines = [engine_of(llama, changes, cache=place) for place in ("resident", "host")]
    one, two = (engine.prefill(rows) for engine in engines)
    spoil(engines[1], two)
    generator = torch.Generator().manual_seed(3)
    for keep in (None, 3, 11, 12, 0, 20, None, 17):
        answers = torch.randint(4, 260, (len(lengths), 21), generator=generator).tolist()
        for context in (one, two):
            if keep is None:
                context.rewind()
            else:
                context.cache.truncate(max(lengths) + keep)
                context.kv_bytes.zero_()
        compare(one, two, answers, *engines)
        check_store(two)


def test_engines_of_other_plans_and_budgets_share_a_context(llama):
    rows, answers = tiny.prompts(60, 37), tiny.prompts(7, 7)
    first, second = {"budget_tokens": 24}, {"budget_tokens": 32, "block_size": 8, "completion": "centroid"}
    settings = [{**one, "completion_chunk": 8} for one in (first, second)]
    resident, offloaded = ([engine_of(llama, one, cache=place) for one in settings] for place in ("resident", "host"))
    one, two = resident[0].prefill(rows), offloaded[0].prefill(rows)
    for turn in (0, 1, 1, 0, 1):
        compare(one, two, answers, resident[turn], offloaded[turn])
    torch.testing.assert_close(offloaded[0].score(two, answers), resident[0].score(one, answers), atol=2e-4, rtol=1e-4)


def test_a_cache_that_outgrows_its_room_and_loses_sequences(llama):
    rows, answers = tiny.prompts(250, 100, 30), tiny.prompts(20, 20, 20)
    engines = [engine_of(llama, cache=place) for place in ("resident", "host")]
    one, two = (engine.prefill(rows) for engine in engines)
    compare(one, two, answers, *engines)
    assert two.cache.capacity == one.cache.capacity > 256
    for context in (one, two):
        context.cache.batch_select_indices(torch.tensor([2, 0]))
        context.prompt_lengths = [context.prompt_lengths[i] for i in (2, 0)]
        context.kv_bytes = torch.zeros(2, dtype=torch.float64)
    compare(one, two, tiny.prompts(9, 9), *engines)


def test_generation_is_the_same_and_says_where_the_cache_lies(llama, byte_tokenizer):
    prompts = ["abc " * 30, "what is it that is here " * 4, "x"]
    resident, offloaded = (engine_of(llama, tokenizer=byte_tokenizer, cache=place) for place in ("resident", "host"))
    expected, found = (engine.generate(prompts, 40, ignore_eos=True) for engine in (resident, offloaded))
    for one, two in zip(expected, found, strict=True):
        assert one.token_ids == two.token_ids
        assert one.text == two.text
        assert (one.bytes_on_host, one.miss_rate) == (0, 0.0)
        assert two.bytes_on_host == one.bytes_on_gpu == 2 * 4 * 3 * 2 * 256 * 16 * 4
        assert 0 <= two.miss_rate < 1
        assert two.to_dict()["bytes_on_gpu"] == two.bytes_on_gpu
    assert found[0].miss_rate > 0
    assert 0 < found[0].bytes_on_gpu < found[0].bytes_on_host


def test_long_contexts_need_less_of_the_gpu(llama):
    """What stays is a quarter of keys (two retrieval heads of eight), and the store."""
    model = tiny.model(max_position_embeddings=8192)
    engine = engine_of(model, cache="host")
    context = engine.prefill(tiny.prompts(4000), room=8)
    engine.decode_one_token(context, torch.tensor([5]))
    near, far = context.cache.memory()
    scanned = 4 * 4096 * 16 * 4
    assert scanned < near < far / 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": "disk"}, "cache must be one of resident, host, auto, not 'disk'"),
        ({"cache": "host", "plan": None}, "cache='host' needs a head plan"),
        ({"cache": "host", "retrieval_attention": "full"}, "retrieval_attention='full' reads the whole cache"),
        ({"cache": "host", "correction_every": 8}, "correction_every reads the whole cache"),
        ({"cache": "host", "store_ratio": 0.5}, "store_ratio must be at least 1"),
        ({"cache": "host", "store_ratio": nan}, "store_ratio must be at least 1"),
        ({"cache": "host", "store_ratio": "2"}, "store_ratio must be at least 1"),
    ],
)
def test_what_does_not_go_is_one_sentence(llama, options, words):
    changes = {name: options.pop(name) for name in ("retrieval_attention", "correction_every") if name in options}
    plan = options.pop("plan", tiny.plan())
    with pytest.raises(ConfigError, match=words):
        Engine(llama, plan=plan, config=tiny.config(**changes), **options)


def test_attention_that_reads_everything_does_not_decode_from_there(llama):
    """What can goes on as if nobody had asked."""
    engine = engine_of(llama, cache="host")
    context = engine.prefill(tiny.prompts(20))
    for other in (Engine(llama), engine_of(llama)):
        with pytest.raises(ConfigError, match=r"cache of this context .* host memory"):
            other.decode_one_token(context, torch.tensor([5]))
    assert torch.equal(decode(engine, context, [[5]]), engine.score(tiny.prompts(20), [[5]]))


def test_too_little_host_memory(llama, monkeypatch):
    engine = engine_of(llama, cache="host")
    monkeypatch.setattr(host, "free_host_bytes", lambda: 1000)
    with pytest.raises(HostMemoryError, match="2 x 256 tokens in host memory"):
        engine.prefill(tiny.prompts(20, 30))


def test_too_little_memory_on_the_gpu(llama):
    engine = engine_of(llama, cache="host")
    size = engine.attention.size(engine.shape, 2, 300, 4)
    check_room(size, size.gpu)
    with pytest.raises(CacheMemoryError, match="GiB on the GPU"):
        check_room(size, size.gpu - 1)


def test_without_a_gpu_it_says_that_it_gains_nothing(llama):
    with pytest.warns(UserWarning, match="Without a GPU .* gains nothing"):
        engine_of(llama, cache="host")


def test_auto_is_resident_where_nothing_is_gained(llama):
    for changes in ({}, {"retrieval_attention": "full"}):
        context = engine_of(llama, changes, cache="auto").prefill(tiny.prompts(20))
        assert not isinstance(context.cache, HostCache)


@pytest.mark.parametrize(
    ("changes", "planned", "on_gpu", "place"),
    [
        ({}, True, True, "auto"),
        ({}, True, False, "resident"),
        ({}, False, True, "resident"),
        ({"verify_every": 4}, True, True, "resident"),
        ({"verify_every": "auto"}, True, True, "resident"),
        ({"correction_every": 8}, True, True, "resident"),
        ({"retrieval_attention": "full"}, True, True, "resident"),
    ],
)
def test_auto_offloads_only_what_does_not_read_the_whole_cache(changes, planned, on_gpu, place):
    plan, config = tiny.plan() if planned else None, tiny.config(**changes)
    assert check_place("auto", plan, config, 2.0, on_gpu) == place
    with pytest.raises(ConfigError, match="store_ratio must be at least 1"):
        check_place("auto", plan, config, 0.5, on_gpu)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prompts_pass_through_a_buffer_that_all_layers_share(family, monkeypatch):
    """As they do beside a GPU: chunk by chunk, what came before comes back from host memory."""
    monkeypatch.setattr(HostCache, "is_staged", property(lambda cache: True, lambda cache, value: None), raising=False)
    model, rows, answers = tiny.model(family), tiny.prompts(60, 37), tiny.prompts(9, 9)
    engines = [engine_of(model, family=family, cache=place, prefill_chunk=23) for place in ("resident", "host")]
    one, two = (engine.prefill(rows) for engine in engines)
    torch.testing.assert_close(two.logits, one.logits, rtol=0, atol=0)
    for layer, number in two.cache.position.items():
        for whole, right in zip(two.cache.tokens, one.cache.layers[layer].store, strict=True):
            assert torch.equal(whole[number, :, :, :60], right[:, :, :60])
    compare(one, two, answers, *engines)
    assert two.cache._staging is None


class LateCopies:
    """A lane for prompts that copies when somebody waits for it."""

    def __init__(self, device):
        self.work = []

    def run(self, work):
        self.work.append(work)
        return len(self.work)

    def wait(self, mark):
        for i in range(mark):
            self.work[i]()
            self.work[i] = lambda: None


class EmptyStaging(staging.Staging):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        for buffer in self._buffers:
            buffer.fill_(nan)


@pytest.mark.parametrize("waits", [True, False])
def test_a_prompt_waits_for_its_copies(llama, monkeypatch, waits):
    monkeypatch.setattr(HostCache, "is_staged", property(lambda cache: True, lambda cache, value: None), raising=False)
    monkeypatch.setattr(staging, "Lane", LateCopies)
    monkeypatch.setattr(host, "Staging", EmptyStaging)
    if not waits:
        monkeypatch.setattr(LateCopies, "wait", lambda *_: None)
    rows = tiny.prompts(60, 37)
    one, two = (engine_of(llama, cache=place, prefill_chunk=23).prefill(rows) for place in ("resident", "host"))
    assert torch.equal(two.logits, one.logits) == waits
    two.cache._settle()
    for layer, number in two.cache.position.items():
        for whole, right in zip(two.cache.tokens, one.cache.layers[layer].store, strict=True):
            assert torch.equal(whole[number, :, :, :60], right[:, :, :60]) == waits


@batches
def test_tokens_that_a_chunk_appends_between_steps(llama, lengths):
    rows, answers, between = (
        tiny.prompts(*lengths),
        tiny.prompts(*[9] * len(lengths)),
        tiny.prompts(*[11] * len(lengths)),
    )
    engines = [engine_of(llama, {"completion": "centroid"}, cache=place) for place in ("resident", "host")]
    one, two = (engine.prefill(rows) for engine in engines)
    spoil(engines[1], two)
    for turn in range(3):
        compare(one, two, answers, *engines)
        for engine, context in zip(engines, (one, two), strict=True):
            if turn == 1:
                context.cache.truncate(max(lengths) - 4)
            engine._dense(context.cache, torch.tensor(between), context.padding)
    compare(one, two, answers, *engines)
    check_store(two)


def test_a_compiled_step(llama):
    rows, answers = tiny.prompts(60, 37), tiny.prompts(9, 9)
    options = {"execution": "compiled", "backend": "aot_eager"}
    engines = [engine_of(llama, cache=place, **options) for place in ("resident", "host")]
    one, two = (engine.prefill(rows) for engine in engines)
    compare(one, spoil(engines[1], two), answers, *engines)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("execution", ["eager", "graph", "compiled"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_on_a_gpu(family, execution, changes):
    """A prompt in chunks, fetches beside the model, captured or not: the logits and the tokens of a resident cache."""
    model, rows = tiny.model(family).cuda(), tiny.prompts(60, 37, 90)
    options = {"family": family, "execution": execution, "prefill_chunk": 23}
    engines = [engine_of(model, changes, cache=place, **options) for place in ("resident", "host")]
    one, two = (engine.prefill(rows, room=70) for engine in engines)
    for layer, number in two.cache.position.items():
        for whole, right in zip(two.cache.tokens, one.cache.layers[layer].store, strict=True):
            torch.testing.assert_close(whole[number, :, :, :90], right[:, :, :90].cpu(), rtol=1e-4, atol=1e-4)
    for _ in range(2):
        for ids in torch.tensor(tiny.prompts(30, 30, 30)).cuda().unbind(1):
            right, found = (engine.decode_one_token(*pair) for engine, *pair in
                            ((engines[0], one, ids), (engines[1], two, ids)))  # fmt: skip
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-2)
        torch.cuda.synchronize()
        check_store(two)
        for context in (one, two):
            context.rewind()
    texts = [engine.generate(context, 60, ignore_eos=True) for engine, context in zip(engines, (one, two), strict=True)]
    assert [text.token_ids for text in texts[0]] == [text.token_ids for text in texts[1]]
    assert engines[1].way == execution


def test_lossless_decoding_does_not_go_there(llama):
    with pytest.raises(ConfigError, match="verify_every reads the whole cache"):
        engine_of(llama, {"verify_every": 4}, cache="host")
    context = engine_of(llama, cache="host").prefill(tiny.prompts(20))
    with pytest.raises(ConfigError, match=r"cache of this context .* host memory"):
        engine_of(llama, {"verify_every": 4}).generate(context, 8)


class Runtime:
    """What CUDA does about pinned memory, without it."""

    def __init__(self, most):
        self.most, self.pinned, self.waited = most, {}, 0

    def cudaHostRegister(self, pointer, size, flags):
        if sum(self.pinned.values()) + size > self.most:
            return 2
        self.pinned[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer):
        del self.pinned[pointer]


def test_pinned_memory_is_given_back(monkeypatch):
    runtime, gpu = Runtime(1 << 20), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(pinned, "_forget_error", lambda: None)
    region, other = (pinned.Region(4000, gpu) for _ in range(2))
    assert runtime.pinned == {region.data.data_ptr(): 4000, other.data.data_ptr(): 4000}
    for one in (region, other):  # two of them never share a page
        assert one.data.data_ptr() % mmap.PAGESIZE == 0
        assert not one.data.any()
    region.release()
    assert list(runtime.pinned) == [other.data.data_ptr()]
    del other, one
    assert not runtime.pinned
    with pytest.raises(HostMemoryError, match=r"pin 0\.0 GiB of host memory \(CUDA error 2\).*ulimit -l"):
        pinned.Region(2_000_000, gpu)
    assert not runtime.pinned


def test_two_tensors_of_one_region():
    region = pinned.Region(2 * 4 * 30, torch.device("cpu"))
    one, two = region.halves((5, 6), torch.float32)
    one.fill_(1)
    two.fill_(2)
    assert region.data.view(torch.float32).tolist() == [1.0] * 30 + [2.0] * 30


class LateLane:
    """Does its work as late as it may: when somebody waits for it. What has not come is NaN until then."""

    def __init__(self, store):
        self.store, self.work, self.late = store, [], 0

    def run(self, work):
        for layer, batch, head, slot in self.coming(*work.args) if isinstance(work, partial) else ():
            size = self.store.block_size
            for part in self.store.pool:
                part[layer, batch, head, slot * size : (slot + 1) * size] = nan
        self.work.append(work)
        return len(self.work)

    def wait(self, mark):
        while self.work[:mark] and self.late < mark:
            self.work[self.late]()
            self.late += 1

    def coming(self, source, pool, known, table, *_):
        for (row, layer, head, _), b in product(table.tolist(), range(known.misses.shape[1])):
            for block in known.missing[row, b, : known.misses[row, b]].tolist():
                yield layer, b, head, int(known.slot_of[row, b, block])


def check_jobs(store, window):
    """Every reader is served once: after its donor selected, not too early, nearer layers before later ones."""
    selecting = {row: layer for layer, (first, count) in store._rows.items() for row in range(first, first + count)}
    served = []
    for at, jobs in store._jobs.items():
        assert [layer for layer, _ in jobs] == sorted({layer for layer, _ in jobs})
        for reading, table in jobs:
            for row, layer, head, near in table.tolist():
                assert (layer, at) == (reading, max(selecting[row], layer - window))
                assert (near >= 0) == ((layer, head) in tiny.plan().retrieval)  # its keys are here
                served.append((row, layer, head))
    assert sorted(served) == sorted((row, *head) for row, heads in enumerate(store.readers) for head in heads)


@batches
@pytest.mark.parametrize("changes", [{}, {"refresh_every": 3, "budget_tokens": 32}], ids=["", "refresh"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_attention_waits_for_what_is_fetched_ahead(llama, lengths, changes, window, monkeypatch):
    """And nothing is left at the end of a step."""
    monkeypatch.setattr(module, "_WINDOW", window)
    rows, answers = tiny.prompts(*lengths), tiny.prompts(*[30] * len(lengths))
    engines = [engine_of(llama, changes, cache=place) for place in ("resident", "host")]
    one, two = (engine.prefill(rows) for engine in engines)
    spoil(engines[1], two)
    store = two.cache.state.store
    lane = store.lane = LateLane(store)
    compare(one, two, answers, *engines)
    assert len(lane.work) == lane.late > 30
    check_jobs(store, window)
    with pytest.MonkeyPatch.context() as patch:  # this test can fail
        patch.setattr(lane, "wait", lambda mark: None)
        two.rewind()
        assert decode(engines[1], two, answers).isnan().any()
