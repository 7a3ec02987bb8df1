"""HeadPlan: what is valid, what a file may hold, and how plans are divided."""

import json
import math
import random

import pytest

from lycheedecode import HeadPlan, PlanError
from lycheedecode.plan import FORMAT, FORMAT_OF_BUDGETS, bundled_plans

TABLE = [[(0, 0), (0, 1)], [(0, 1), (1, 1)], [(0, 0), (1, 1)]]


def test_roles_and_rows():
    plan = HeadPlan.from_donors(TABLE)
    assert (plan.num_layers, plan.num_kv_heads) == (3, 2)
    assert plan.retrieval == ((0, 0), (0, 1), (1, 1))
    assert [plan.retrieval_heads(layer) for layer in range(3)] == [(0, 1), (1,), ()]
    assert [plan.sparse_heads(layer) for layer in range(3)] == [(), (0,), (0, 1)]
    assert [plan.first_row(layer) for layer in range(3)] == [0, 2, 3]
    assert [plan.donor_rows(layer) for layer in range(3)] == [(0, 1), (1, 2), (0, 2)]
    assert plan.donors[1][0] == (0, 1)


def test_a_donor_may_lie_in_the_same_layer():
    plan = HeadPlan.from_donors([[(0, 1), (0, 1)]])
    assert plan.retrieval == ((0, 1),)
    assert plan.donor_rows(0) == (0, 0)


@pytest.mark.parametrize(
    ("donors", "said"),
    [
        ([[(0, 0)], [(2, 0)]], "does not exist"),
        ([[(0, 0), (0, 2)]], "does not exist"),
        ([[(0, 0), (0, -1)]], "does not exist"),
        ([[(1, 0)], [(1, 0)]], "too late"),
        ([[(0, 0)], [(0, 0)], [(1, 0)]], "not a retrieval head"),
        ([[(0, 0), (0, 1)], [(0, 0)]], "same number of KV heads"),
        ([], "at least one layer"),
        ([[]], "at least one layer"),
        ([[0, 1]], "table of"),
        (None, "table of"),
        ([[("a", 0)]], "table of"),
        ([[(0.5, 0)]], "table of"),
    ],
)
def test_invalid_donors_are_refused(donors, said):
    with pytest.raises(PlanError, match=said):
        HeadPlan.from_donors(donors)


def test_gate_means_must_have_the_shape_of_donors():
    with pytest.raises(PlanError, match="3 x 2"):
        HeadPlan.from_donors(TABLE, gate_means=[[1.0, 1.0]])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([[1.0, 1.0]], "completion must have the shape of donors, 3 x 2"),
        ([[1.0, -0.1]] * 3, "completion must be a table of factors that are not negative"),
        ([[1.0, 1e38]] * 3, "and at most 1000"),
        ([[1.0, float("nan")]] * 3, "completion must be a table of finite numbers, a row for each layer"),
        ([[1.0, float("inf")]] * 3, "finite numbers"),
    ],
)
def test_factors_that_make_no_sense_are_refused(table, said):
    with pytest.raises(PlanError, match=said):
        HeadPlan.from_donors(TABLE, completion=table)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([[1.0, 2.0]], "budgets must have the shape of donors, 3 x 2"),
        ([[1.0, 0.0]] * 3, "budgets must be a table of factors above 0, and at most 1000"),
        ([[1.0, float("nan")]] * 3, "finite numbers"),
        (["12"] * 3, "budgets must be a table of finite numbers, a row for each layer"),
        ([{"1": 1, "2": 2}] * 3, "finite numbers"),
        ([[1, True]] * 3, "finite numbers"),
        ([[1, 10**400]] * 3, "finite numbers"),
        ([[1.0, 1001.0]] * 3, "at most 1000"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(table, said):
    with pytest.raises(PlanError, match=said):
        HeadPlan.from_donors(TABLE, budgets=table)


def test_factors_of_a_layer():
    plan = HeadPlan.from_donors(TABLE, completion=[[1, 0], [0.5, 2], [0, 0]])
    assert [plan.completion_factors(layer) for layer in range(3)] == [(1.0, 0.0), (0.5, 2.0), (0.0, 0.0)]
    assert HeadPlan.from_donors(TABLE).completion_factors(1) == (0.0, 0.0)


def test_budgets_of_a_layer():
    plan = HeadPlan.from_donors(TABLE, budgets=[[1, 2], [0.5, 2], [1, 1]])
    assert [plan.budget_factors(layer) for layer in range(3)] == [(1.0, 2.0), (0.5, 2.0), (1.0, 1.0)]
    assert HeadPlan.from_donors(TABLE).budget_factors(1) == (1.0, 1.0)
    assert HeadPlan.from_donors(TABLE, budgets=[[1, 1]] * 3) == HeadPlan.from_donors(TABLE)


def test_versions_that_know_no_budgets_refuse_a_plan_that_has_some(tmp_path):
    """They take format 1 only."""
    plan = HeadPlan.from_donors(TABLE, budgets=[[1, 2], [0.5, 2], [1, 1]])
    assert plan.to_json()["format"] == FORMAT_OF_BUDGETS != FORMAT
    assert HeadPlan.from_donors(TABLE).to_json()["format"] == FORMAT
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == plan


def test_same_index_inherits_from_the_nearest_retrieval_head_of_its_index():
    plan = HeadPlan.same_index([(2, 1)], 4, 2)
    assert plan.retrieval == ((0, 0), (0, 1), (2, 1))
    assert [row[0] for row in plan.donors] == [(0, 0)] * 4
    assert [row[1] for row in plan.donors] == [(0, 1), (0, 1), (2, 1), (2, 1)]


def test_all_retrieval():
    plan = HeadPlan.all_retrieval(3, 2)
    assert len(plan.retrieval) == 6
    assert all(plan.sparse_heads(layer) == () for layer in range(3))


# ---------------------------------------------------------------------- files


def make_plan(seed: int = 0, layers: int = 7, heads: int = 3, **details) -> HeadPlan:
    """A valid plan with random roles and donors."""
    rng = random.Random(seed)
    donors: list[list[tuple[int, int]]] = []
    known = [(0, rng.randrange(heads))]
    for layer in range(layers):
        own = {head for head in range(heads) if rng.random() < 0.3} | {head for at, head in known if at == layer}
        known += [(layer, head) for head in sorted(own) if (layer, head) not in known]
        donors.append([(layer, head) if head in own else rng.choice(known) for head in range(heads)])
    return HeadPlan.from_donors(donors, **details)


@pytest.mark.parametrize("seed", range(5))
def test_a_saved_plan_loads_as_it_was(tmp_path, seed):
    means = [[round(random.Random(seed).random(), 4)] * 3] * 7
    details = {"model": {"name": "tiny", "architecture": "LlamaForCausalLM"}, "gate_means": means}
    details["completion"] = [[0.25 * (seed % 2), 1.0, 0.3]] * 7 if seed else None
    plan = make_plan(seed, **details, provenance={"seed": seed, "data": "prose"})
    plan.save(tmp_path / "new" / "plan.json")
    assert HeadPlan.load(tmp_path / "new" / "plan.json") == plan
    assert HeadPlan.from_json(plan.to_json()) == plan
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "plan.json"]


def test_a_file_has_a_line_for_each_layer(tmp_path):
    make_plan().save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("    [[") for line in lines) == 7
    assert not any("completion" in line for line in lines)
    make_plan(completion=[[1, 0, 0.5]] * 7).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text(encoding="utf-8").count("    [1.0, 0.0, 0.5]") == 7


def changed(**changes) -> str:
    return json.dumps({**make_plan().to_json(), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a head plan"),
        ("{}", "not a head plan"),
        ("3", "not a head plan"),
        (changed(format="other/1"), f"format must be '{FORMAT}' or '{FORMAT_OF_BUDGETS}', not 'other/1'"),
        (changed(donors=[[[5, 0]]]), "does not exist"),
        (changed(model={"num_layers": 8}), "says num_layers = 8, but its donors have 7"),
        (changed(model={"num_layers": "7"}), "says num_layers = '7', but its donors have 7"),
        (changed(model={"num_kv_heads": 2}), "says num_kv_heads = 2, but its donors have 3"),
        (changed(gate_means=[[0.5]]), "gate_means"),
        (changed(gate_means=[["x", 0, 0]] * 7), "gate_means must be a table of finite numbers"),
        (changed(gate_means=7), "finite numbers"),
        (changed(completion=[[1.0]]), "completion must have the shape"),
        (changed(completion=[[1.0, None, 1.0]] * 7), "completion must be a table of finite numbers"),
        (changed(gate_means=[[math.nan] * 3] * 7), "gate_means must be a table of finite numbers"),
        (changed(budgets=[[1, 2, 1]] * 7), f"budgets need format '{FORMAT_OF_BUDGETS}'"),
        (changed(budget=[[1, 2, 1]] * 7), "a head plan has no 'budget'; did you mean budgets"),
        (changed(model=[1]), "model must be an object"),
        (changed(provenance="trained"), "provenance must be an object"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, said):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=said) as caught:
        HeadPlan.load(path)
    assert "plan.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(PlanError, match="no head plan file"):
        HeadPlan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot be read"):
        HeadPlan.load(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"donors": "\xe9"}')
    with pytest.raises(PlanError, match="cannot be read"):
        HeadPlan.load(tmp_path / "latin.json")


@pytest.mark.parametrize("name", bundled_plans())
def test_bundled_plans_load_and_say_where_they_come_from(name):
    plan = HeadPlan.load(name)
    assert plan.model["name"]
    assert plan.provenance


# ---------------------------------------------------------------------- fitting a model


def test_a_plan_for_another_model_is_refused():
    plan = HeadPlan.all_retrieval(4, 2, model={"name": "tiny", "architecture": "LlamaForCausalLM"})
    plan.check_fits(num_layers=4, num_kv_heads=2)
    plan.check_fits(num_layers=4, num_kv_heads=2, architecture="LlamaForCausalLM")
    HeadPlan.all_retrieval(4, 2).check_fits(num_layers=4, num_kv_heads=2, architecture="LlamaForCausalLM")
    with pytest.raises(PlanError, match="tiny with 4 layers; the model has 5"):
        plan.check_fits(num_layers=5, num_kv_heads=2)
    with pytest.raises(PlanError, match="2 KV heads per layer; the model has 8"):
        plan.check_fits(num_layers=4, num_kv_heads=8)
    with pytest.raises(PlanError, match="architecture LlamaForCausalLM; the model has Qwen3ForCausalLM"):
        plan.check_fits(num_layers=4, num_kv_heads=2, architecture="Qwen3ForCausalLM")


def test_shards_keep_their_own_donors():
    tables = {"gate_means": [[0.1, 0.2, 0.3, 0.4]] * 3, "completion": [[0, 1, 2, 3]] * 3, "budgets": [[1, 2, 1, 1]] * 3}
    plan = HeadPlan.same_index([(1, 3), (2, 0)], 3, 4, **tables)
    left, right = plan.shard(0, 2), plan.shard(1, 2)
    assert [shard.num_kv_heads for shard in (left, right)] == [2, 2]
    for layer in range(3):
        joined = [*left.donors[layer], *((at, head + 2) for at, head in right.donors[layer])]
        assert tuple(joined) == plan.donors[layer]
    assert right.gate_means[0] == (0.3, 0.4)
    assert (left.completion[2], right.completion[2]) == ((0, 1), (2, 3))
    assert (left.budgets, right.budgets) == (((1, 2),) * 3, None)
    assert right.provenance["shard"] == [1, 2]


def test_a_donor_on_another_rank_is_refused():
    plan = HeadPlan.from_donors([[(0, 0), (0, 0)]])
    with pytest.raises(PlanError, match=r"is on tensor-parallel rank 0, not 1"):
        plan.shard(1, 2)
    with pytest.raises(PlanError, match="cannot be divided evenly over 3 ranks"):
        plan.shard(0, 3)
    with pytest.raises(PlanError, match="Rank 2 does not exist"):
        plan.shard(2, 2)


def test_stages_count_layers_from_their_first():
    donors = [[(0, 0)], [(0, 0)], [(2, 0)], [(2, 0)]]
    plan = HeadPlan.from_donors(donors, completion=[[0], [1], [2], [3]], budgets=[[1], [2], [4], [1]])
    stage = plan.stage(2, 4)
    assert stage.donors == (((0, 0),), ((0, 0),))
    assert stage.provenance["stage"] == [2, 4]
    assert stage.completion == ((2,), (3,))
    assert stage.budgets == ((4,), (1,))
    with pytest.raises(PlanError, match="earlier pipeline stage"):
        plan.stage(1, 4)
    for first, last in ((2, 2), (-1, 2), (2, 5)):
        with pytest.raises(PlanError, match="do not exist"):
            plan.stage(first, last)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_plans_with_other_line_ends(tmp_path, encoding, end):
    path = tmp_path / "plan.json"
    plan = HeadPlan.all_retrieval(2, 2)
    plan.save(path)
    path.write_bytes(end.join(path.read_text(encoding="utf-8").split("\n")).encode(encoding))
    assert HeadPlan.load(path).donors == plan.donors


def test_plans_can_be_keys():
    plan, same = HeadPlan.from_donors(TABLE, model={"name": "m"}), HeadPlan.from_donors(TABLE, model={"name": "m"})
    assert plan == same
    assert {plan: 1}[same] == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"donors": ' + "9" * 5000 + "}"])
def test_json_that_python_does_not_read_is_refused(text):
    with pytest.raises(PlanError, match="not JSON that can be read"):
        HeadPlan.from_json(text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_do_not_matter(end, tmp_path):
    plan = HeadPlan.from_donors(TABLE)
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_bytes(text.replace("\n", end).encode("utf-8-sig"))
    assert HeadPlan.load(tmp_path / "plan.json") == plan
