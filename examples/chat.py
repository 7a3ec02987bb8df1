"""A chat of several turns over a long document, which is read once.

Run: python examples/chat.py [--model NAME] [--document FILE]
"""

import argparse
from pathlib import Path

from lycheedecode import Engine, HeadPlan, HybridConfig
from lycheedecode.models import load_model

QUESTIONS = ["What is this text about?", "Name one detail of it."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--plan", default="smollm2-135m", help="a bundled plan, or a file")
    parser.add_argument("--document", type=Path, default=Path(__file__))
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()

    model, tokenizer = load_model(options.model)
    config = HybridConfig(budget_tokens=512, block_size=16)
    engine = Engine(model, tokenizer, plan=HeadPlan.load(options.plan), config=config)
    context, messages = None, []
    for question in QUESTIONS:
        text = question if messages else f"{options.document.read_text(encoding='utf-8')}\n\n{question}"
        messages.append({"role": "user", "content": text})
        context = engine.prefill(messages, room=options.max_new_tokens, context=context)
        [answer] = engine.generate(context, max_new_tokens=options.max_new_tokens)
        messages.append({"role": "assistant", "content": answer.text})
        print(f"> {question}\n{answer.text}")
        print(f"[{answer.cached_tokens} of {answer.prompt_tokens} prompt tokens were cached]\n")


if __name__ == "__main__":
    main()
