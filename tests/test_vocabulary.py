"""A tokenizer that knows more tokens than the model is one sentence, wherever its ids enter."""

from dataclasses import replace

import pytest
import tiny
from lm_eval.api.instance import Instance

from lycheedecode import Engine, hybrid, identify
from lycheedecode.engine.prompt import PromptError
from lycheedecode.evaluate.fidelity import measure_fidelity
from lycheedecode.evaluate.side_by_side import compare
from lycheedecode.evaluate.variants import variants
from lycheedecode.identify import Cell, IdentifySettings
from lycheedecode.identify.auto import auto_plan
from lycheedecode.integrations.lm_eval import LycheeLM

CELL, PLAN, CONFIG = Cell("prose", 60, "continuation", 4), tiny.plan(), tiny.config()
MEASURED = IdentifySettings(calibrate_cells=(CELL,), calibrate_prompts=1)
TRAINED = replace(MEASURED, roles="gates", train_cells=(CELL,))
SCORED = Instance("loglikelihood", {}, ("12", " abc"), 0, metadata=("task", 0, 1))

CALLS = {
    "generate": lambda m, t: Engine(m, t).generate("two words"),
    "prefill": lambda m, t: Engine(m, t).prefill("two words"),
    "score": lambda m, t: Engine(m, t).score("12", [t("two words").input_ids]),
    "compare": lambda m, t: compare(Engine(m, t), Engine(m, t, plan=PLAN), t("two words").input_ids, 4),
    "identify": lambda m, t: identify(m, t, MEASURED),
    "gates": lambda m, t: identify(m, t, TRAINED),
    "auto": lambda m, t: auto_plan(m, t, settings=MEASURED),
    "fidelity": lambda m, t: measure_fidelity(m, t, variants(["hybrid"], {"p": PLAN}, CONFIG), [CELL]),
    "harness": lambda m, t: LycheeLM({"full": Engine(m, t)}).loglikelihood([SCORED]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_spaces_are_beyond_the_first_hundred_tokens(call, byte_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("LYCHEEDECODE_CACHE", str(tmp_path))
    with pytest.raises(PromptError, match=r"has the token id 224; the model knows 0 to 99: use its own tokenizer\.$"):
        call(tiny.model(vocab_size=100), byte_tokenizer)


def test_what_transformers_generates(byte_tokenizer):
    small = tiny.model(vocab_size=100)
    inputs = byte_tokenizer("two words", return_tensors="pt")
    with hybrid(small, PLAN, CONFIG), pytest.raises(PromptError, match="the model knows 0 to 99"):
        small.generate(**inputs, max_new_tokens=2)
