"""Find a head plan for a model, save it, and continue a text that was not used to find it, with full attention beside.

Run: python examples/identify_and_check.py my-plan.json --model path/to/model
"""

import argparse
import random

from lycheedecode import Engine, HybridConfig
from lycheedecode.identify import Cell, IdentifySettings, identify
from lycheedecode.models import load_model
from lycheedecode.prompts.makers import PromptMaker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="where to save the plan")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048, help="of each calibration prompt")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--budget-tokens", type=int, default=512)
    options = parser.parse_args()

    model, tokenizer = load_model(options.model)
    config = HybridConfig(budget_tokens=options.budget_tokens, block_size=16)
    settings = IdentifySettings(
        config=config,
        calibrate_cells=(Cell("prose", options.tokens, "continuation", 64),),
        calibrate_prompts=options.prompts,
        batch_size=1,
    )
    plan = identify(model, tokenizer, settings)
    plan.save(options.out)
    print(f"{len(plan.retrieval)} retrieval heads; the plan is in {options.out}")

    prompt = PromptMaker(tokenizer, "prose", "evaluate").continuation(options.tokens, 24, random.Random(0))
    for name, engine in {
        "full": Engine(model, tokenizer),
        "hybrid": Engine(model, tokenizer, plan=plan, config=config),
    }.items():
        [answer] = engine.generate(prompt.prompt_ids, max_new_tokens=24)
        print(f"{name:>6}, {answer.kv_bytes_per_token / 1e6:.1f} MB of KV cache read per token: {answer.text}")


if __name__ == "__main__":
    main()
