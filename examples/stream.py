"""Print text as it is generated. Run: python examples/stream.py "Once upon a time" [--model NAME]"""

import argparse

from lycheedecode import Engine, HeadPlan, HybridConfig, Sampling
from lycheedecode.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--plan", default="smollm2-135m", help="a bundled plan, or a file")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()

    model, tokenizer = load_model(options.model)
    config = HybridConfig(budget_tokens=512, block_size=16)
    engine = Engine(model, tokenizer, plan=HeadPlan.load(options.plan), config=config)
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=0)
    for piece in engine.stream(options.prompt, options.max_new_tokens, sampling=sampling):
        print(piece.text, end="", flush=True)
        if piece.generation is not None:
            print(f"\n[{piece.generation.finish_reason}, {piece.generation.tokens_per_second:.1f} tokens/s]")


if __name__ == "__main__":
    main()
