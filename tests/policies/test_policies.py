"""Policies for comparison: what they select, what they read, and that nothing but the budget makes them inexact."""

from dataclasses import replace
from math import ceil

import pytest
import tiny
import torch

from lycheedecode import Engine, HeadPlan, HybridConfig, PlanError, ops, policies
from lycheedecode.models.shape import ModelShape
from lycheedecode.ops import KV
from lycheedecode.policies import PolicyError, plans
from lycheedecode.policies.quest import QuestAttention

ROOMY, TIGHT = tiny.ROOMY, tiny.config(16)
HEADS = tiny.LAYERS * tiny.KV_HEADS
SPARSE = [name for name in policies.NAMES if policies.has_budget(name)]


@pytest.fixture(scope="module")
def coverage():
    return torch.rand(HEADS, HEADS)


@pytest.fixture(scope="module")
def shape(llama):
    return ModelShape.of(llama)


@pytest.fixture
def make(shape, coverage):
    def make_one(name, config=TIGHT, **given):
        return policies.make(
            name, **{"shape": shape, "config": config, "plan": tiny.plan(), "coverage": coverage} | given
        )

    return make_one


def engine_of(model, policy, **options):
    return Engine(model, attention=policy.attention, config=policy.config, **options)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", policies.NAMES)
def test_a_budget_that_covers_the_context_is_full_attention(llama, make, name):
    rows, answers = tiny.prompts(40, 23, 9), tiny.prompts(10, 10, 10)
    context = Engine(llama).prefill(rows)
    full = make("full+weights8" if name.endswith("weights8") else "full", ROOMY)
    close(engine_of(llama, make(name, ROOMY)).score(context, answers), engine_of(llama, full).score(context, answers))


@pytest.mark.parametrize("name", [name for name in policies.NAMES if name != "kascade"])
def test_layers_without_full_attention_are_left_alone(name):
    model = tiny.model("gemma3")
    plan = tiny.plan(sliding=(1, 3))
    for config, exact in ((ROOMY, True), (TIGHT, not policies.has_budget(name))):
        policy = policies.make(name, shape=ModelShape.of(model), config=config, plan=plan)
        rows, answers = tiny.prompts(60), tiny.prompts(6)
        full = Engine(model, config={"step_weights": policy.config.step_weights})
        difference = engine_of(model, policy).score(rows, answers) - full.score(rows, answers)
        # Two global layers of four: TidalDecode and Quest keep them dense.
        assert (difference.abs().max() < 2e-3) == (exact or name in ("tidaldecode", "quest")), (config, difference)


@pytest.mark.parametrize("name", SPARSE)
def test_padding_changes_nothing(llama, make, name):
    rows, answers = tiny.prompts(60, 37, 12), tiny.prompts(8, 8, 8)
    engine = engine_of(llama, make(name), prefill_chunk=16)
    together = engine.score(rows, answers)
    full = Engine(llama).score(rows, answers)
    assert (together - full).abs().max() > 0.1
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        close(together[i], engine.score([row], [answer])[0])


@pytest.mark.parametrize("name", SPARSE)
def test_rewinding_forgets_what_was_decoded(llama, make, name):
    rows = tiny.prompts(61, 44)
    one, two = tiny.prompts(24, 24), [answer[::-1] for answer in tiny.prompts(24, 24)]
    engine = engine_of(llama, make(name, tiny.config()))
    context = engine.prefill(rows, room=32)
    first = engine.score(context, one)
    close(engine.score(context, two), engine.score(rows, two))
    assert torch.equal(engine.score(context, one), first)


@pytest.mark.parametrize("name", ["quest+correction", "duo+correction", "tidaldecode+correction"])
def test_corrected_entries_are_seen(llama, make, name):
    """Right after a correction every entry is that of full attention, so a step is what it is after a prefill."""
    rows, answers = tiny.prompts(60, 31), tiny.prompts(25, 25)
    config = tiny.config(28, correction_every=12)
    scored = engine_of(llama, make(name, config)).score(rows, answers)
    full = Engine(llama).score(rows, answers)
    close(scored[:, [11, 23]], full[:, [11, 23]])
    assert (scored - full).abs().max() > 0.1
    longer = [row + answer[:24] for row, answer in zip(rows, answers, strict=True)]
    close(scored[:, 24:], engine_of(llama, make(name, config)).score(longer, [answer[24:] for answer in answers]))


@pytest.mark.parametrize("name", ["duo", "streaming"])
def test_fixed_steps_see_the_same_window(llama, make, name):
    rows, answers = tiny.prompts(60, 31), tiny.prompts(8, 8)
    fixed, eager = (engine_of(llama, make(name), execution=way) for way in ("graph", "eager"))
    close(fixed.score(rows, answers), eager.score(rows, answers))


def test_endings_are_settings(llama, make):
    both = make("same-index+refresh2+float8").config
    assert (both.refresh_every, both.scan_keys, both.correction_every) == (2, "float8", 0)
    assert make("hybrid+correction").config.correction_every == policies.CORRECTION_EVERY
    assert make("hybrid+correction", replace(TIGHT, correction_every=5)).config.correction_every == 5
    for name in ("hybrid+", "hybrid+refresh3"):
        with pytest.raises(policies.PolicyError, match="There is no policy"):
            policies.check_name(name)
    for name in ("full+refresh2", "full+float8", "quest+float8", "streaming+float8", "duo+centroid"):
        base, _, ending = name.partition("+")
        with pytest.raises(
            policies.PolicyError, match=rf"after {base} may follow \+correction or .*, not \+{ending}\."
        ):
            policies.check_name(name)
    assert make("own-topk+centroid").config.completion == "centroid"
    assert make("hybrid+uncompleted", replace(TIGHT, completion="centroid")).config.completion == "none"
    with pytest.raises(ValueError, match="scan_keys='float8' needs retrieval_attention='selected'"):
        make("paper+float8")


def test_weights_in_8_bits_are_for_what_asks(llama, make):
    """Full attention keeps the model's own, whatever the config says: others are compared with it."""
    config = replace(TIGHT, step_weights="float8")
    assert make("full", config).config.step_weights == make("hybrid").config.step_weights == "model"
    assert make("hybrid", config).config == make("hybrid+weights8").config == replace(TIGHT, step_weights="float8")
    rows, answers = tiny.prompts(40, 23), tiny.prompts(10, 10)
    right, eight = (engine_of(llama, make(name)).score(rows, answers) for name in ("full", "full+weights8"))
    assert 1e-3 < (eight - right).norm() / right.norm() < 0.2


def test_a_name_is_a_class_and_settings(shape):
    plan, config = tiny.plan(), replace(TIGHT, refresh_every=2, completion="centroid")
    named = policies.make("paper+refresh2+centroid", shape=shape, config=TIGHT, plan=plan)
    made = policies.Paper(config=config, plan=plan).on(shape)
    assert named.config == made.config == replace(config, retrieval_attention="full")
    assert named.attention.plan == made.attention.plan
    drawn = policies.RandomRoles(config=TIGHT, plan=plan, seed=5).on(shape)
    assert drawn.attention.plan == policies.make("random:5", shape=shape, config=TIGHT, plan=plan).attention.plan


# ---------------------------------------------------------------------- who reads what


@pytest.mark.parametrize("name", [name for name in policies.NAMES if "+" not in name])
@pytest.mark.parametrize("lengths", [(50,), (50, 29)], ids=["one", "padded batch"])
def test_bytes_are_what_the_operations_read(llama, make, name, lengths, monkeypatch):
    """Every operation is watched; bounds are counted by hand."""
    engine = engine_of(llama, make(name))  # which tries the model first
    read = torch.zeros(len(lengths))

    def watched(operation, count):
        def run(query, kv, *arguments, **options):
            read.add_(count(kv, *arguments, **options))
            return operation(query, kv, *arguments, **options)

        return run

    def in_blocks(kv, selections, rows, size, scale, heads=None, **_):
        chosen = selections.blocks[rows]  # [H, B, K]
        tokens = torch.zeros(len(lengths))
        for sequence, length in enumerate(kv.token_counts().tolist()):
            for blocks in chosen[:, sequence].tolist():
                seen = {t for b in blocks if b >= 0 for t in range(b * size, min(b * size + size, length))}
                tokens[sequence] += 2 * len(seen)
        return tokens

    monkeypatch.setattr(ops, "attend_blocks", watched(ops.attend_blocks, in_blocks))
    monkeypatch.setattr(ops, "attend", watched(
        ops.attend, lambda kv, scale, heads=None, **_: 2 * kv.token_counts() * len((0, 1) if heads is None else heads)
    ))  # fmt: skip
    monkeypatch.setattr(ops, "scan_select", watched(
        ops.scan_select, lambda kv, heads, *_, **__: kv.token_counts() * len(heads)
    ))  # fmt: skip
    monkeypatch.setattr(ops, "attend_select", watched(
        ops.attend_select, lambda kv, heads, *_, **__: 2 * kv.token_counts() * len(heads)
    ))  # fmt: skip
    context = engine.prefill(tiny.prompts(*lengths))
    for token in range(3):
        engine.decode_one_token(context, torch.full((len(lengths),), 7 + token))
    if name == "quest":
        for step in range(1, 4):
            read += torch.tensor([2 * ceil((length + step) / 4) * (HEADS - 2 * tiny.KV_HEADS) for length in lengths])
    assert context.kv_bytes.tolist() == (64 * read).tolist()  # 16 float32 a key


def test_tidaldecode_selects_where_its_authors_do(make):
    assert plans.tidal_layers(32) == (0, 1, 2, 13)
    assert plans.tidal_layers(30) == (0, 1, 2, 12)
    assert plans.tidal_layers(1) == (0,)
    deep = plans.tidaldecode(ModelShape("", "", 32, 8, 2, 16, 0, tuple(range(32))))
    assert deep.donors[3] == deep.donors[12] == ((2, 0), (2, 1))
    assert deep.donors[13] == deep.donors[31] == ((13, 0), (13, 1))
    policy = make("tidaldecode")
    assert (policy.config.block_size, policy.config.retrieval_attention) == (1, "full")
    assert policy.attention.plan.donors == tuple(((i, 0), (i, 1)) for i in (0, 1, 2, 2))


def test_the_paper_inherits_by_index_and_retrieves_densely(make):
    paper, same = make("paper"), make("same-index")
    assert paper.attention.plan.donors == same.attention.plan.donors
    assert paper.attention.plan.donors[2:] == (((1, 0), (0, 1)), ((1, 0), (3, 1)))
    assert [policy.config.retrieval_attention for policy in (paper, same)] == ["full", "selected"]


def test_random_roles_are_as_many_and_differ_by_seed(make):
    seeds = [make(name).attention.plan for name in ("random", "random:0", "random:5")]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(len(plan.retrieval) == 4 and plan.retrieval[:2] == ((0, 0), (0, 1)) for plan in seeds)


def test_windows_hold_sinks_and_the_latest_blocks(shape):
    for length, expected in ((50, {0, 10, 11, 12}), (13, {0, 1, 2, 3}), (6, {0, 1, -1})):
        window = policies.make("streaming", shape=shape, config=TIGHT).attention
        kv = KV(torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16))
        state = window.allocate(1, 64, "cpu")
        window(0, torch.randn(1, 6, 16), kv, state, 0.25)
        assert set(state.selections.blocks[0, 0].tolist()) == expected


# ---------------------------------------------------------------------- Quest


def naive_blocks(query, keys, config):
    """The blocks that Quest selects for one head of one sequence: `query [G, D]`, `keys [S, D]`."""
    size, length = config.block_size, len(keys)
    bounds = []
    for block in keys.split(size):
        low, high = block.amin(0), block.amax(0)
        bounds.append(float(torch.maximum(query * low, query * high).sum(-1).max()))
    must = {
        b for b in range(len(bounds)) if b * size < config.sink_tokens or (b + 1) * size > length - config.recent_tokens
    }
    others = sorted(set(range(len(bounds))) - must, key=lambda b: -bounds[b])
    return must | set(others[: config.budget_blocks - len(must)])


@pytest.mark.parametrize("starts", [None, [0, 21]])
def test_quest_selects_by_bounds_whatever_happened_before(shape, starts):
    batch = 1 if starts is None else 2
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    quest = QuestAttention(TIGHT, shape)
    state = quest.allocate(batch, 96, "cpu")
    store = torch.randn(batch, 2, 96, 16)

    def check(slots):
        kv = KV(store[:, :, :slots], store[:, :, :slots], None, starts)
        for layer in range(tiny.LAYERS):
            query = torch.randn(batch, 6, 16)
            quest(layer, query, kv, state, 0.25)
            for sequence in range(batch if layer >= 2 else 0):
                begin = 0 if starts is None else int(starts[sequence])
                for head in range(2):
                    expected = naive_blocks(
                        query[sequence, 3 * head : 3 * head + 3], store[sequence, head, begin:slots], TIGHT
                    )
                    found = state.selections.blocks[(layer - 2) * 2 + head, sequence].tolist()
                    assert set(found) - {-1} == expected, (slots, layer, sequence, head)

    for slots in (50, 51, 52, 53, 54, 70):
        check(slots)
    state.truncate(51)
    store[:, :, 51:] = torch.randn_like(store[:, :, 51:])
    for slots in (52, 53, 60, 96):
        check(slots)
    state.truncate(24)  # before the second sequence's fourth token
    store[:, :, 24:] = torch.randn_like(store[:, :, 24:])
    check(47)


def test_bounds_are_bounds(shape):
    from lycheedecode.policies.quest import score_by_bounds

    query, keys = torch.randn(1, 2, 16), torch.randn(1, 2, 12, 16)
    blocks = keys.unflatten(2, (-1, 4))
    scores = score_by_bounds(query, blocks.amin(3), blocks.amax(3))[:, 0]
    largest = (query[0, :, None, None] * blocks[0]).sum(-1).amax(-1)
    moved = scores - scores.amax(-1, keepdim=True) + torch.maximum(
        query[0, :, None] * blocks[0].amin(2), query[0, :, None] * blocks[0].amax(2)
    ).sum(-1).amax(-1, keepdim=True)  # fmt: skip
    assert (moved >= largest - 1e-5).all()
    assert (scores >= 0).all()


# ---------------------------------------------------------------------- Kascade


def test_kascade_takes_the_anchors_and_heads_that_cover_best(shape):
    coverage = torch.zeros(HEADS, HEADS)
    coverage.fill_diagonal_(1.0)
    coverage[2, 1] = coverage[3, 0] = 0.9  # layer 1, crosswise, from layer 0
    coverage[6:8, 4] = 0.8  # layer 3, both heads, from head 0 of layer 2
    plan = plans.kascade(coverage, shape, 2)
    assert plan.donors == (((0, 0), (0, 1)), ((0, 1), (0, 0)), ((2, 0), (2, 1)), ((2, 0), (2, 0)))
    assert plans.kascade(coverage, shape, [0, 2]) == plan
    assert plans.kascade(coverage, shape, tiny.LAYERS) == HeadPlan.all_retrieval(tiny.LAYERS, tiny.KV_HEADS)
    for anchors in (0, 9, [1], [0, 4]):
        with pytest.raises(PlanError):
            plans.kascade(coverage, shape, anchors)


def test_kascades_search_equals_trying_everything(shape):
    from itertools import combinations

    table = torch.rand(6, 6, 2, 2)

    def value(anchors):
        total = 0.0
        for layer in range(6):
            anchor = max(a for a in anchors if a <= layer)
            own = table[layer, layer].diagonal().mean()
            total += float(own if anchor == layer else table[layer, anchor].amax(-1).mean())
        return total

    for number in (1, 2, 3, 6):
        best = max(([0, *rest] for rest in combinations(range(1, 6), number - 1)), key=value)
        assert plans._best_anchors(table, number) == best


# ---------------------------------------------------------------------- equal bytes


@pytest.mark.parametrize(
    "name",
    [
        "streaming",
        "quest",
        "kascade",
        "same-index",
        "paper",
        "hybrid",
        "hybrid+centroid",
        "hybrid+float8",
        "hybrid+int4",
    ],
)
def test_matched_budgets_read_as_much_and_one_block_more_would_be_too_much(llama, shape, make, coverage, name):
    length = 401
    config = tiny.config(200, completion_chunk=16)
    given = {"shape": shape, "plan": tiny.plan(), "coverage": coverage}
    if name == "paper":  # half of these heads are dense
        given["plan"] = HeadPlan.from_donors([[(0, 0), (0, 1)], *[[(0, 0), (0, 0)]] * 3])
    matched = policies.match_bytes(name, config=config, context=length, steps=1, itemsize=4, **given)

    def bytes_of(config, name):
        engine = engine_of(llama, policies.make(name, config=config, **given))
        context = engine.prefill(tiny.prompts(length - 1), room=4)
        engine.decode_one_token(context, torch.tensor([9]))
        return float(context.kv_bytes)

    allowed, found = bytes_of(config, "hybrid"), bytes_of(matched, name)
    policy = policies.make(name, config=matched, **given)
    assert found == 64 * policies.bytes_at(policy, shape, length, 1, 4) <= allowed
    larger = replace(config, budget_tokens=matched.budget_tokens + policy.config.block_size)
    assert bytes_of(larger, name) > allowed
    if name == "hybrid":
        assert found == allowed


@pytest.mark.parametrize(("keys", "budgets"), [("float8", {2: 248, 4: 272}), ("int4", {2: 260, 4: 280})])
def test_a_copy_has_bytes_of_its_own_beside_any_cache(shape, keys, budgets):
    """Four heads scan 401 keys of 16 numbers, in 16 or 12 bytes; what is saved goes to eight heads, in blocks of 4."""
    given = {"shape": shape, "plan": tiny.plan(), "config": tiny.config(200), "context": 401, "steps": 1}
    for itemsize, budget in budgets.items():
        assert policies.match_bytes(f"hybrid+{keys}", itemsize=itemsize, **given).budget_tokens == budget


@pytest.mark.parametrize("changes", [{}, {"refresh_every": 3}, {"correction_every": 6}], ids=str)
@pytest.mark.parametrize("name", ["hybrid", "quest", "duo", "full"])
def test_bytes_are_means_over_steps(llama, shape, make, name, changes):
    policy = make(name, tiny.config(**changes))
    engine = engine_of(llama, policy)
    context = engine.prefill(tiny.prompts(199), room=16)
    for token in range(6):
        engine.decode_one_token(context, torch.tensor([token]))
    mean = float(context.kv_bytes) / 6 / 64
    # Between two selections a block may be kept whose tokens are still to come.
    assert policies.bytes_at(policy, shape, 200, 6) == pytest.approx(mean, rel=0.1 if changes else 1e-9)


def test_what_cannot_be_matched_is_said(shape):
    given = {"shape": shape, "plan": tiny.plan(), "config": TIGHT}
    for name in ("duo", "tidaldecode", "own-topk"):
        with pytest.raises(PolicyError, match=f"{name}' reads at least .*% of the cache at 401 tokens"):
            policies.match_bytes(name, context=401, **given)
    with pytest.raises(PolicyError, match="'full' has no budget"):
        policies.match_bytes("full", context=401, **given)
    with pytest.raises(PolicyError, match="too short"):
        policies.match_bytes("streaming", context=5, **given)
    with pytest.raises(PolicyError, match="not known in advance"):
        policies.match_bytes("hybrid", context=401, **{**given, "config": HybridConfig(selection="top_p", top_p=0.9)})


# ---------------------------------------------------------------------- refusals


def test_names_are_checked(shape, make):
    with pytest.raises(PolicyError, match="no policy 'qest': did you mean quest"):
        make("qest")
    with pytest.raises(PolicyError, match="There are full, hybrid, paper"):
        make("nothing like it")
    for name in ("random:x", "quest:3", "", "+correction"):
        with pytest.raises(PolicyError, match=r"There is no policy '[^']*'(: did you mean .*\?|\.) There are full,"):
            policies.check_name(name)
    for name, setting in (
        ("hybrid+float8+int4", "scan_keys"),
        ("random:1+centroid+weights8+uncompleted", "completion"),
    ):
        with pytest.raises(PolicyError, match=f"says twice what {setting} is: leave out"):
            policies.check_name(name)
    with pytest.raises(PolicyError, match="'duo' needs a head plan"):
        make("duo", plan=None)
    with pytest.raises(PolicyError, match="needs the coverage"):
        make("kascade", coverage=None)
    with pytest.raises(PolicyError, match="selection must be top_k or ratio"):
        make("quest", HybridConfig(selection="top_p", top_p=0.9))
    for name in ("quest", "duo", "streaming"):
        with pytest.raises(PolicyError, match="completes nothing"):
            make(name, replace(TIGHT, completion="centroid"))
    assert make("full", replace(TIGHT, completion="centroid")).attention
    with pytest.raises(PlanError, match="with 3 layers; the model has 4"):
        make("own-topk", plan=HeadPlan.all_retrieval(3, 2))


# ---------------------------------------------------------------------- on a GPU

WIDE = {"hidden_size": 384, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1}


@pytest.mark.gpu
@pytest.mark.parametrize("name", policies.NAMES)
def test_a_gpu_decodes_what_a_cpu_does(name, coverage):
    model = tiny.model("llama", **WIDE)
    given = {"shape": ModelShape.of(model), "plan": tiny.plan(), "coverage": coverage}
    rows, answers = tiny.prompts(200, 137), tiny.prompts(12, 12)
    for config in (ROOMY, tiny.config(64)):
        policy = policies.make(name, config=config, **given)
        expected = engine_of(model, policy).score(rows, answers)
        actual = engine_of(model.cuda(), policy, execution="eager").score(rows, answers).cpu()
        model.cpu()
        if config is ROOMY:
            torch.testing.assert_close(actual, expected, atol=5e-3, rtol=5e-3)
        else:  # rounding may choose another block now and then
            assert (actual - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in policies.NAMES if not name.startswith("quest")])
def test_replayed_steps_are_eager_steps(name, coverage):
    model = tiny.model("llama", **WIDE).cuda()
    given = {"shape": ModelShape.of(model), "plan": tiny.plan(), "coverage": coverage}
    policy = policies.make(name, config=tiny.config(64), **given)
    rows, answers = tiny.prompts(200, 137), tiny.prompts(12, 12)
    actual, expected = (engine_of(model, policy, execution=way).score(rows, answers) for way in ("graph", "eager"))
    assert (actual - expected).abs().mean() < 0.01 * expected.std()
