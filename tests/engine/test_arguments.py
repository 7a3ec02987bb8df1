"""What functions take besides objects, and what they say of anything else."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from lycheedecode import Engine, HeadPlan, HybridConfig, IdentifySettings, Sampling, hybrid, identify, load_model
from lycheedecode.errors import LycheeError, OutputError
from lycheedecode.identify import Cell

TIGHT = {"budget_tokens": 16, "block_size": 4, "sink_tokens": 4, "recent_tokens": 4}


@pytest.fixture(params=["object", "path", "text", "json"])
def plan(request, tmp_path):
    """A plan in every form."""
    path = tmp_path / "plan.json"
    tiny.plan().save(path)
    return {"object": tiny.plan(), "path": path, "text": str(path), "json": json.loads(path.read_text())}[request.param]


def test_plans_and_configs_in_every_form_decode_alike(plan, llama):
    rows = tiny.prompts(60, 40)
    expected = Engine(llama, plan=tiny.plan(), config=HybridConfig(**TIGHT)).generate(rows, 8)
    found = Engine(llama, plan=plan, config=TIGHT).generate(rows, 8)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    batch = tiny.padded(rows)
    with hybrid(llama, plan, TIGHT):
        made = llama.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert made.tolist() == [list(one.token_ids) for one in expected]


def test_sampling_as_a_mapping(llama):
    drawing, rows = {"temperature": 1.0, "seed": 3}, tiny.prompts(20)
    engine = Engine(llama)
    one, other = (engine.generate(rows, np.int64(8), sampling=given)[0] for given in (drawing, Sampling(**drawing)))
    assert one.token_ids == other.token_ids != engine.generate(rows, 8)[0].token_ids


def test_settings_of_an_identification_as_plain_values():
    cells = ["prose:64:passkey:1", Cell("noise", 32)]
    settings = IdentifySettings(calibrate_cells=cells, train_cells=cells[:1], config={"budget_tokens": 512})
    assert settings.calibrate_cells == (Cell("prose", 64, "passkey", 1), Cell("noise", 32))
    assert settings.train_cells == (Cell("prose", 64, "passkey", 1),)
    assert settings.config == HybridConfig(budget_tokens=512)


CONFIG = "config must be of class HybridConfig or a mapping of its settings, not "
PLAN = "plan must be a HeadPlan, the name or file of one, 'auto' or None, not "
WRONG = {
    "model": (lambda m, _: Engine("smollm2-135m"), "model must be a transformers model, not 'smollm2-135m'; load"),
    "no model": (lambda m, _: identify(None, tiny.byte_tokenizer()), "model must be a transformers model, not None"),
    "tokenizer": (lambda m, _: Engine(m, "gpt2"), "tokenizer must be a Hugging Face tokenizer or None, not 'gpt2'"),
    "plan": (lambda m, _: Engine(m, plan=3), f"{PLAN}3."),
    "table": (lambda m, _: Engine(m, plan=[[(0, 0)]]), f"{PLAN}[[(0, 0)]]."),
    "bytes": (lambda m, _: hybrid(m, b"x").__enter__(), f"{PLAN}b'x'."),
    "no plan": (lambda m, _: hybrid(m, None).__enter__(), "Hybrid attention needs a plan: "),
    "json": (lambda m, _: Engine(m, plan={"a": 1}), "plan: not a head plan (it has no 'donors')."),
    "config": (lambda m, _: Engine(m, config=512), f"{CONFIG}512."),
    "class": (lambda m, _: hybrid(m, tiny.plan(), HybridConfig).__enter__(), f"{CONFIG}<class"),
    "setting": (lambda m, _: Engine(m, config={"budget": 1}), "HybridConfig has no setting 'budget'; did you mean "),
    "value": (lambda m, _: Engine(m, config={"budget_tokens": "1"}), "budget_tokens must be a whole number"),
    "attention": (lambda m, _: Engine(m, attention="full"), "attention must be a DecodeAttention or None, not 'full'."),
    "chunk": (lambda m, _: Engine(m, prefill_chunk="4"), "prefill_chunk must be a whole number of at least 1, not '4'"),
    "bool chunk": (lambda m, _: Engine(m, prefill_chunk=True), "prefill_chunk must be a whole number of at least 1"),
    "sampling": (lambda m, e: e.generate([[5]], sampling=0.7), "sampling must be of class Sampling or a mapping"),
    "temp": (lambda m, e: e.generate([[5]], sampling={"temp": 1}), "Sampling has no setting 'temp'"),
    "chat": (lambda m, e: e.generate([[5]], chat="no"), "chat must be True or False, not 'no'."),
    "eos": (lambda m, e: e.generate([[5]], ignore_eos=1), "ignore_eos must be True or False, not 1."),
    "tokens": (lambda m, e: e.generate([[5]], True), "max_new_tokens must be a whole number of at least 1, not True."),
    "room": (lambda m, e: e.prefill([[5]], room="8"), "room must be a whole number of at least 0, not '8'."),
    "context": (lambda m, e: e.decode_one_token([[5]], torch.tensor([5])), "prefill makes the Context that is needed"),
    "step": (lambda m, e: e.decode_one_token(e.prefill([[5]]), torch.tensor([[5]])), "not torch.int64 [1, 1]."),
    "two": (lambda m, e: e.decode_one_token(e.prefill([[5]]), torch.tensor([5, 6])), "int64 [1], not torch.int64 [2]."),
    "beyond": (lambda m, e: e.decode_one_token(e.prefill([[5]]), torch.tensor([999])), "has the token id 999"),
    "settings": (lambda m, _: identify(m, tiny.byte_tokenizer(), 3), "settings must be of class IdentifySettings"),
    "folder": (lambda m, _: identify(m, tiny.byte_tokenizer(), folder=3), "folder must be text or a Path or None"),
    "untold": (lambda m, _: identify(m, None), "Identification needs the model's tokenizer."),
    "cell": (lambda m, _: IdentifySettings(train_cells=("a",)), "'a' is not TEXT:TOKENS:TASK:COUNT"),
    "length": (lambda m, _: Cell("prose", "64"), "length must be a whole number, not '64'."),  # type: ignore[arg-type]
    "no passkey": (lambda m, _: Cell("prose", 64, "passkey", 0), "A prompt of 64 tokens has 1 to 26 passkeys, not 0."),
    "passkeys": (lambda m, _: Cell("prose", 64, "passkey", 27), "of 64 tokens has 1 to 26 passkeys, not 27."),
    "hops": (lambda m, _: Cell("prose", 64, "multi_hop", 65), "A prompt of 64 tokens has 1 to 64 hops, not 65."),
    "store": (lambda m, _: Engine(m, store_ratio=float("nan")), "store_ratio must be at least 1, so that the store"),
    "revision": (lambda m, _: load_model("smollm2-135m", revision="v1"), "Only a model on the hub has revisions; 'smo"),
    "folder's": (lambda m, _: load_model("/tmp", revision="v1"), "'/tmp' is on this machine: leave 'v1' out."),
    "load": (lambda m, _: load_model(None), "A model is loaded by name or path, not from None."),
    "path": (lambda m, _: load_model("/no/such/model"), "There is no model at '/no/such/model'"),
    "typo": (lambda m, _: load_model("smolm2-135m"), "no model 'smolm2-135m': did you mean 'smollm2-135m'?"),
    "plan file": (lambda m, _: HeadPlan.load(3), "A head plan is loaded by name or path, not from 3."),
    "head": (lambda m, _: HeadPlan.same_index([(5, 0)], 2, 2), "The retrieval head (5, 0) does not exist in a plan"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named_in_one_sentence(case, llama):
    call, said = WRONG[case]
    with pytest.raises(LycheeError) as refused:
        call(llama, Engine(llama))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_context_of_another_model_is_refused(llama):
    context = Engine(tiny.model()).prefill([[5, 6]])  # the same weights, but who knows?
    with pytest.raises(LycheeError, match="read by another model"):
        Engine(llama).generate(context, 2)
    with pytest.raises(LycheeError, match="read by another model"):
        Engine(llama).score(context, [[5]])


def test_a_context_that_is_used_anew_ends_the_generation_over_it(llama):
    engine = Engine(llama, tiny.byte_tokenizer())
    context = engine.prefill(tiny.prompts(20))
    stream = engine.stream(context, 12, ignore_eos=True)
    next(stream)
    expected = Engine(llama).generate(tiny.prompts(20), 12, ignore_eos=True)[0].token_ids
    assert engine.generate(context, 12, ignore_eos=True)[0].token_ids == expected
    with pytest.raises(LycheeError, match="generation over this Context"):
        list(stream)


def test_a_plan_that_cannot_be_saved_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder' cannot be written: Is a directory"):
        tiny.plan().save(tmp_path / "folder")
    assert [one.name for one in Path(tmp_path).iterdir()] == ["folder"]
