"""What lies beside vLLM's pages: means of chunks and copies of keys are right whatever happens to the pages."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from serving_engine import CROWDED, ROOMY, TIGHT, generate, groups, ours, serving
from test_vllm_models import CASES, saved

from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.attention import HybridAttention
from lycheedecode.integrations.vllm import cuda
from lycheedecode.integrations.vllm.beside import Beside, Page, share_of_memory
from lycheedecode.integrations.vllm.group import Group
from lycheedecode.integrations.vllm.requests import Limits, Requests
from lycheedecode.integrations.vllm.settings import Settings
from lycheedecode.ops import reference

LENGTHS = (60, 37, 5, 90, 23, 70)
FORMS = {
    "centroid": {"completion": "centroid", "completion_chunk": 8},
    "chunks longer than pages": {"completion": "centroid", "completion_chunk": 64},
    "factors of the plan": {"completion_chunk": 8},
    "the paper's form": {"completion": "centroid", "completion_chunk": 8, "retrieval_attention": "full"},
    "copies": {"scan_keys": "float8"},
    "copies in 4 bits": {"scan_keys": "int4"},
    "both": {"completion": "centroid", "completion_chunk": 8, "scan_keys": "float8"},
}


def plan():
    donors = tiny.plan().donors
    return HeadPlan.from_donors(donors, completion=[[0.5, 0.0], [0.0, 0.0], [1.0, 0.3], [0.0, 0.7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.model("llama", head_dim=32).save_pretrained(folder)
    return folder


def checked(group, seen):
    """Let every layer of a step compare what lies beside its pages with what the cache says."""
    stock, beside = group.attention, group.beside

    class Checking(HybridAttention):
        def __init__(self):
            self.__dict__ |= stock.__dict__

        def __call__(self, layer, query, kv, state, *arguments, **options):
            counts = kv.token_counts()
            if layer in beside.means:
                fresh = torch.full_like(beside.means[layer], float("nan"))
                reference.write_means(kv._replace(lengths=counts - 1), beside.chunk, *fresh, None, 999)
                known = ~fresh.isnan()
                torch.testing.assert_close(beside.means[layer][known], fresh[known])
                seen["means"] += int(known.any())
            if layer in beside.copies:
                fresh = beside.copies[layer].views(torch.zeros_like)
                pages = kv.page_table[:, : int(counts.max() - 2) // kv.keys.shape[2] + 1].flatten().long()
                reference.write_pages_to_copy(fresh, kv.keys, self.scanned[layer], pages)
                for b, count in enumerate(counts.tolist()):
                    both = (
                        part.view(torch.uint8) for x in (beside.copies[layer], fresh) for part in x if part is not None
                    )
                    found = [reference_tokens(part, kv, b)[:, : max(count - 1, 0)] for part in both]
                    half = len(found) // 2
                    assert all(map(torch.equal, found[:half], found[half:]))
                seen["copies"] += 1
            return super().__call__(layer, query, kv, state, *arguments, **options)

    group.attention = Checking()


def reference_tokens(cache, kv, b):
    return cache[kv.page_table[b].long()].transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tokens_are_those_of_engine(folder, form):
    """In chunks, beside others, from the prefix cache; a request that is off does not know of it."""
    config, prompts = {**TIGHT, **form}, tiny.prompts(*LENGTHS)
    expected = ours("llama", plan(), config, prompts, 20)
    full = ours("llama", plan(), {**ROOMY, "completion": "none"}, prompts[:1], 20)
    with serving(folder, plan(), config, **CROWDED) as llm:
        assert generate(llm, prompts, 20) == expected
        assert generate(llm, prompts[::-1], 20) == expected[::-1]
        assert generate(llm, prompts[:2], 20, asked=["off"]) == [full[0], expected[1]]
        [group] = groups(llm)
        names = {row for rows in (group.requests._seen, group.requests._asked) for row in rows}
        assert len(names) <= 2 * len(prompts)
    if "completion" in form or "completion_chunk" in form:
        assert expected != ours("llama", plan(), {**config, "completion": "none"}, prompts, 20)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_it_is_right_after_preemption_and_in_used_pages(folder, form):
    """9 pages are too few for these prompts; every step of every layer is compared with the cache."""
    prompts, seen = tiny.prompts(*LENGTHS), {"means": 0, "copies": 0}
    config = {**TIGHT, **form}
    with serving(folder, plan(), config, num_gpu_blocks_override=10, **CROWDED) as llm:
        [group] = groups(llm)
        checked(group, seen)
        first = generate(llm, prompts, 32)
        again = generate(llm, prompts[-1:] + prompts[:1], 32)
        assert [len(row) for row in first + again] == [32] * 8
        assert sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions") > 0
        assert sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits") > 0
    assert bool(seen["means"]) == ("completion" in form or "completion_chunk" in form)
    assert bool(seen["copies"]) == ("scan_keys" in form)


def test_bytes_are_those_of_engine(folder):
    """One sequence; what means take is counted like the rest."""
    from lycheedecode import Engine

    prompts, config = tiny.prompts(60), {**TIGHT, **FORMS["both"]}
    with serving(folder, plan(), config) as llm:
        generate(llm, prompts, 9)
        total = groups(llm)[0].report()
    engine = Engine(tiny.model("llama", head_dim=32), plan=plan(), config=HybridConfig(**config))
    [result] = engine.generate(prompts, 9, ignore_eos=True)
    assert total["bytes"] == pytest.approx(8 * result.kv_bytes_per_token)


def test_memory_is_taken_from_the_cache(folder):
    """The same memory holds fewer pages."""

    def pages(worker):
        return worker.model_runner.kv_cache_config.num_blocks

    sizes = []
    for form in ({"completion": "none"}, FORMS["both"]):
        with serving(folder, plan(), {**TIGHT, **form}, block_size=32) as llm:
            [count] = llm.collective_rpc(pages)
            [group] = groups(llm)
            generate(llm, tiny.prompts(9), 2)
            sizes.append((count, group.beside.bytes_of_page))
            held = [*group.beside.means.values(), *group.beside.copies.values()]
            assert sum(x.nbytes for x in held) == count * group.beside.bytes_of_page
    (plain, nothing), (fewer, beside) = sizes
    page = 2 * tiny.LAYERS * tiny.KV_HEADS * 32 * 32 * 4
    assert nothing == 0
    assert fewer / plain == pytest.approx(page / (page + beside), rel=1e-3)


@pytest.mark.parametrize(("given", "size"), [({}, 16), ({"completion": "centroid"}, 128)], ids=["no means", "means"])
@pytest.mark.parametrize(("chunk", "longest"), [(32, 32), (128, 128), (1024, 128)])
def test_vllm_is_asked_for_pages_as_long_as_chunks(monkeypatch, given, size, chunk, longest):
    """On a GPU; up to 128 tokens."""
    config = HybridConfig(completion_chunk=chunk, **given)
    told = Settings(tiny.plan(), config, True, Limits.of(config, None, True))
    monkeypatch.setattr(cuda, "get_current_vllm_config", lambda: None)
    monkeypatch.setattr(cuda.settings, "read", lambda _: told)
    assert cuda.HybridBackend.get_preferred_block_size(16) == min(size, longest)


def test_pages_as_long_as_chunks_take_the_least():
    attention = HybridAttention(plan(), HybridConfig(completion="centroid"))
    sizes = {
        tokens: Beside(attention, Page(8, tokens, 128, torch.bfloat16), torch.device("meta")).bytes_of_page / tokens
        for tokens in (16, 128, 256)
    }
    assert sizes[16] == 8 * sizes[128] == 8 * sizes[256]
    assert sizes[128] == 4 * 2 * 8 * 128 * 2 / 128
    assert share_of_memory(1, [60, 39]) == 0.99


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-next", "gemma3 in one cache group", "llama with a cache in 8 bits"])
def test_models_of_many_kinds(tmp_path, name):
    """Sinks, linear attention, windows, and 16-bit means of numbers in 8 bits; off is still the stock backend."""
    kind, layers, options = CASES[name]
    folder, prompts, seen = saved(kind, tmp_path), tiny.prompts(60, 37, 90), {"means": 0, "copies": 0}
    with serving(folder, **options) as llm:
        stock = generate(llm, prompts)
    config = {**TIGHT, **FORMS["centroid"]}
    with serving(folder, tiny.plan(sliding=(1, 3) if layers == 2 else ()), config, **options) as llm:
        [group] = groups(llm)
        checked(group, seen)
        assert generate(llm, prompts, asked=["off"] * 3) == stock
        assert generate(llm, prompts) != stock
    assert seen["means"] > 0


def test_what_is_known_of_requests():
    """All is written when a sequence first decodes, after a preemption, and twice where its pages may be loading."""

    def grown(requests, length, decoding=1, new=(), moved=()):
        requests.note(dict.fromkeys(new), ["a"], ["a"], moved)
        return requests.grow(requests.take(), [length], decoding)[0]

    requests = Requests(Limits.of(HybridConfig(), None, True))
    assert [grown(requests, 50, new=["a"]), grown(requests, 51), grown(requests, 52, 0), grown(requests, 53)] == [
        0, 50, 51, 51,
    ]  # fmt: skip
    assert [grown(requests, 54, moved=["a"]), grown(requests, 55), grown(requests, 40), grown(requests, 41)] == [
        0, 54, 0, 40,
    ]  # fmt: skip
    assert grown(requests, 42, new=["a"]) == 0
    assert requests.take() == ()
    loading = Requests(Limits.of(HybridConfig(), None, True), loads=True)
    assert [grown(loading, 50, new=["a"]), grown(loading, 51), grown(loading, 52)] == [0, 0, 51]


def test_copies_are_written_again_from_where_drafts_of_two_rounds_may_have_been_rejected():
    """Lengths on the host may count them; means of a round ago are the layers' own."""
    group, written = object.__new__(Group), []
    group.requests, group._drafting = Requests(Limits.of(HybridConfig(), None, True)), ["a", "b"]
    group.beside = SimpleNamespace(layers={0}, write=lambda *given: written.append(given[2:]))
    for lengths in ([101, 51], [110, 71]):  # the next token included
        group._write_verified(8, None, lengths)
    assert written == [([0, 0], [101, 51], [0, 0]), ([84, 34], [110, 71], [110, 34])]
