"""Readings of heads: what a plan says they follow exactly, and what is chosen keeps within its bytes."""

import random
from dataclasses import replace

import pytest
import tiny
import torch

from experiments import readings, same_bytes
from experiments.readings import KEYS, Allotment, Reader, Reading, Readings
from lycheedecode import HybridConfig
from lycheedecode.identify import Cell
from lycheedecode.identify.donors import Reach
from lycheedecode.identify.replay import Planned, prepare, replay
from lycheedecode.identify.sensitivity import gradients, measure_changes
from lycheedecode.models.shape import ModelShape
from lycheedecode.policies import make
from lycheedecode.policies.bytes import bytes_at
from lycheedecode.prompts.makers import makers_for
from lycheedecode.results import Result

CONFIG = HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=8, completion_chunk=16)
FACTORS = (0.0, 0.5)
PLAN = replace(tiny.plan(), completion=((0.5, 0.0),) * 4)


@pytest.fixture(scope="module")
def lesson(llama, byte_tokenizer):
    cell = Cell("code", 200, "continuation", 12)
    return prepare(llama, cell.make(makers_for(byte_tokenizer, [cell], "evaluate"), 2, random.Random(0)))


@pytest.fixture(scope="module")
def gradient(llama, lesson):
    return gradients(llama, lesson, 3, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured(llama, lesson, gradient):
    found = Readings(Allotment.of("plan", PLAN, CONFIG), FACTORS, longest=200)
    found.measure(llama, lesson, gradient)
    return found


def test_a_plan_is_read_as_it_decodes(llama, lesson):
    reader = Reader(Allotment.of("plan", PLAN, CONFIG))
    torch.testing.assert_close(replay(llama, lesson, reader), replay(llama, lesson, Planned(PLAN, CONFIG)))
    assert reader.steps == lesson.answer_ids.numel()
    assert 0.9 * 8 * 64 < reader.tokens / reader.steps <= 8 * 64


def test_bytes_are_those_of_the_engine(llama):
    policy = make("hybrid", shape=ModelShape.of(llama), config=CONFIG, plan=PLAN)
    form = Allotment.of("plan", PLAN, CONFIG)
    assert form.bytes(4000) == pytest.approx(bytes_at(policy, ModelShape.of(llama), 4000, 1), rel=0.01)
    scan = len(PLAN.retrieval) * 4000
    assert form.bytes(4000) - replace(form, keys="float8").bytes(4000) == pytest.approx(scan / 2)
    assert form.bytes(4000) - replace(form, keys="int4").bytes(4000) == pytest.approx(scan * (1 - 4.5 / 16))
    assert form.bytes(4000) - form.bytes(4000, tokens=0) == 2 * 8 * 64


def test_keys_of_four_bits_are_near_by_their_scale():
    keys = torch.randn(2, 3, 70, 64, generator=torch.Generator().manual_seed(0))
    largest = keys.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1)
    assert ((KEYS["int4"][1](keys) - keys).abs() <= largest / 14 * 1.01).all()
    by_channel = KEYS["int4 of channels"][1](keys)
    largest = keys[:, :, :64].unflatten(2, (2, 32)).abs().amax(3).repeat_interleave(32, 2)
    assert ((by_channel[:, :, :64] - keys[:, :, :64]).abs() <= largest / 14 * 1.01).all()
    torch.testing.assert_close(by_channel[:, :, 64:], keys[:, :, 64:], rtol=0, atol=0)
    whole = torch.randint(-7, 8, (1, 1, 32, 32)).float()
    whole[..., 0], whole[:, :, 0] = 7, 7
    for name in ("int4", "int4 of channels"):
        torch.testing.assert_close(KEYS[name][1](whole), whole)


def test_single_readings_cost_what_donors_do(llama, lesson, gradient, measured):
    """At the plan's own budget, where that budget is what `identify` measures."""
    reach = Reach.of(ModelShape.of(llama))
    expected = measure_changes(llama, lesson, CONFIG, reach, gradient, FACTORS)
    [found] = measured._rows
    heads = reach.heads()
    for head in PLAN.retrieval:
        torch.testing.assert_close(found[:, :, measured.parts.index(((head, 64),))], expected[:, :, heads.index(head)])


def test_choices_keep_within_their_tokens_and_do_not_cost_more(measured):
    choices = measured.choices(0.2)
    assert choices.tokens(choices.base) == pytest.approx(1)
    forms = {}
    for what in ("factors", "budgets_of_selections", "budgets_of_heads", "two_donors", "anything"):
        choice = getattr(choices, what)()
        assert choices.tokens(choice) <= 1.001, what
        assert choices.cost(choice) <= choices.cost(choices.base), what
        forms[what] = choices.form(what, choice)
    assert [each.parts for each in forms["factors"].every] == [each.parts for each in measured.form.every]
    budgets = {}
    for reading in forms["budgets_of_selections"].every:
        [(donor, budget)] = reading.parts
        budgets.setdefault(donor, set()).add(budget)
    assert {len(sizes) for sizes in budgets.values()} == {1}
    assert {budget for reading in forms["two_donors"].every for _, budget in reading.parts} <= {64, 32}
    assert choices.cost(choices.anything()) < choices.cost(choices.base)
    for form in forms.values():
        for layer, row in enumerate(form.readings):
            for head, reading in enumerate(row):
                assert all(donor[0] <= layer for donor, _ in reading.parts)
                assert (layer, head) not in form.retrieval or (layer, head) in dict(reading.parts)


def test_budgets_go_where_they_help(measured):
    """Of two selections, the one whose every token counts gets what the other's readers do not need."""
    table = torch.zeros(4, 8, len(measured.parts), 2)
    greedy, modest = measured.form.retrieval[0], measured.form.retrieval[-1]
    for i, parts in enumerate(measured.parts):
        for donor, size in parts:
            table[:, :, i] += {greedy: 100.0, modest: 1.0}.get(donor, 10.0) / size
    allowed = torch.tensor([[donor == each.parts[0][0] for ((donor, _), *_) in measured.parts]
                            for each in measured.form.every])  # fmt: skip
    tokens = torch.tensor([float(sum(size for _, size in parts)) for parts in measured.parts])
    choices = readings.Choices(measured, table, allowed, tokens, 0.0)
    for what in ("budgets_of_selections", "budgets_of_heads"):
        form = choices.form(what, getattr(choices, what)())
        budget = {donor: size for reading in form.every for donor, size in reading.parts}
        assert budget[greedy] > 64 > budget[modest], what


def test_a_head_reads_the_union_of_two_selections():
    one, two = ((0, 0), 32), ((0, 1), 32)
    chosen = {one: torch.tensor([True, False, True]), two: torch.tensor([False, False, True])}
    assert Reading((one, two)).blocks(chosen).tolist() == [True, False, True]
    assert Reading((two,)).blocks(chosen).tolist() == [False, False, True]


def test_the_study_writes_what_it_finds(monkeypatch, tmp_path, byte_tokenizer):
    model = tiny.model(num_hidden_layers=6)
    monkeypatch.setattr(same_bytes, "load_model", lambda name, dtype: (model, byte_tokenizer))
    monkeypatch.setattr("experiments.continuations.os.sched_getaffinity", lambda process: {0})
    path = tmp_path / "study.json"
    words = (
        "--identify code:160:continuation:6 --identify-prompts 4 --calibrate code:200:continuation:6 "
        "--calibrate-prompts 2 --draws 2 --batch-size 2 --evaluate prose:220:continuation:6 --prompts 2 "
        "--evaluate-batch 2 --heads 4 --budget-tokens 88 --block-size 8"
    )
    monkeypatch.setattr("sys.argv", ["study", "--json", str(path), *words.split()])
    same_bytes.main()
    found = Result.load(path)
    assert found.command == "same bytes"
    [scores] = found.cells.values()
    labels = set(scores)
    assert {"4 heads", "2 heads, float8", "8 heads, int4", "12 heads, int4 of channels"} <= labels
    assert {
        "4 heads, two donors",
        "4 heads, factors",
        "4 heads, budgets of selections",
        "2 heads, float8, anything",
    } <= labels
    assert {"4 heads, 1/4 of the calibration", "4 heads, chunks of 64", "4 heads, no completion"} <= labels
    assert {score["prompts"] for score in scores.values()} == {2}
    read = found.summary["read"]
    assert set(read) == labels - {"full attention by another kernel"}
    assert max(read.values()) <= read["4 heads"] * 1.06  # selections vary by the newest block, which is full or not
    assert max(found.summary["expected"].values()) <= 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--heads", "3"], "--heads must be at least 4, not 3"),
        (["--calibrate", "code"], "A kind of prompts is SOURCE:TOKENS:TASK:ANSWER, not 'code'"),
        (["--budget-tokens", "16"], "budget_tokens=16 has no room"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(same_bytes, "load_model", None)
    monkeypatch.setattr("sys.argv", ["study", "--json", "x.json", *words])
    with pytest.raises(SystemExit) as ended:
        same_bytes.main()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
