"""Lossless decoding in vLLM: the stock backend's text, whatever drafted it."""

from contextlib import nullcontext
from math import ceil
from types import SimpleNamespace

import pytest
import tiny
import torch
from serving_engine import CROWDED, ROOMY, SETTINGS, TIGHT, generate, groups, serving
from test_vllm_beside import FORMS, checked, plan
from test_vllm_models import CASES, saved
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from lycheedecode.integrations.vllm import frontend, lossless
from lycheedecode.integrations.vllm.parts import VLLMValidationError
from lycheedecode.integrations.vllm.settings import ServingError

PROMPTS = tiny.prompts(60, 37, 5, 90, 23, 70)
DRAFTS = 3
FEW_PAGES = {"num_gpu_blocks_override": 10, **CROWDED}


def counted(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def accepted(llm):
    """Share of the drafts."""
    return counted(llm, "spec_decode_num_accepted_tokens") / counted(llm, "spec_decode_num_draft_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.model("llama", head_dim=32, initializer_range=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(folder):
    """Tokens and log-probabilities of vLLM's own attention."""
    with serving(folder, **CROWDED) as llm:
        return generate(llm, PROMPTS, 32, logprobs=0)


@pytest.mark.parametrize("scheduling", [False, True], ids=["one step at a time", "asynchronous"])
def test_drafts_that_see_everything_are_all_accepted(folder, stock, scheduling):
    with serving(folder, plan(), {**ROOMY, "lossless": DRAFTS}, async_scheduling=scheduling, **CROWDED) as llm:
        tokens, logprobs = generate(llm, PROMPTS, 32, logprobs=0)
        assert accepted(llm) == 1
        rounds = counted(llm, "spec_decode_num_drafts")
        assert rounds == len(PROMPTS) * ceil(31 / (DRAFTS + 1))
    assert tokens == stock[0]
    torch.testing.assert_close(logprobs, stock[1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["plain", "factors of the plan", "the paper's form", "both"])
def test_drafts_that_see_little_change_nothing(folder, stock, name):
    """In chunks, beside each other, after preemption, from the prefix cache; what lies beside pages is right."""
    form, seen = FORMS.get(name, {}), {"means": 0, "copies": 0}
    with serving(folder, plan(), {**TIGHT, **form, "lossless": DRAFTS}, **FEW_PAGES) as llm:
        [group] = groups(llm)
        checked(group, seen)
        tokens, logprobs = generate(llm, PROMPTS, 32, logprobs=0)
        assert 0 < accepted(llm) < 1
        again = [generate(llm, [PROMPTS[0] + tokens[0][:count]], 6)[0] for count in (4, 20)]
        assert counted(llm, "num_preemptions") > 0
        assert counted(llm, "prefix_cache_hits") > 0
        total = group.report()
        assert total["bytes"] < total["full"]
    assert tokens == stock[0]
    assert again == [stock[0][0][count : count + 6] for count in (4, 20)]
    torch.testing.assert_close(logprobs, stock[1], atol=2e-3, rtol=1e-3)
    assert bool(seen["means"]) == ("completion" in form or "completion_chunk" in form)
    assert bool(seen["copies"]) == ("scan_keys" in form)


def test_what_is_left_in_the_cache_is_full_attentions(folder):
    """Another request that finds the pages of a decoded text has the log-probabilities of a fresh prefill."""
    with serving(folder, plan(), {**TIGHT, "lossless": DRAFTS}, block_size=32) as llm:
        [answer] = generate(llm, PROMPTS[:1], 100)
        found = generate(llm, [PROMPTS[0] + answer[:80]], 8, logprobs=0)
        assert counted(llm, "prefix_cache_hits") >= 128
    with serving(folder, enable_prefix_caching=False, block_size=32) as llm:
        fresh = generate(llm, [PROMPTS[0] + answer[:80]], 8, logprobs=0)
    assert found[0] == fresh[0]
    torch.testing.assert_close(found[1], fresh[1], atol=1e-5, rtol=1e-5)


def test_texts_end_where_they_end_without_drafts(folder, stock):
    """At a token that stops them, within a round, and where the model's positions end."""
    sampling = SamplingParams(max_tokens=32, temperature=0, detokenize=False, stop_token_ids=[stock[0][0][9]])
    ends, results = {"max_model_len": 100, **CROWDED}, []
    for more in ({}, {"plan": plan(), "config": {**TIGHT, "lossless": DRAFTS}}):
        with serving(folder, **ends, **more) as llm:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
            results.append([(list(x.outputs[0].token_ids), x.outputs[0].finish_reason) for x in outputs])
    assert results[0] == results[1]
    assert {reason for _, reason in results[0]} == {"stop", "length"}
    assert len(results[0][3][0]) == 10


def test_sampled_tokens_have_the_models_distribution(tmp_path):
    """Of the second token, which was drafted: with what the first leaves of it, exactly summed."""
    model = tiny.model("llama", head_dim=32, vocab_size=24, initializer_range=0.1)
    model.save_pretrained(tmp_path)
    prompt = [index % 24 for index in range(60)]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        pairs = torch.tensor([[*prompt, token] for token in range(24)])
        second = first @ model(pairs).logits[:, -1].softmax(-1)
    count = 2000
    with serving(tmp_path, plan(), {**SETTINGS, "budget_tokens": 48, "lossless": 2}, max_num_seqs=256) as llm:
        sampling = SamplingParams(n=count, max_tokens=3, temperature=1.0, seed=None, detokenize=False, ignore_eos=True)
        [output] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        assert 0.2 < accepted(llm) < 0.99
    drawn = torch.tensor([list(each.token_ids) for each in output.outputs])
    for place, right in enumerate((first, second)):
        found = torch.bincount(drawn[:, place], minlength=24) / count
        apart = ((found - right) / (right * (1 - right) / count).sqrt()).abs()
        assert apart.max() < 4.5


def test_greedy_texts_beside_sampled_ones_and_with_penalties(folder):
    """What is sampled keeps to the most probable token where it may take no other, and tokens of a request to those
    that it allows, wherever it is in the batch."""
    greedy = {"temperature": 0.0, "repetition_penalty": 1.3}
    kinds = [
        greedy,
        {"temperature": 1.0, "top_k": 1},
        greedy,
        {"temperature": 1.5, "top_p": 0.9, "seed": 3},
        greedy,
        {"temperature": 0.0, "allowed_token_ids": list(range(4, 90, 3))},
    ]
    same, results = [0, 1, 2, 4, 5], []
    params = [
        SamplingParams(max_tokens=24 - 2 * i, ignore_eos=True, detokenize=False, **kind) for i, kind in enumerate(kinds)
    ]
    for more in ({}, {"plan": plan(), "config": {**TIGHT, "lossless": DRAFTS}}):
        with serving(folder, max_num_seqs=4, **more) as llm:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
            results.append([list(outputs[i].outputs[0].token_ids) for i in same])
    assert results[0] == results[1]


def test_requests_that_begin_alike_or_end_soon(folder):
    """One prompt many times at once; of a single token, or as long as positions go; one token asked for, or few; each
    with its log-probabilities."""
    alike, alone, longest = PROMPTS[3][:64], [7], tiny.prompts(99, 96)
    prompts = [alike] * 3 + [alone] * 2 + longest + [alike, alone, *longest]
    asked = [(9, 0), (1, 2), (6, 1), (20, 0), (2, 3), (9, 1), (9, 2), (3, 0), (1, 1), (1, 0), (2, 0)]
    params = [
        SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False, logprobs=most)
        for count, most in asked
    ]
    results = []
    for more in ({}, {"plan": plan(), "config": {**TIGHT, "lossless": DRAFTS}}):
        with serving(folder, max_model_len=100, **more, **CROWDED) as llm:
            found = [
                output.outputs[0]
                for _ in range(2)  # the second time from the prefix cache
                for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            ]
            results.append([(list(each.token_ids), each.finish_reason) for each in found])
            steps = [step for each in found for step in each.logprobs]
            results.append([list(step) for step in steps])
            results.append(torch.tensor([token.logprob for step in steps for token in step.values()]))
    assert results[:2] == results[3:5]
    torch.testing.assert_close(results[2], results[5], atol=2e-3, rtol=1e-3)


def test_a_seed_gives_its_text_again(folder):
    """Beside others and alone, wherever the stock server's does (0.27's never does on a CPU)."""
    seeded = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True, detokenize=False)
    greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)
    same = []
    for more in ({}, {"plan": plan(), "config": {**TIGHT, "lossless": DRAFTS}}):
        with serving(folder, max_num_seqs=4, **more) as llm:
            texts = []
            for prompts, params in [(PROMPTS[:4], [greedy, seeded, greedy, greedy]), (PROMPTS[1:2], seeded)] * 2:
                outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
                texts.append(outputs[len(prompts) // 4].outputs[0].token_ids)
            same.append(all(text == texts[0] for text in texts))
    assert same in ([True, True], [False, False])


def test_the_most_probable_tokens_of_a_lone_request(folder, stock):
    """In its first step there is no draft to verify."""
    sampling = SamplingParams(max_tokens=12, temperature=1.0, top_k=1, ignore_eos=True, detokenize=False)
    with serving(folder, plan(), {**TIGHT, "lossless": DRAFTS}) as llm:
        [output] = llm.generate([{"prompt_token_ids": PROMPTS[0]}], sampling, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == stock[0][0][:12]


def test_requests_choose_the_budget_of_their_drafts(folder, stock, monkeypatch):
    asked = ["lossless", "budget_tokens=24", "off", "hybrid", "budget_tokens=32", None]
    with serving(folder, plan(), {**TIGHT, "max_budget_tokens": 32, "lossless": DRAFTS}, **CROWDED) as llm:
        [group] = groups(llm)
        find, found = group.requests.blocks, set()
        monkeypatch.setattr(group.requests, "blocks", lambda rows: found.update(find(rows)) or find(rows))
        assert generate(llm, PROMPTS, 32, asked=asked) == stock[0]
        assert found == {None, 6, 8}
        with pytest.raises(VLLMValidationError, match=r"'hybrid', 'off', 'lossless' or 'budget_tokens=N', not 'fast'"):
            generate(llm, PROMPTS[:1], asked=["fast"])


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "gemma3 in one cache group", "llama with a cache in 8 bits"])
def test_models_of_many_kinds(tmp_path, name):
    """Experts, sinks, windows and numbers in 8 bits, where rounding may choose between near ties."""
    kind, layers, options = CASES[name]
    folder, prompts, results = saved(kind, tmp_path), tiny.prompts(60, 37, 90), []
    for config in (None, {**TIGHT, "lossless": DRAFTS}):
        more = {} if config is None else {"plan": tiny.plan(sliding=(1, 3) if layers == 2 else ()), "config": config}
        with serving(folder, **options, **more) as llm:
            results.append(generate(llm, prompts))
    assert results[0] == results[1]


def test_windows_in_a_cache_group_of_their_own(tmp_path):
    folder, prompts, results = saved("gemma3", tmp_path), tiny.prompts(60, 37, 90), []
    for more in ({}, {"plan": tiny.plan(sliding=(1, 3)), "config": {**TIGHT, "lossless": DRAFTS}}):
        with serving(folder, **more, **CROWDED) as llm:
            results.append(generate(llm, prompts, 24))
            if more:
                assert accepted(llm) > 0
    assert results[0] == results[1]


def test_two_ranks(folder, stock, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    heads = tiny.HeadPlan.same_index([(1, 0), (3, 1)], tiny.LAYERS, tiny.KV_HEADS)
    with serving(folder, heads, {**TIGHT, "lossless": DRAFTS}, tensor_parallel_size=2, **CROWDED) as llm:
        assert generate(llm, PROMPTS, 32) == stock[0]


# ---------------------------------------------------------------------- CUDA graphs, as far as a CPU can tell


class Recorded:
    """Where vLLM's wrapper would keep graphs."""

    def __init__(self, model, *_):
        self.model, self.concrete_cudagraph_entries, self.runs = model, {}, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, **inputs):
        context = get_forward_context()
        self.runs.append((context.cudagraph_runtime_mode, len(inputs["input_ids"])))
        if context.cudagraph_runtime_mode is CUDAGraphMode.FULL:
            self.concrete_cudagraph_entries[context.batch_descriptor] = {
                name: [x.data_ptr() for x in (step.lengths, step.page_table, step.grown.lengths, step.grown.first)]
                for name, step in ((name, metadata.hybrid) for name, metadata in context.attn_metadata.items())
            }
        return self.model(**inputs)


def test_graphs_are_captured_and_used_for_batches_that_they_hold(folder, stock, monkeypatch):
    monkeypatch.setattr(lossless, "CUDAGraphWrapper", Recorded)
    monkeypatch.setattr(lossless.current_platform, "graph_pool_handle", lambda: None, raising=False)

    def prepare(worker):
        speculator = getattr(worker.model_runner, "speculator", None)
        with torch.inference_mode():
            if speculator is None:
                drafter = worker.model_runner.drafter
                drafter.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
                drafter.dummy_run(8, is_graph_capturing=True)
                drafter.dummy_run(4, is_graph_capturing=True)
                return drafter.model
            from lycheedecode.integrations.vllm import drafter_v2

            monkeypatch.setattr(drafter_v2, "graph_capture", lambda device: nullcontext())
            speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
            speculator.capture()
            return speculator.model

    config = {**TIGHT, **FORMS["centroid"], "lossless": DRAFTS}
    with serving(folder, plan(), config, max_num_seqs=3, block_size=32) as llm:
        [graphs] = llm.collective_rpc(prepare)
        modes = CUDAGraphMode.NONE, CUDAGraphMode.FULL
        assert graphs.runs == [(mode, size) for size in (3, 2, 1) for mode in modes]
        captured = dict(graphs.concrete_cudagraph_entries)
        assert generate(llm, PROMPTS, 32) == stock[0]
        assert set(graphs.runs[6:]) == {(CUDAGraphMode.FULL, size) for size in (1, 2, 3)}
        assert graphs.concrete_cudagraph_entries == captured  # steps have their numbers where graphs look for them


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "leave out the speculative config"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "leave out worker_cls"),
        ({"enable_lora": True}, "cannot have LoRA adapters"),
        ({"pipeline_parallel_size": 2}, "cannot have pipeline parallelism"),
    ],
    ids=["speculation", "worker", "adapters", "stages"],
)
def test_what_a_lossless_server_cannot_have(folder, options, words):
    with pytest.raises(ServingError, match=words), serving(folder, plan(), {**TIGHT, "lossless": 3}, **options):
        pass


def test_before_0_32_it_needs_the_first_model_runner(folder, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(frontend, "version", "0.31.1")
    refused = pytest.raises(ServingError, match=r"first model runner before vLLM 0\.32: unset VLLM_USE_V2_MODEL_RUNNER")
    with refused, serving(folder, plan(), {**TIGHT, "lossless": 3}):
        pass


def test_a_worker_with_another_runner_than_the_server_thought_is_refused(monkeypatch):
    monkeypatch.setattr(lossless, "version", "0.27.1")
    worker = object.__new__(lossless.DraftingWorker)
    worker.vllm_config = SimpleNamespace(use_v2_model_runner=True)
    with pytest.raises(ServingError, match=r"first model runner before vLLM 0\.32"):
        worker.init_device()


def test_layers_with_a_state_are_refused(tmp_path):
    kind, _, options = CASES["qwen3-next"]
    refused = pytest.raises(ServingError, match="layers that keep a state")
    with refused, serving(saved(kind, tmp_path), tiny.plan(sliding=(1, 3)), {**TIGHT, "lossless": 3}, **options):
        pass
