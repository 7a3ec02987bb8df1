"""Stability of roles: every variant leads to a plan, plans are compared, interrupted calls go on."""

import json
from dataclasses import replace

from experiments.identification import HeldOut
from experiments.stability import Stability, variants
from lycheedecode import HeadPlan, HybridConfig
from lycheedecode.identify import Cell, IdentifySettings

CELL = Cell("noise", 240)
SETTINGS = IdentifySettings(
    num_retrieval_heads=4,
    config=HybridConfig(budget_tokens=64, block_size=8, sink_tokens=8, recent_tokens=8),
    calibrate_cells=(CELL, replace(CELL, text="prose")),
    calibrate_prompts=2,
    draws=2,
    batch_size=2,
)


def test_plans_are_found_compared_and_kept(model, tokenizer, tmp_path, monkeypatch):
    path, plans = tmp_path / "new" / "stability.json", tmp_path / "plans"

    def run():
        stability = Stability(model, tokenizer, SETTINGS, HeldOut(1, (CELL,)), path, plans)
        for variant in variants(SETTINGS, 2, [3, 6]):
            stability.add(variant)

    run()
    result = json.loads(path.read_text(encoding="utf-8"))["result"]
    rows = {row["plan"]: row for row in result["rows"]}
    assert list(rows) == [
        "seed 0", "seed 1", "noise only", "prose only", "passkeys only", "hops only",
        "3 retrieval heads", "6 retrieval heads",
    ]  # fmt: skip
    assert rows["seed 0"]["jaccard_with_first"] == rows["seed 0"]["same_donors_share"] == 1
    assert rows["passkeys only"]["jaccard_with_first"] == 1  # all prompts of the base are passkeys
    assert all(0 <= row["jaccard_with_first"] <= 1 and row["kl_mean"] > 0 for row in rows.values())
    assert [rows[f"{number} retrieval heads"]["retrieval_heads"] for number in (3, 6)] == [3, 6]
    assert 0 <= result["mean_jaccard_of_seeds"] <= 1
    assert "mean_jaccard_of_numbers" not in result
    assert len(HeadPlan.load(plans / "6-retrieval-heads.json").retrieval) == 6

    monkeypatch.setattr(Stability, "_find", lambda *_: 1 / 0)  # nothing is left to find
    (plans / "seed-0.json").unlink()
    run()
    assert (plans / "seed-0.json").is_file()
