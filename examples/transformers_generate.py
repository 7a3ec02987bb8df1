"""Hybrid attention inside Hugging Face's `generate`. Run: python examples/transformers_generate.py [--model NAME]"""

import argparse

from lycheedecode import HeadPlan, HybridConfig, hybrid
from lycheedecode.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--plan", default="smollm2-135m", help="a bundled plan, or a file")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args()

    model, tokenizer = load_model(options.model)
    inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    with hybrid(model, HeadPlan.load(options.plan), HybridConfig(budget_tokens=512, block_size=16)):
        output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
