"""The comparison of ways to identify runs them all and survives an interruption."""

from dataclasses import replace
from statistics import median

import pytest

from experiments.identification import GATES, HeldOut, WaysStudy, compare
from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.errors import ResumeError
from lycheedecode.identify import Cell, IdentifySettings
from lycheedecode.results import Result

CELL = Cell("noise", 240)
SETTINGS = IdentifySettings(
    num_retrieval_heads=4,
    config=HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=8),
    calibrate_cells=(CELL,),
    calibrate_prompts=2,
    draws=2,
    train_cells=(CELL,),
    steps=1,
    batch_size=1,
)


def test_all_variants(model, tokenizer, tmp_path):
    path = tmp_path / "new" / "identification.json"
    compare(WaysStudy(model, tokenizer, SETTINGS, HeldOut(2, (CELL, Cell("noise", 300, "multi_hop", 2))), path), 1)
    variants = Result.load(path).summary["variants"]
    assert {"sensitivity", "coverage", "gates, exchange", "random 0", "random 0, remapped", *GATES} <= set(variants)
    for name, found in variants.items():
        heads = 8 if name.startswith("every head its own") else 4
        assert len(HeadPlan.from_donors(found["donors"]).retrieval) == found["retrieval_heads"] == heads
        assert set(found["kl"]) == {"240 tokens of noise, 1 passkey", "300 tokens of noise, 2 hops"}
    # Two prompts of a random model rank close ones by luck, but not what selects for itself behind most of the others.
    own = variants.pop("every head its own")["kl_mean"]
    assert own < median(found["kl_mean"] for found in variants.values())


def test_finished_variants_are_kept(model, tokenizer, tmp_path):
    path = tmp_path / "identification.json"
    WaysStudy(model, tokenizer, SETTINGS, HeldOut(1, (CELL,)), path).add("x", lambda: HeadPlan.all_retrieval(4, 2))
    again = WaysStudy(model, tokenizer, SETTINGS, HeldOut(1, (CELL,)), path)
    again.add("x", lambda: 1 / 0)
    assert list(again.results) == ["x"]
    with pytest.raises(ResumeError, match="another seed"):
        WaysStudy(model, tokenizer, replace(SETTINGS, seed=1), HeldOut(1, (CELL,)), path)
    with pytest.raises(ResumeError, match="another held_out_prompts"):
        WaysStudy(model, tokenizer, SETTINGS, HeldOut(2, (CELL,)), path)
